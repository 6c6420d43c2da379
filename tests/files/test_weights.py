"""A control survives the disk, in both directions between Bridle and diffusers, and damage is named."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from bridle.control.unet import Control
from bridle.errors import FileError
from bridle.files.weights import CONFIG, WEIGHTS, load_control, read_metadata, save_control


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
        (lambda folder: (folder / WEIGHTS).unlink(), [f"has no {WEIGHTS}", "expected a control folder"]),
        (lambda folder: (folder / CONFIG).write_text("{"), [CONFIG, "is damaged", "copy the control again"]),
        (lambda folder: (folder / CONFIG).write_text("[]"), [CONFIG, "is damaged", "copy the control again"]),
        (lambda folder: change_config(folder, _class_name="UNet2DModel"), ["UNet2DModel; expected a ControlNetModel"]),
        (lambda folder: change_config(folder, block_out_channels=[32]), [CONFIG, "is damaged", "copy the control"]),
        (lambda folder: change_config(folder, cross_attention_dim=64), ["attn2", "has shape", "from one save"]),
        (cut_short, [WEIGHTS, "is damaged", "copy the control again"]),
        (change_metadata, [WEIGHTS, "is damaged", "copy the control again"]),
        (change_shape, ["conv_in.weight", "[32, 4, 5, 5]", "[32, 4, 3, 3]", "from one save"]),
        (drop_weight, ["1 missing ['conv_in.weight'], 0 unknown", "from one save"]),
    ],
)
def test_a_damaged_control_is_named_with_its_remedy(damage: Any, said: list[str], tmp_path: Path) -> None:
    save_control(make(), tmp_path)
    damage(tmp_path)
    with pytest.raises(FileError) as raised:
        load_control(tmp_path)
    assert [part for part in [str(tmp_path), *said] if part not in str(raised.value)] == []
    assert "\n" not in str(raised.value)
