"""Between all formats without the loss of a bit, each read by somebody else's reader, with the metadata kept."""

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import made
import pytest
import tiny
import torch
from diffusers import ControlNetModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridle.errors import FileError
from bridle.files.architecture import from_config
from bridle.files.convert import Converted, convert, hash_file
from bridle.files.difference import join, split
from bridle.files.layout import layout
from bridle.files.read import read_control
from bridle.files.tensors import CONFIG, WEIGHTS
from bridle.files.weights import delta_name, save_delta

NET = made.make_net()
OURS, OFFICIAL = made.weights_of(NET), made.official_of(NET)
UNET = tiny.make_unet()
LINEAR = {"use_linear_projection": True, "block_out_channels": (64, 64, 128, 128), "attention_head_dim": (1, 1, 2, 2)}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return made.write_folder(
        tmp_path / "control", NET, made.FACTS, **{"modelspec.license": "CC0", "modelspec.hash_sha256": "1"}
    )


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return made.write_base(tmp_path / "base.safetensors", UNET)


def to(target: str, source: Path, base: Path, name: str = "out") -> Path:
    """In a format, whatever it needs; `official+base` is one as well."""
    out = source.parent / name if target == "diffusers" else source.parent / f"{name}.safetensors"
    needs_base = "difference" in target or "base" in target or "difference" in source.name
    convert(source, out, target.partition("+")[0], base=str(base) if needs_base else None)
    return out


FORMATS = ("diffusers", "official", "official+base", "comfyui", "difference")


@pytest.mark.parametrize(("first", "second"), [*permutations(FORMATS, 2), ("diffusers", "diffusers")])
def test_there_and_back_is_the_same_control(first: str, second: str, source: Path, base: Path) -> None:
    there = to(first, source, base, f"1 {first}")
    back = to("diffusers", to(second, there, base, f"2 {second}"), base, "back")
    assert made.same(made.load(back), OURS)
    assert from_config(json.loads((back / CONFIG).read_text()), back) == from_config(NET.config, back)
    assert json.loads((back / CONFIG).read_text())["attention_head_dim"] == NET.config.attention_head_dim
    _, _, facts = read_control(back)
    assert made.FACTS.items() <= facts.items()


@pytest.mark.parametrize("target", FORMATS)
def test_the_names_are_the_formats_own_and_no_others(target: str, source: Path, base: Path) -> None:
    found = made.load(to(target, source, base))
    prefixed = {f"control_model.{name}": value for name, value in OFFICIAL.items()}
    if target == "difference":
        found = {name: value for name, value in found.items() if not name.startswith("bridle_rest.")}
        assert found.keys() == prefixed.keys() | {"difference"}
        return
    expected = {
        "diffusers": OURS,
        "official": prefixed,
        "official+base": prefixed | load_file(base),
        "comfyui": OFFICIAL,
    }
    assert made.same(found, expected[target])


@pytest.mark.parametrize("target", ["official", "comfyui", "diffusers"])
@pytest.mark.parametrize("changes", [{}, LINEAR], ids=["convolutions", "linear"])
def test_diffusers_reads_it(target: str, changes: dict[str, Any], tmp_path: Path) -> None:
    net = made.make_net(**changes)
    source = made.write_folder(tmp_path / "control", net)
    out = to(target, source, tmp_path)
    if target == "diffusers":
        read = ControlNetModel.from_pretrained(out, low_cpu_mem_usage=False)
    else:
        read = ControlNetModel.from_single_file(str(out), config=str(source), low_cpu_mem_usage=False)
    assert made.same(made.weights_of(read), made.weights_of(net))
    inputs = tiny.make_inputs(hint_channels=1)
    with torch.no_grad():
        assert torch.equal(read(*inputs).mid_block_res_sample, net.eval()(*inputs).mid_block_res_sample)


def test_metadata_goes_along_in_every_format(source: Path, base: Path) -> None:
    digest = hash_file(source / WEIGHTS)
    for target in FORMATS:
        out = to(target, source, base, target)
        with safe_open(out / WEIGHTS if out.is_dir() else out, framework="pt") as file:
            header = file.metadata()
        facts = json.loads(header["bridle"])
        assert made.FACTS.items() <= facts.items()
        assert facts["source"] == {WEIGHTS: digest}
        assert header["modelspec.license"] == "CC0"
        assert "modelspec.hash_sha256" not in header  # that of another file


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", FORMATS)
def test_another_type_is_the_weights_rounded_once(dtype: str, target: str, source: Path, base: Path) -> None:
    out = source.parent / ("out" if target == "diffusers" else "out.safetensors")
    given = str(base) if "+" in target or target == "difference" else None
    convert(source, out, target.partition("+")[0], base=given, dtype=dtype)
    state = UNET.state_dict() if target == "difference" else None
    rounded = {name: value.to(getattr(torch, dtype)) for name, value in OURS.items()}
    assert made.same(read_control(out, state)[1], rounded)


