"""The command line: help that explains, errors in one line, and JSON alone on stdout where it is asked for."""

import gc
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from bridle import RunSettings, __version__, config
from bridle.cli import app, main
from bridle.collector import uncollected
from bridle.data.scenes import read_facts
from bridle.errors import BridleError, SampleError
from bridle.run.start import Result
from bridle.sample.recipe import Recipe

VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# Of a verb that has verbs of its own, those: "data embedded".
COMMANDS: dict[str, Any] = {
    f"{verb} {name}".rstrip(): command
    for verb, group in VERBS.items()
    for name, command in getattr(group, "commands", {"": group}).items()
}
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `bridle ...` in this process. Returns: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bridle", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_the_verbs_follow_the_data() -> None:
    plain = {"demo", "train", "plan", "sample", "evaluate", "annotate", "info", "convert", "transfer"}
    assert set(COMMANDS) == {*plain, "data embedded"}


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_explains_itself_with_an_example_that_parses(verb: str) -> None:
    result = CliRunner().invoke(app, [*verb.split(), "--help"])
    assert result.exit_code == 0
    assert "Example:" in result.stdout
    examples = re.findall(rf"`bridle ({verb}[^`]*)`", COMMANDS[verb].callback.__doc__)
    assert examples
    for example in examples:
        arguments = shlex.split(example)[len(verb.split()) :]
        COMMANDS[verb].make_context(verb, arguments)  # an option that does not exist is an error here


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_of_every_verb_has_a_help_text(verb: str) -> None:
    texts = [parameter.help for parameter in COMMANDS[verb].params if parameter.name != "help"]
    assert len(texts) >= 2
    assert all(texts)


@pytest.mark.parametrize(("verb", "kind"), [("train", RunSettings), ("plan", RunSettings), ("sample", Recipe)])
def test_the_override_in_the_help_is_of_a_setting_of_that_verb(verb: str, kind: type) -> None:
    (text,) = [parameter.help for parameter in COMMANDS[verb].params if parameter.name == "overrides"]
    table = (
        {"data": {"folder": "d"}} if kind is RunSettings else {"prompt": "p", "controls": [{"file": "c", "hint": "h"}]}
    )
    config.build(kind, config.overlay(table, [text.rpartition(" ")[2]]))


