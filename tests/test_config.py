"""What settings promise: nothing unknown, nothing of the wrong type, and what was saved is what is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from bridle.config import build, dump, read, save
from bridle.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-5
    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 100
    ema: bool = False
    prompt: str = ""
    prompts: tuple[str, ...] = ()
    out: Path | None = None
    seed: int | str = 0
    optim: Optim = field(default_factory=Optim)


@dataclass(frozen=True, kw_only=True)
class Run:
    train: Train = field(default_factory=Train)


@dataclass(frozen=True, kw_only=True)
class Source:
    folder: Path
    limit: int | None = None


def written(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"step": 1}, "unknown setting step; did you mean steps?"),
        ({"optim": {"beta": [0.1, 0.2]}}, "unknown setting optim.beta; did you mean optim.betas?"),
        ({"zzz": 1}, "unknown setting zzz; known here: steps, ema"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Train, table)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"steps": 1.5}, "steps is 1.5; expected a whole number"),
        ({"steps": True}, "steps is True; expected a whole number"),
        ({"ema": 1}, "ema is 1; expected true or false"),
        ({"prompt": 3}, "prompt is 3; expected a string in quotes"),
        ({"prompts": "one"}, "prompts is 'one'; expected an array in brackets"),
        ({"prompts": ["one", 2]}, "prompts is 2; expected a string in quotes"),
        ({"out": 3}, "out is 3; expected a path in quotes"),
        ({"seed": 0.5}, "seed is 0.5; expected"),
        ({"optim": 3}, "optim is 3; expected a table of settings"),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; expected a number"),
        ({"optim": {"lr": False}}, "optim.lr is False; expected a number"),
        ({"optim": {"name": "adam"}}, "optim.name is 'adam'; expected one of 'adamw', 'sgd'"),
        ({"optim": {"betas": [0.9]}}, "optim.betas is [0.9]; expected an array of 2 values"),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_by_its_full_name(table: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Train, table)
    assert words in str(caught.value)


def test_a_setting_without_default_must_be_given() -> None:
    with pytest.raises(ConfigError, match="folder is missing"):
        build(Source, {"limit": 3})
    assert build(Source, {"folder": "pairs"}) == Source(folder=Path("pairs"))


def test_integers_pass_as_floats_and_become_floats() -> None:
    lr = build(Optim, {"lr": 1}).lr
    assert (lr, type(lr)) == (1.0, float)


def test_of_two_allowed_types_the_exact_one_is_kept() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Either:
        size: float | int = 0
        place: Path | str | None = None

    either = build(Either, {"size": 3, "place": "here"})
    assert (type(either.size), type(either.place)) == (int, str)


def test_overrides_win_over_the_file_and_the_last_one_over_the_first(tmp_path: Path) -> None:
    path = written(tmp_path, "[train]\nsteps = 5\nprompt = 'kept'\n[train.optim]\nlr = 1e-3\n")
    run = read(Run, path, ["train.optim.lr=2", "train.steps=7", "train.steps=8", "train.out=a folder/x"])
    assert run.train == Train(steps=8, prompt="kept", out=Path("a folder/x"), optim=Optim(lr=2.0))


@pytest.mark.parametrize("text", ["red, blue", "#fff", "", "a=b", 'say "hi"', "1\nsteps = 2"])
def test_an_override_that_is_no_toml_value_is_taken_as_it_stands(text: str) -> None:
    assert read(Train, None, [f"prompt={text}"]).prompt == text


@pytest.mark.parametrize("text", ["2024", "1.50", "true", "2024-11-28"])
def test_an_override_needs_no_quotes_where_a_string_is_expected(text: str) -> None:
    run = read(Run, None, [f"train.prompt={text}", f"train.out= {text}", "train.seed=7", "train.optim.lr=1"])
    assert (run.train.prompt, run.train.out, run.train.seed, run.train.optim.lr) == (text, Path(text), 7, 1.0)
    with pytest.raises(ConfigError, match=r"setting train.steps is .*; expected a whole number"):
        read(Run, None, [f"train.steps={text}x"])
    with pytest.raises(ConfigError, match=r"setting train.steps is 1.5; expected a whole number"):
        read(Run, None, ["train.steps=1.5"])
    with pytest.raises(ConfigError, match=r"setting train.seed is \{'x': 3\}; expected"):
        read(Run, None, ["train.seed.x=3"])


@pytest.mark.parametrize("override", ["steps", "=3", "steps.more=3"])
def test_an_override_of_the_wrong_form_is_rejected(override: str) -> None:
    with pytest.raises(ConfigError, match="override '"):
        read(Train, None, ["steps=1", override])


@pytest.mark.parametrize("content", [b"steps = ", b"\xff\xfe", b"steps = 1\nsteps = 2"])
def test_a_file_that_is_no_toml_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not valid TOML"):
        read(Train, path)


def test_a_path_that_is_no_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read(Train, tmp_path / "missing.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(Train, tmp_path)


@pytest.mark.parametrize(
    "train",
    [
        Train(),
        Train(steps=-3, ema=True, out=Path("runs") / 'a "b"\\c', seed="07"),
        Train(prompt="quote \" apostrophe ' backslash \\ \\u0041 hash # [table] ="),
        Train(prompt="".join(map(chr, range(0x20))) + "\x7f\x80\x85\u2028"),
        Train(prompt="\r\n line ends \r and \n"),
        Train(prompt="日本語 é 🐴 \U0010ffff"),
        Train(prompts=("one", "", 'two "2"', "true", "1e-5")),
        Train(optim=Optim(lr=1e-300, name="sgd", betas=(0.1, float("inf")))),
        Train(optim=Optim(lr=1e22, betas=(-0.0, 0.1 + 0.2))),
    ],
)
def test_what_is_saved_is_read_back_equal(tmp_path: Path, train: Train) -> None:
    path = tmp_path / "resolved.toml"
    save(Run(train=train), path)
    assert repr(read(Run, path)) == repr(Run(train=train))  # repr tells -0.0 from 0.0 and 1 from True


def test_text_that_toml_cannot_hold_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.out is .* not valid Unicode"):
        save(Run(train=Train(out=Path("\udcff"))), tmp_path / "resolved.toml")
    assert list(tmp_path.iterdir()) == []


def test_a_none_that_would_be_read_back_as_something_else_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="steps"):
        dump(Train(steps=None))


def test_a_file_may_begin_as_some_editors_begin_it(tmp_path: Path) -> None:
    assert read(Train, written(tmp_path, "\ufeffsteps = 7\n"), []).steps == 7
