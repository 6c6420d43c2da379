"""A run: one call makes everything, the same call adds nothing, a longer one goes on, another one is refused."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image
from rich.console import Console
from small_run import HELD_OUT, PAIRS, STEPS, Done

from bridle.cache.store import Cache
from bridle.control.settings import ControlSettings
from bridle.control.unet import UNetControl
from bridle.errors import DataError, TrainError
from bridle.files.weights import load_control, read_metadata
from bridle.lock import holding
from bridle.run import RunSettings, evaluate_run, read_run, train_run
from bridle.run.settings import check_run, open_run
from bridle.run.training import alone_in, facts
from bridle.train.checkpoint import newest, newest_precision, read_facts
from bridle.train.log import read_rows
from bridle.train.settings import MachineSettings
from bridle.train.trainer import Trainer


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy_of(done: Done, folder: Path) -> Path:
    return Path(shutil.copytree(done.run.folder, folder / "run"))


def test_a_run_leaves_its_settings_cache_checkpoint_metrics_previews_and_control(done: Done) -> None:
    folder = done.run.folder
    assert (done.run.outcome.step, done.run.outcome.finished) == (STEPS, True)
    assert read_run(folder) == done.settings
    cache = Cache.open(folder / "cache")
    assert (len(cache.train_ids), len(cache.held_out_ids)) == (PAIRS - HELD_OUT, HELD_OUT)
    assert read_facts(newest(folder / "checkpoints"))["step"] == STEPS
    probes = read_rows(folder / "probes.jsonl")
    assert [row["step"] for row in probes] == [0, STEPS]
    assert probes[0]["controllability"]["gain"]["mean"] == 0.0  # an untrained control changes nothing
    assert [row["step"] for row in read_rows(folder / "metrics.jsonl")] == [2, 4]
    assert [path.name for path in (folder / "previews").iterdir()] == [f"step-{STEPS:08}.png"]
    with Image.open(folder / "previews" / f"step-{STEPS:08}.png") as sheet:
        assert sheet.width > sheet.height > 0
    facts = read_metadata(folder / "control")
    assert facts["steps"] == STEPS
    assert (facts["hint"], facts["pairs"], facts["links"]) == ("canny", PAIRS - HELD_OUT, "all")


def test_the_saved_control_is_the_averaged_one_and_diffusers_loads_the_same_weights(done: Done) -> None:
    ours = load_control(done.run.folder / "control").state_dict()
    averaged = done.run.outcome.control.state_dict()
    theirs = ControlNetModel.from_pretrained(done.run.folder / "control", low_cpu_mem_usage=False).state_dict()
    assert ours.keys() == averaged.keys() == theirs.keys()
    assert all(torch.equal(ours[name], averaged[name]) and torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(ours[f"controlnet_down_blocks.{link}.weight"].any() for link in range(12))  # it has learned something


def test_nothing_but_results_goes_to_stdout(done: Done) -> None:
    assert done.stdout == ""


def test_the_same_call_again_trains_no_step_and_changes_no_file(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "step", lambda self, step, *_: pytest.fail(f"step {step} was trained again"))
    folder = copy_of(done, tmp_path)
    before = snapshot(folder)
    outcome = train_run(done.settings, folder).outcome
    assert (outcome.step, outcome.finished) == (STEPS, True)
    assert snapshot(folder) == before


def test_a_new_control_s_hint_encoder_lets_hints_through_unless_the_recipe_is_the_paper_s(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class EnoughError(Exception):
        pass

    def deviation(recipe: Literal["scaled", "paper"]) -> float:
        """Of what leaves the last layer but one, from place to place, when training is to begin."""
        seen: list[torch.Tensor] = []

        def look(
            control: UNetControl, denoiser: object, schedule: object, cache: Cache, *_: object, **__: object
        ) -> None:
            last = control.controlnet_cond_embedding.conv_out
            last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
            with torch.no_grad():
                control.encode(cache.batch(cache.train_ids).hint)
            raise EnoughError

        monkeypatch.setattr("bridle.run.training.train", look)
        folder = tmp_path / recipe
        shutil.copytree(done.run.folder / "cache", folder / "cache")
        with pytest.raises(EnoughError):
            train_run(replace(done.settings, train=replace(done.settings.train, recipe=recipe)), folder)
        return seen[0].std((0, 2, 3)).mean().item()

    assert deviation("paper") < 0.05 < 0.3 < deviation("scaled")


def test_more_steps_go_on_and_end_where_one_longer_run_ends(
    done: Done, longer: Callable[[int], RunSettings], tmp_path: Path
) -> None:
    continued, straight = copy_of(done, tmp_path), tmp_path / "straight"
    shutil.copytree(done.run.folder / "cache", straight / "cache")  # saves encoding it again
    for folder in (continued, straight):
        assert train_run(longer(STEPS + 2), folder).outcome.step == STEPS + 2
    first, second = (load_control(folder / "control").state_dict() for folder in (continued, straight))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["step"] for row in read_rows(continued / "metrics.jsonl")] == [2, 4, 6]
    assert read_run(continued).train.steps == STEPS + 2


@pytest.mark.parametrize("emptied", [False, True])
def test_a_run_without_its_checkpoints_is_not_begun_anew_over_its_control_unless_forced(
    done: Done, tmp_path: Path, emptied: bool
) -> None:
    folder = copy_of(done, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    if emptied:
        (folder / "checkpoints").mkdir()
    before = snapshot(folder)
    with pytest.raises(TrainError, match=r"control of an earlier run, but none of its checkpoints.*--out, or --force"):
        train_run(done.settings, folder)
    assert snapshot(folder) == before
    assert train_run(done.settings, folder, force=True).outcome.step == STEPS
    assert newest(folder / "checkpoints")


def test_a_run_killed_between_its_first_control_and_its_first_checkpoint_begins_again(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("bridle.train.checkpoint.save", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            train_run(done.settings, tmp_path)
    assert (tmp_path / "control").exists()
    check_run(tmp_path, done.settings)


def test_a_run_that_goes_on_says_from_where(done: Done, longer: Callable[[int], RunSettings], tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path)
    for steps, said in ((STEPS, False), (STEPS + 1, True)):
        console = Console(file=StringIO())
        train_run(longer(steps), folder, console)
        assert (f"going on from step {STEPS}" in console.file.getvalue()) == said  # ty: ignore[unresolved-attribute]


def with_lr(settings: RunSettings) -> RunSettings:
    return replace(settings, train=replace(settings.train, lr=5e-4))


def with_size(settings: RunSettings) -> RunSettings:
    return replace(settings, data=replace(settings.data, size_px=128))


def with_encoder(settings: RunSettings) -> RunSettings:
    return replace(settings, control=ControlSettings(hint_encoder="paper"))


def with_base(settings: RunSettings) -> RunSettings:
    return replace(settings, base="embedded")


def with_precision(settings: RunSettings, precision: Any) -> RunSettings:
    return replace(settings, train=replace(settings.train, precision=precision))


def test_a_run_goes_on_in_the_precision_that_it_began_with(done: Done, tmp_path: Path) -> None:
    """Whichever of the two calls said so, and whatever is faster here."""
    folder, auto = copy_of(done, tmp_path), with_precision(done.settings, "auto")
    for settings in (auto, done.settings):
        train_run(replace(settings, train=replace(settings.train, steps=STEPS + 1)), folder)
    assert newest_precision(folder / "checkpoints") == "fp32"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (with_lr, "train.lr was 0.001, is 0.0005"),
        (with_size, "data.size_px was 64, is 128"),
        (with_encoder, "control.hint_encoder was official, is paper"),
        (with_base, "is embedded"),
        (partial(with_precision, precision="bf16"), "train.precision was fp32, is bf16"),
    ],
)
def test_a_run_that_began_otherwise_is_refused_and_left_as_it_was(
    done: Done, change: Callable[[RunSettings], RunSettings], named: str
) -> None:
    before = snapshot(done.run.folder)
    with pytest.raises(TrainError, match=named):
        train_run(change(done.settings), done.run.folder)
    assert snapshot(done.run.folder) == before


def unlocked(settings: RunSettings) -> RunSettings:
    large = replace(settings.train, regime="large", unlock_after=1, unlock_lr=1e-3)
    return replace(settings, train=replace(large, steps=STEPS + 1))


def test_what_even_force_cannot_do_is_refused_and_leaves_the_run_as_it_was(done: Done, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path)
    before = snapshot(folder)
    with pytest.raises(TrainError, match="the control was made otherwise"):
        train_run(with_encoder(done.settings), folder, force=True)
    assert snapshot(folder) == before
    train_run(unlocked(done.settings), folder)
    before = snapshot(folder)
    with pytest.raises(TrainError, match=r"it has trained .* of the base's weights, and would go on with 0"):
        train_run(done.settings, folder, force=True)
    assert snapshot(folder) == before


def test_the_small_regime_trains_the_middle_link_and_then_all_of_them(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.run.folder / "cache", tmp_path / "cache")
    small = replace(done.settings.train, regime="small", reconnect=STEPS - 1, checkpoint_every=STEPS - 2)
    train_run(replace(done.settings, train=replace(small, steps=STEPS - 2)), tmp_path)
    before = load_control(tmp_path / "control")
    assert before.links == "middle"
    assert before.controlnet_mid_block.weight.any()
    assert not any(conv.weight.any() for conv in before.controlnet_down_blocks)
    train_run(replace(done.settings, train=small), tmp_path)
    after = load_control(tmp_path / "control")
    assert after.links == "all"
    assert all(conv.weight.any() for conv in after.controlnet_down_blocks)


def test_an_unlocked_base_travels_with_the_control(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.run.folder / "cache", tmp_path / "cache")
    large = replace(done.settings.train, regime="large", unlock_after=1, unlock_lr=1e-3, warmup=0)
    run = train_run(replace(done.settings, train=large), tmp_path)
    control = load_control(tmp_path / "control")
    assert control.base_delta
    assert control.base_delta.keys() == run.outcome.control.base_delta.keys()
    assert all(
        torch.equal(control.base_delta[name], run.outcome.control.base_delta[name]) for name in control.base_delta
    )
    assert all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in control.base_delta)
    assert read_metadata(tmp_path / "control")["unlock"] == "decoder"
    never = replace(done.settings, train=replace(large, unlock_after=STEPS + 1))
    assert facts(never, run.base, run.data, done.run.outcome.control, STEPS)["unlock"] == "nothing"


def test_what_is_not_needed_may_wait_elsewhere(done: Done, tmp_path: Path) -> None:
    shutil.copytree(done.run.folder / "cache", tmp_path / "cache")
    run = train_run(replace(done.settings, machine=MachineSettings(offload=True, workers=1)), tmp_path)
    ours, theirs = run.outcome.control.state_dict(), done.run.outcome.control.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(list((tmp_path / "previews").iterdir())) == 1


def test_force_goes_on_with_a_run_that_began_otherwise(done: Done, tmp_path: Path) -> None:
    folder, changed = copy_of(done, tmp_path), with_lr(done.settings)
    changed = replace(changed, train=replace(changed.train, steps=STEPS + 1))
    assert train_run(changed, folder, force=True).outcome.step == STEPS + 1
    assert "train.lr was 0.001, is 0.0005" in (folder / "events.jsonl").read_text()
    assert read_run(folder) == changed


def test_a_run_without_a_checkpoint_may_begin_anew_under_other_settings(done: Done, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path)
    for written in ("checkpoints", "control"):  # without the latter alone it is refused: there is something to lose
        shutil.rmtree(folder / written)
    assert train_run(with_lr(done.settings), folder).outcome.step == STEPS
    assert read_run(folder) == with_lr(done.settings)


def test_two_trainings_do_not_write_to_one_folder(done: Done, tmp_path: Path) -> None:
    folder = copy_of(done, tmp_path)
    before, longer = snapshot(folder), replace(done.settings, train=replace(done.settings.train, steps=STEPS + 1))
    said = r"another training writes to .*run; wait for its end, or give .* another --out"
    with holding(folder / ".lock", wait=False), pytest.raises(TrainError, match=said):
        train_run(longer, folder)
    assert snapshot(folder) == before
    assert train_run(longer, folder).outcome.step == STEPS + 1


def test_a_training_that_is_refused_leaves_the_folder_of_the_one_that_runs(tmp_path: Path) -> None:
    """Also where that has not written anything yet; and one that comes to nothing leaves none behind."""
    folder = tmp_path / "runs" / "edges"
    with holding(folder / ".lock", wait=False):
        with pytest.raises(TrainError, match="another training"), alone_in(folder):
            pass
        assert folder.exists()
    shutil.rmtree(tmp_path / "runs")
    with pytest.raises(DataError), alone_in(folder):
        raise DataError("no pairs")
    assert not list(tmp_path.iterdir())


def without_a_picture(done: Done, folder: Path, of: str) -> RunSettings:
    """Settings for the same data set without its first training or held-out pair."""
    data = Path(shutil.copytree(done.settings.data.folder, folder / "pictures"))
    cache = Cache.open(done.run.folder / "cache")
    (data / (cache.train_ids if of == "train" else cache.held_out_ids)[0].rpartition("#")[0]).unlink()
    return replace(done.settings, data=replace(done.settings.data, folder=data))


@pytest.mark.parametrize("of", ["train", "held out"])
def test_other_data_is_refused_before_the_runs_cache_is_touched(done: Done, tmp_path: Path, of: str) -> None:
    """Or held-out pairs would be chosen anew, among those that were trained on."""
    folder, other = copy_of(done, tmp_path), without_a_picture(done, tmp_path, of)
    before = snapshot(folder)
    with pytest.raises(DataError, match=r"data is not what this run was trained on \(changed: pictures.*start a run"):
        train_run(other, folder)
    open_run(folder, other)
    with pytest.raises(DataError, match="data is not what this run was trained on"):
        evaluate_run(folder)
    open_run(folder, done.settings)
    after = snapshot(folder)
    for hashes in (before, after):
        hashes.pop("cache/stamps.json")  # what files were read last
    assert after == before
    assert train_run(done.settings, folder).outcome.finished
    assert train_run(other, folder, force=True).outcome.finished