def hard_cases(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs whose difference rounds: of very different sizes, close together, opposite, zero."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-7, 3, (2, 40_000), generator=generator)
    control, base = torch.randn(2, 40_000, generator=generator) * sizes
    near = control * (1 + torch.randn(40_000, generator=generator) / 100)
    return torch.cat([control, control, control, control * 0]).to(dtype), torch.cat([base, near, -control, base])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_difference_and_its_rest_lead_back_bit_for_bit(dtype: torch.dtype) -> None:
    control, base = hard_cases(dtype)
    difference, at, by = split(control, base)
    assert torch.equal(join(difference, base, at, by), control)
    assert not torch.equal(join(difference, base, at[:0], by[:0]), control)  # or no rest would be needed
    assert len(at) < len(control) / 2
    assert difference.dtype == dtype


@pytest.mark.parametrize("where", ["file", "unet folder", "pipeline", "state"])
def test_a_difference_is_read_with_its_base_in_any_form(where: str, source: Path, base: Path, tmp_path: Path) -> None:
    out = to("difference", source, base)
    UNET.save_pretrained(tmp_path / "sd" / "unet")
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    if where == "state":
        assert made.same(read_control(out, UNET.state_dict())[1], OURS)
        return
    given = {"file": base, "unet folder": tmp_path / "sd" / "unet", "pipeline": tmp_path / "sd"}[where]
    convert(out, tmp_path / "back", "diffusers", base=str(given))
    assert made.same(made.load(tmp_path / "back"), OURS)


def test_other_tools_add_the_base_and_get_the_control_but_for_rounding(source: Path, base: Path) -> None:
    found, whole = load_file(to("difference", source, base)), load_file(base)
    for name, value in OFFICIAL.items():
        theirs = found[f"control_model.{name}"] + whole.get(f"model.diffusion_model.{name}", torch.zeros(1))
        assert torch.allclose(theirs, value, rtol=0, atol=1e-6), name


def test_a_difference_without_a_rest_is_read_too(source: Path, base: Path, tmp_path: Path) -> None:
    found = load_file(to("difference", source, base))
    path = tmp_path / "webui.safetensors"
    header = {"bridle": json.dumps({"config": json.loads((source / CONFIG).read_text())})}
    save_file({name: value for name, value in found.items() if not name.startswith("bridle_rest.")}, path, header)
    back = read_control(path, UNET.state_dict())[1]
    assert all(torch.allclose(value, OURS[name], rtol=0, atol=1e-6) for name, value in back.items())


def with_delta(source: Path) -> dict[str, Tensor]:
    """What training changed in the base, beside the control and named in its metadata."""
    delta = {"up_blocks.1.resnets.0.conv1.weight": torch.randn_like(UNET.up_blocks[1].resnets[0].conv1.weight)}
    delta["up_blocks.2.upsamplers.0.conv.bias"] = torch.randn_like(UNET.up_blocks[2].upsamplers[0].conv.bias)
    made.write_folder(source, NET, made.FACTS | {"base_delta": save_delta(delta, source, {})})
    return delta


def test_what_changed_in_the_base_goes_along_in_a_folder(source: Path, tmp_path: Path) -> None:
    delta = with_delta(source)
    done = convert(source, tmp_path / "out", "diffusers")
    assert read_control(tmp_path / "out")[2]["base_delta"] == delta_name(delta)
    assert made.same(load_file(tmp_path / "out" / delta_name(delta)), delta)
    assert done.notes == []


def test_what_changed_in_the_base_is_put_into_a_base_that_is_written(source: Path, base: Path) -> None:
    delta = with_delta(source)
    shape = from_config(NET.config, source)
    expected = load_file(base)
    for name, change in delta.items():
        expected[f"model.diffusion_model.{shape.official(name)}"] += change
    found = load_file(to("official+base", source, base))
    assert made.same({name: value for name, value in found.items() if not name.startswith("control_model.")}, expected)


@pytest.mark.parametrize("target", ["official", "comfyui", "difference"])
def test_what_changed_in_the_base_is_not_left_out_in_silence(target: str, source: Path, base: Path) -> None:
    name = delta_name(with_delta(source))
    out = source.parent / "out.safetensors"
    done = convert(source, out, target, base=str(base) if target == "difference" else None)
    assert name in done.notes[0]
    assert "left out" in done.notes[0]
    facts = read_control(out, UNET.state_dict())[2]
    assert facts["without_base_delta"] == name
    assert "base_delta" not in facts


def test_what_only_a_files_name_can_say_is_said(source: Path) -> None:
    made.change_config(source, global_pool_conditions=True)
    done = convert(source, source.parent / "out.safetensors", "comfyui")
    assert "_shuffle" in done.notes[-1]
    assert read_control(source.parent / "out.safetensors")[0]["global_pool_conditions"] is True


def test_a_base_delta_alone_is_no_control(source: Path) -> None:
    with pytest.raises(FileError, match="is what training changed in a base: give the control folder"):
        read_control(source / delta_name(with_delta(source)))


def paper(source: Path) -> None:
    made.write_folder(source, NET, made.FACTS | {"hint_encoder": "paper"})


def nan(source: Path) -> None:
    save_file(OURS | {"conv_in.bias": torch.full((32,), torch.nan)}, source / WEIGHTS)


def lose_delta(source: Path) -> None:
    with_delta(source)
    next(source.glob("base_delta-*")).unlink()


def change_base(base: Path) -> None:
    tensors = load_file(base)
    save_file(tensors | {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, base)


def strip_base(base: Path) -> None:
    tensors = load_file(base)
    del tensors["model.diffusion_model.middle_block.0.in_layers.0.bias"]
    save_file(tensors, base)


def keep(_: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("target", "give_base", "prepare", "damage_base", "said"),
    [
        ("webui", False, keep, keep, "target is 'webui'; expected one of diffusers"),
        ("comfyui", False, paper, keep, "paper's hint encoder, which only Bridle reads"),
        ("official", False, nan, keep, "conv_in.bias in .* holds NaN"),
        ("diffusers", False, lose_delta, keep, "names the base delta 'base_delta-"),
        ("comfyui", True, keep, keep, "holds no base, and .* needs none"),
        ("difference", False, keep, keep, "needs the base that it is one to; give it with --base"),
        ("difference", True, keep, Path.unlink, "does not exist"),
        ("difference", True, keep, change_base, r"conv_in.weight is \[32, 9, 3, 3\] in the base and \[32, 4, 3, 3\]"),
        ("difference", True, keep, strip_base, "the base has no mid_block.resnets.0.norm1.bias"),
        ("official", True, keep, change_base, "give the base it was trained on"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_nothing_behind(
    target: str,
    give_base: bool,
    prepare: Callable[[Path], None],
    damage_base: Callable[[Path], None],
    said: str,
    source: Path,
    base: Path,
) -> None:
    prepare(source)
    damage_base(base)
    (out := source.parent / "made").mkdir()
    name = "out" if target == "diffusers" else "out.safetensors"
    with pytest.raises(FileError, match=said):
        convert(source, out / name, target, base=str(base) if give_base else None)
    assert list(out.iterdir()) == []


def test_a_difference_without_its_base_says_which_one_it_was(source: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"difference to the base it was trained on \('embedded'\); give that base too"):
        read_control(to("difference", source, base))


def test_nothing_is_written_over(source: Path, base: Path) -> None:
    for out, target in ((base, "official"), (source, "diffusers")):
        with pytest.raises(FileError, match="exists already; give a name that is free"):
            convert(source, out, target)
    with pytest.raises(FileError, match="expected one that ends on"):
        convert(source, source.parent / "out.pth", "official")


@pytest.mark.parametrize("target", FORMATS)
def test_progress_ends_where_it_says(target: str, source: Path, base: Path) -> None:
    seen: list[tuple[int, int]] = []
    given = str(base) if "+" in target or target == "difference" else None
    out = source.parent / ("out" if target == "diffusers" else "out.safetensors")
    done = convert(source, out, target.partition("+")[0], base=given, progress=lambda *bytes_: seen.append(bytes_))
    assert isinstance(done, Converted)
    assert [done_bytes for done_bytes, _ in seen] == sorted(done_bytes for done_bytes, _ in seen)
    assert seen[-1][0] == seen[-1][1] >= done.size_bytes


def test_a_transformers_control_keeps_its_names_for_comfyui(tmp_path: Path) -> None:
    (source := tmp_path / "control").mkdir()
    tensors = {"controlnet_blocks.0.weight": torch.ones(2), "controlnet_x_embedder.weight": torch.ones(3)}
    save_file(tensors, source / WEIGHTS)
    (source / CONFIG).write_text(json.dumps({"_class_name": "FluxControlNetModel"}))
    convert(source, tmp_path / "out.safetensors", "comfyui")
    assert made.same(load_file(tmp_path / "out.safetensors"), tensors)
    with pytest.raises(FileError, match="has no official form; expected diffusers or comfyui"):
        convert(source, tmp_path / "other.safetensors", "official")


@pytest.mark.slow
def test_a_control_of_full_size_is_converted_in_less_than_three_gigabytes(tmp_path: Path) -> None:
    shapes = layout(from_config(made.SD15, tmp_path))
    made.write_hollow(tmp_path / "control.safetensors", shapes)
    script = (
        "import resource, sys; from pathlib import Path; from bridle.files.convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]), 'official')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", script, str(tmp_path / "control.safetensors"), str(out)]
    peak_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert out.stat().st_size > 1.4e9
    assert peak_kib < 1.5 * 2**20  # less than half of what was promised, torch included


def test_a_value_too_large_for_the_type_is_refused(source: Path) -> None:
    save_file(OURS | {"conv_in.bias": torch.full((32,), 1e6)}, source / WEIGHTS)
    with pytest.raises(FileError, match=r"conv_in.bias in .* has values too large for torch.float16"):
        convert(source, source.parent / "out.safetensors", "official", dtype="float16")
    with pytest.raises(FileError, match="too large"):
        convert(source, source.parent / "out", "diffusers", dtype="float16")
    assert not (source.parent / "out").exists()
