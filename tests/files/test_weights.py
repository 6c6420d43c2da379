"""A control survives the disk, in both directions between Bridle and diffusers, and damage is named."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.errors import FileError
from bridle.files.weights import CONFIG, WEIGHTS, load_control, read_metadata, save_control
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings


def make(seed: int = 3, **options: Any) -> Control:
    return tiny.wake(Control.from_base(tiny.make_unet(), **options), seed)


def same(left: Control, right: Control, channels: int = 3) -> bool:
    with torch.no_grad():
        ours, theirs = left(*tiny.make_inputs(2, channels)), right(*tiny.make_inputs(2, channels))
    assert ours.mid.any()
    return all(torch.equal(a, b) for a, b in zip(ours.links, theirs.links, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"hint_channels": 1}, {"hint_channels": 6}, {"hint_encoder": "paper"}, {"links": "middle"}],
    ids=["official", "one channel", "six channels", "paper", "middle"],
)
def test_a_saved_control_comes_back_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    control = make(**options)
    save_control(control, tmp_path, {"annotator": "canny", "links": "a lie"})
    back = load_control(tmp_path)
    assert {**back.state_dict()}.keys() == control.state_dict().keys()
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in control.state_dict().items())
    assert (back.links, back.hint_encoder, back.size_factor) == (control.links, control.hint_encoder, 8)
    assert same(control, back, control.hint_channels)
    assert all(parameter.requires_grad for parameter in back.parameters())
    assert read_metadata(tmp_path)["annotator"] == "canny"


def test_a_control_comes_to_the_device_that_auto_means_for_a_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_control(make(), tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_control(tmp_path, device="auto").device.type == "cpu"


def test_another_number_of_pixels_per_latent_survives(tmp_path: Path) -> None:
    save_control(make(hint_encoder="paper", size_factor=4), tmp_path)
    assert load_control(tmp_path).size_factor == 4


def test_saving_again_gives_the_same_control(tmp_path: Path) -> None:
    save_control(make(links="middle"), tmp_path / "a", {"steps": 7})
    save_control(load_control(tmp_path / "a"), tmp_path / "b", read_metadata(tmp_path / "a"))
    first, second = (json.loads((tmp_path / name / CONFIG).read_text()) for name in "ab")
    assert first.items() <= second.items()  # diffusers adds its defaults
    assert read_metadata(tmp_path / "a") == read_metadata(tmp_path / "b")
    assert same(load_control(tmp_path / "a"), load_control(tmp_path / "b"))


@pytest.mark.parametrize("channels", [1, 3])
def test_diffusers_loads_what_bridle_saved(channels: int, tmp_path: Path) -> None:
    control = make(hint_channels=channels)
    save_control(control, tmp_path)
    net, info = ControlNetModel.from_pretrained(tmp_path, output_loading_info=True, low_cpu_mem_usage=False)
    assert {name: list(found) for name, found in info.items() if found} == {}
    with torch.no_grad():
        ours, theirs = control(*tiny.make_inputs(2, channels)), net(*tiny.make_inputs(2, channels))
    links = (*theirs.down_block_res_samples, theirs.mid_block_res_sample)
    assert [torch.equal(a, b) for a, b in zip(ours.links, links, strict=True)] == [True] * 13


def test_bridle_loads_what_diffusers_saved(tmp_path: Path) -> None:
    control = make()
    net = ControlNetModel.from_unet(tiny.make_unet())
    net.load_state_dict(control.state_dict())
    net.save_pretrained(tmp_path)
    back = load_control(tmp_path)
    assert same(control, back)
    assert (back.links, back.hint_encoder, back.size_factor) == ("all", "official", 8)


def test_settings_that_an_old_file_leaves_out_are_the_defaults(tmp_path: Path) -> None:
    control = make()
    save_control(control, tmp_path)
    change_config(tmp_path, conditioning_embedding_out_channels=None, conditioning_channels=None)
    assert same(control, load_control(tmp_path))


def change_config(folder: Path, **changes: Any) -> None:
    """None removes a setting."""
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def cut_short(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def change_shape(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({**weights, "conv_in.weight": torch.zeros(32, 4, 5, 5)}, folder / WEIGHTS)


def drop_weight(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    save_file({name: value for name, value in weights.items() if name != "conv_in.weight"}, folder / WEIGHTS)


def change_metadata(folder: Path) -> None:
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"bridle": "{"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / CONFIG).unlink(), ["has no config.json", "expected a control folder"]),
        (lambda folder: (folder / WEIGHTS).unlink(), [f"has no {WEIGHTS}", "expected a diffusers folder"]),
        (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "is damaged", "copy it again"]),
        (lambda folder: (folder / CONFIG).write_text("[]"), [CONFIG, "is damaged", "copy it again"]),
        (
            lambda folder: change_config(folder, _class_name="UNet2DModel"),
            ["nothing that Bridle knows", "give a control"],
        ),
        (lambda folder: change_config(folder, block_out_channels=[32]), ["is damaged", "1 widths for"]),
        (lambda folder: change_config(folder, cross_attention_dim=64), ["attn2", "has shape"]),
        (cut_short, [WEIGHTS, "is damaged", "copy it again"]),
        (change_metadata, [WEIGHTS, "is damaged", "copy it again"]),
        (change_shape, ["conv_in.weight", "[32, 4, 5, 5]", "[32, 4, 3, 3]"]),
        (drop_weight, ["1 missing ['conv_in.weight'], 0 unknown", "take another copy"]),
    ],
)
def test_a_damaged_control_is_named_with_its_remedy(damage: Any, said: list[str], tmp_path: Path) -> None:
    save_control(make(), tmp_path)
    damage(tmp_path)
    with pytest.raises(FileError) as raised:
        load_control(tmp_path)
    assert [part for part in [str(tmp_path), *said] if part not in str(raised.value)] == []
    assert "\n" not in str(raised.value)


def unlocked(seed: int = 3) -> Control:
    """A control that was trained with the decoder unlocked; everything in it depends on the seed."""
    control, generator = make(seed), torch.Generator().manual_seed(seed)
    trained = [(name, value) for name, value in tiny.make_unet().named_parameters() if name.startswith("up_blocks.3")]
    control.base_delta = {name: torch.randn(value.shape, generator=generator) * 0.05 for name, value in trained}
    return control


def equal(left: Control, right: Control) -> bool:
    ours, theirs = ({**one.state_dict(), **one.base_delta} for one in (left, right))
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def deltas(folder: Path) -> list[Path]:
    return sorted(folder.glob("base_delta*"))


def test_what_changed_in_the_base_comes_back_and_draws_as_the_trained_base_did(tmp_path: Path) -> None:
    control, base, trained = unlocked(), tiny.make_base(), tiny.make_unet()
    before = {name: value.clone() for name, value in base.denoiser.state_dict().items()}
    for name, change in control.base_delta.items():
        trained.get_parameter(name).data += change
    given = [tiny.make_hint()], ["a red apple"], [7], SampleSettings(steps=2)
    expected = generate(Base(tiny.make_pipeline(trained)), make(), *given)
    save_control(control, tmp_path, {"base": "embedded", "unlock": "decoder", "steps": 9})
    back = load_control(tmp_path, dtype=torch.float32)
    assert equal(back, control)
    assert np.array_equal(generate(base, back, *given), expected)
    assert not np.array_equal(generate(base, make(), *given), expected)
    assert all(torch.equal(value, before[name]) for name, value in base.denoiser.state_dict().items())
    [path] = deltas(tmp_path)
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["bridle"]) == {"base": "embedded", "unlock": "decoder"}


def test_diffusers_and_a_later_save_without_a_change_of_the_base_pass_it_over(tmp_path: Path) -> None:
    control = unlocked()
    save_control(control, tmp_path)
    net = ControlNetModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert all(torch.equal(value, control.state_dict()[name]) for name, value in net.state_dict().items())
    (tmp_path / "base_delta-mine.safetensors").touch()
    save_control(make(), tmp_path, read_metadata(tmp_path))
    assert load_control(tmp_path).base_delta == {}
    assert deltas(tmp_path) == [tmp_path / "base_delta-mine.safetensors"]


class Killed(BaseException):
    """Not what anything would catch."""


def kill_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    """Before that change of the folder. Renames and removals count: what is written before them has no name to read."""
    changes = count()

    def dying(change: Callable[..., None]) -> Callable[..., None]:
        def change_or_die(*given: Any, **options: Any) -> None:
            if next(changes) == moment:
                raise Killed
            change(*given, **options)

        return change_or_die

    patch.setattr(os, "replace", dying(os.replace))
    patch.setattr(Path, "unlink", dying(Path.unlink))


@pytest.mark.parametrize(("old", "new", "changes"), [(unlocked, unlocked, 7), (unlocked, make, 5), (make, unlocked, 6)])
def test_a_save_killed_at_any_moment_leaves_the_old_control_or_the_new_one(
    old: Callable[[int], Control], new: Callable[[int], Control], changes: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of no matter to a process that is killed
    before, after = old(3), new(4)
    save_control(before, tmp_path / "before")
    newer = []
    for moment in range(changes + 1):
        folder = Path(shutil.copytree(tmp_path / "before", tmp_path / str(moment)))
        with monkeypatch.context() as patch, pytest.raises(Killed) if moment < changes else nullcontext():
            kill_at(moment, patch)
            save_control(after, folder)
        found = load_control(folder)
        newer.append(equal(found, after))
        assert newer[-1] or equal(found, before)
    assert (newer[0], newer[-1]) == (False, True)
    assert len(deltas(folder)) == bool(after.base_delta)
    save_control(after, tmp_path / "1")
    assert len(deltas(tmp_path / "1")) == bool(after.base_delta)  # the next save tidies


def swap_deltas(folder: Path) -> None:
    [path] = deltas(folder)
    save_control(unlocked(4), folder / "other")
    deltas(folder / "other")[0].replace(path)


def name_delta(name: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        facts = read_metadata(folder) | {"base_delta": name}
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, {"bridle": json.dumps(facts)})

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: deltas(folder)[0].unlink(), ["has no base_delta-", "copy the whole folder"]),
        (lambda folder: deltas(folder)[0].write_bytes(b"{"), ["base_delta-", "is damaged", "copy it again"]),
        (swap_deltas, ["is not the base delta that", "was saved with", "copy the whole folder again"]),
        (name_delta("../base_delta-0123456789abcdef.safetensors"), [WEIGHTS, "is damaged", "copy it again"]),
        (name_delta(None), [WEIGHTS, "is damaged", "None", "copy it again"]),
    ],
    ids=["missing", "cut short", "of another save", "elsewhere", "no name"],
)
def test_weights_never_go_with_another_change_of_the_base(damage: Any, said: list[str], tmp_path: Path) -> None:
    save_control(unlocked(), tmp_path)
    damage(tmp_path)
    with pytest.raises(FileError) as raised:
        load_control(tmp_path)
    assert [part for part in [str(tmp_path), *said] if part not in str(raised.value)] == []


def test_what_a_killed_save_began_goes_with_the_next_one(tmp_path: Path) -> None:
    control = Control.from_base(tiny.make_unet())
    save_control(control, tmp_path)
    (tmp_path / f".{WEIGHTS}.abc123.safetensors").write_bytes(b"half")
    (tmp_path / ".mine").write_text("stays")
    save_control(control, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "config.json", WEIGHTS]