def test_help_of_every_verb_answers_without_loading_torch() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from bridle.cli import app\n"
        f"for verb in {list(COMMANDS)}: assert 'Usage' in CliRunner().invoke(app, [*verb.split(), '--help']).stdout\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'cv2', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_training_starts_without_what_draws_its_plots() -> None:
    script = (
        "import sys, bridle.run.training; print(sorted({'matplotlib', 'bridle.run.evaluating'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"


def test_garbage_is_looked_for_again_once_a_verb_has_imported_what_it_needs() -> None:
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_what_lasts_is_left_out_of_later_searches_and_a_collector_that_was_off_stays_off() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        pass
    assert gc.get_freeze_count() == before
    gc.disable()
    try:
        with uncollected(lasting=True):
            kept = [[] for _ in range(10)]
        assert not gc.isenabled()
        assert gc.get_freeze_count() > before + len(kept)
    finally:
        gc.unfreeze()
        gc.enable()


def test_the_version_is_printed(call: Call) -> None:
    assert call("--version") == (0, f"bridle {__version__}\n", "")


def check_one_line(result: tuple[int, str, str], *said: str) -> None:
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("bridle: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for words in said:
        assert words in err


def test_an_unknown_setting_is_one_line_that_names_the_nearest(call: Call, tmp_path: Path) -> None:
    result = call("train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--set", "train.lrr=1e-4")
    check_one_line(result, "unknown setting train.lrr", "did you mean train.lr?")


def test_a_setting_out_of_range_is_one_line_with_its_range(call: Call, tmp_path: Path) -> None:
    result = call("train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--set", "train.steps=0")
    check_one_line(result, "train.steps is 0", "expected 1 or more")


def test_a_missing_data_set_is_one_line_and_makes_no_run(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridle.run.training.load_base", lambda where, **options: None)
    missing, out = tmp_path / "nowhere", tmp_path / "run"
    check_one_line(call("train", "--data", str(missing), "--out", str(out)), f"data folder {missing} does not exist")
    assert not out.exists()


def test_measuring_a_folder_that_holds_no_run_is_one_line(call: Call, tmp_path: Path) -> None:
    check_one_line(call("evaluate", str(tmp_path)), f"{tmp_path} holds no run", "bridle train")


def test_an_unreadable_picture_is_one_line(call: Call, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("not a picture")
    result = call("annotate", str(tmp_path / "notes.png"), str(tmp_path / "hint.png"))
    check_one_line(result, "notes.png", "cannot be read as PNG")
    assert not (tmp_path / "hint.png").exists()


def test_an_unknown_annotator_names_the_nearest(call: Call) -> None:
    check_one_line(call("annotate", "a.png", "b.png", "--annotator", "cany"), "did you mean canny?")


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


def test_an_error_that_quotes_several_lines_is_still_one(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.run.sampling.sample_to_files", fail_with(SampleError("first\nsecond")))
    check_one_line(call("sample", "--prompt", "a cat"), "first second")


def test_a_bug_of_ours_is_not_dressed_up_as_the_users_mistake(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    assert not issubclass(RuntimeError, BridleError)
    monkeypatch.setattr("bridle.run.sampling.annotate_file", fail_with(RuntimeError("ours")))
    monkeypatch.setattr(sys, "argv", ["bridle", "annotate", "a.png", "b.png"])
    with pytest.raises(RuntimeError, match="ours"):
        main()


def test_ctrl_c_ends_with_130_and_no_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.run.sampling.annotate_file", fail_with(KeyboardInterrupt()))
    assert call("annotate", "a.png", "b.png") == (130, "", "bridle: interrupted\n")


def test_what_train_is_told_reaches_training_with_overrides_last(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[Any] = []

    def start(settings: Any, out: Path, **options: Any) -> Result:
        given.extend((settings, out, options))
        return replace(RESULT, step=7, finished=False, reason="asked to stop")

    monkeypatch.setattr("bridle.run.start.start", start)
    (tmp_path / "run.toml").write_text('[data]\nfolder = "elsewhere"\nflip = false\n[train]\nlr = 1e-3\nbatch = 2\n')
    folder = 'my "best" pictures'
    named = [
        "--data",
        folder,
        "--out",
        "runs/a",
        "--set",
        "train.lr=2e-4",
        "--memory",
        "8GB",
        "--nproc",
        "2",
        "--force",
    ]
    status, out, err = call("train", str(tmp_path / "run.toml"), *named)
    settings, where, options = given
    assert options == {"memory": "8GB", "force": True, "nproc": 2, "ray": None, "as_json": False}
    assert (settings.data.folder, settings.data.flip) == (Path(folder), False)
    assert (settings.train.lr, settings.train.batch, where) == (2e-4, 2, Path("runs/a"))
    assert (status, err) == (0, "")
    assert out == (
        "Training stopped at step 7: asked to stop.\nControl learned at step 2.\n"
        f"Control: {Path('runs/a/control')}, the best: {Path('runs/a/best')}\nThe same command goes on.\n"
    )


def test_what_was_moved_away_is_not_said_to_lie_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = replace(RESULT, control=False, best=False)
    monkeypatch.setattr("bridle.run.start.start", lambda *_, **__: moved)
    named = ("train", "--data", "d", "--out", "o")
    assert call(*named)[1].splitlines()[-1] == f"Control: no longer in {Path('o/control')}"
    assert json.loads(call(*named, "--json")[1]) == {**asdict(moved), "control": None}


def test_the_scenes_are_written_once_and_nothing_is_overwritten(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    facts = read_facts()
    few = [next(fact for fact in facts if fact["split"] == split) for split in ("train", "held_out")]
    monkeypatch.setattr("bridle.data.scenes.read_facts", lambda: few)
    monkeypatch.chdir(tmp_path)
    said = (0, "scenes: 2 scenes, 1 to train on, 1 of objects that these never show\n", "")
    assert call("data", "embedded") == call("data", "embedded", "scenes") == said
    status, out, _ = call("data", "embedded", "--json")
    assert (status, json.loads(out)) == (0, {"folder": "scenes", "train": 1, "held_out": 1})
    (tmp_path / "scenes" / "metadata.jsonl").write_text("mine")
    check_one_line(call("data", "embedded"), "scenes is not empty", "give another folder")


RESULT = Result(step=3, finished=True, reason="done", verdict="Control learned at step 2.", control=True, best=True)
MEASURED = SimpleNamespace(evaluation=SimpleNamespace(folder=Path("e")), report=Path("e/report.html"))
DEMO = SimpleNamespace(summary={"f1": 0.5}, sentence="They follow.", report=Path("r"), sheet=Path("s"), colours=None)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "demo"), (["--data", "a/cats"], "demo-cats"), (["--data", "a/cats", "--out", "b"], "b")],
)
def test_each_data_set_has_a_demo_of_its_own(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    given: list[Any] = []
    monkeypatch.setattr("bridle.demo.demo.run_demo", lambda data, out: given.append(out) or DEMO)
    assert call("demo", *arguments)[0] == 0
    assert given == [Path(expected)]


@pytest.mark.parametrize(
    ("arguments", "fakes", "expected"),
    [
        (["demo"], {"bridle.demo.demo.run_demo": DEMO}, {"f1": 0.5}),
        (
            ["train", "--data", "d", "--out", "o"],
            {"bridle.run.start.start": RESULT},
            {**asdict(RESULT), "control": str(Path("o/control"))},
        ),
        (
            ["sample", "--prompt", "a cat", "--count", "2"],
            {"bridle.run.sampling.sample_to_files": [Path("a.png"), Path("b.png")]},
            {"pictures": ["a.png", "b.png"]},
        ),
        (
            ["evaluate", "r"],
            {"bridle.run.evaluate_run": MEASURED, "bridle.evaluate.sentence": "They follow."},
            {"sentence": "They follow.", "report": str(Path("e/report.html")), "figures": "e"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_json_is_all_that_stdout_gets(
    call: Call, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fakes: dict[str, Any], expected: dict[str, Any]
) -> None:
    for target, result in fakes.items():
        monkeypatch.setattr(target, lambda *given, result=result, **options: result)
    status, out, _ = call(*arguments, "--json")
    assert status == 0
    assert json.loads(out) == expected


def test_annotating_a_real_picture_answers_in_json(call: Call, tmp_path: Path) -> None:
    image = np.full((32, 32, 3), 255, np.uint8)
    image[8:24, 8:24] = 0
    Image.fromarray(image).save(tmp_path / "square.png")
    status, out, err = call("annotate", str(tmp_path / "square.png"), str(tmp_path / "hint.png"), "--json")
    assert (status, err) == (0, "")
    with Image.open(json.loads(out)["hint"]) as hint:
        assert hint.size == (32, 32)


def test_a_folder_may_have_any_name_and_has_to_have_one(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridle.run.training.load_base", lambda where, **options: None)
    folder = tmp_path / '🍎 "pics"'
    folder.mkdir()
    check_one_line(call("train", "--data", str(folder), "--out", str(tmp_path / "run")), f"{folder} holds no pictures")
    check_one_line(call("train"), "setting data.folder is missing; add it, or use --set data.folder=...")
    check_one_line(call("train", "--set", "data.folder="), "setting data.folder is ''; expected")


def test_what_cannot_be_written_is_one_line(call: Call, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    (tmp_path / "folder").mkdir()
    said = {
        "folder": "folder, which is a folder; give the name of a file in it",
        "hint.jpg": "hint.jpg; expected a name that ends on .png",
        "picture.png/hint.png": "hint.png, which lies beneath a file; give another path",
        "n" * 300 + ".png": "cannot be read or written",
    }
    for out, words in said.items():
        check_one_line(call("annotate", str(tmp_path / "picture.png"), str(tmp_path / out)), words)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["folder", "picture.png"]
    long = tmp_path / ("n" * 250 + ".png")
    assert CliRunner().invoke(app, ["annotate", str(tmp_path / "picture.png"), str(long)]).exit_code == 0
    assert long.exists()


def test_a_console_that_lacks_letters_gets_others() -> None:
    script = "import sys; from bridle import cli; cli.app = lambda: print('│ 16 × 1 │'); cli.main()"
    told = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | told, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("? 16 ? 1 ?\n", "")


@pytest.mark.parametrize(("chosen", "status"), [(None, 2), ("a plan", 0)])
def test_a_plan_that_fits_nowhere_is_no_success(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, status: int
) -> None:
    found = SimpleNamespace(summary={}, lines=["nothing fits"], chosen=chosen)
    monkeypatch.setattr("bridle.run.plan.plan_run", lambda *_: found)
    assert CliRunner().invoke(app, ["plan"]).exit_code == status
