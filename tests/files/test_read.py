"""A control comes in from every format, and whatever is none of them is one clear error that runs no code."""

import json
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bridle.errors import FileError
from bridle.files.architecture import from_config
from bridle.files.read import open_control, read_control
from bridle.files.tensors import CONFIG, WEIGHTS, open_weights

NET = made.make_net()
OURS, OFFICIAL = made.weights_of(NET), made.official_of(NET)
PREFIXED = {f"control_model.{name}": value for name, value in OFFICIAL.items()}
CONFIGURED = {"bridle": json.dumps({"config": {"_class_name": "ControlNetModel", **NET.config}, "steps": 3})}


def write_pickle(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def write_file(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, header)
    return path


def write_shards(folder: Path) -> Path:
    NET.save_pretrained(folder, max_shard_size="2MB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def with_others(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What lies beside the control in a full checkpoint."""
    base = {
        f"model.diffusion_model.{name}": value + 1
        for name, value in OFFICIAL.items()
        if name.startswith("input_blocks")
    }
    return tensors | base | {"first_stage_model.encoder.conv_in.weight": torch.zeros(1), "logvar": torch.zeros(3)}


SOURCES: dict[str, Callable[[Path], Path]] = {
    "diffusers folder": lambda path: made.write_folder(path, NET, {"steps": 3}),
    "sharded folder": write_shards,
    "its file": lambda path: made.write_folder(path, NET, {"steps": 3}) / WEIGHTS,
    "diffusers single": lambda path: write_file(path / "a.safetensors", OURS, CONFIGURED),
    "official": lambda path: write_file(path / "a.safetensors", PREFIXED, CONFIGURED),
    "full": lambda path: write_file(path / "a.safetensors", with_others(PREFIXED), CONFIGURED),
    "bare": lambda path: write_file(path / "a.safetensors", OFFICIAL, CONFIGURED),
    "pth": lambda path: write_pickle(path / "a.pth", PREFIXED),
    "ckpt": lambda path: write_pickle(path / "a.ckpt", {"state_dict": with_others(PREFIXED), "epoch": 3, "name": "x"}),
    "twice wrapped": lambda path: write_pickle(path / "a.pt", {"state_dict": {"state_dict": OFFICIAL}}),
    "before torch 1.6": lambda path: write_pickle(path / "a.bin", OFFICIAL, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_control_is_the_same_from_every_format(source: str, tmp_path: Path) -> None:
    config, tensors, facts = read_control(SOURCES[source](tmp_path))
    assert made.same(tensors, OURS)
    assert config["_class_name"] == "ControlNetModel"
    assert from_config(config, tmp_path) == from_config(NET.config, tmp_path)
    assert facts in ({}, {"steps": 3})
    if not source.endswith(("pth", "ckpt", "wrapped", "1.6")):  # those say nothing of the heads
        assert config["attention_head_dim"] == NET.config.attention_head_dim


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_type_of_the_weights_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    half = {name: value.to(dtype) for name, value in PREFIXED.items()}
    assert made.same(
        read_control(write_file(tmp_path / "a.safetensors", half))[1],
        {name: value.to(dtype) for name, value in OURS.items()},
    )


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", PREFIXED)
    opened = open_control(path)
    path.unlink()
    assert opened.weights.specs["conv_in.weight"].shape == (32, 4, 3, 3)


def zeros(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


# What other tools tell these by; every one of them has been seen in the wild.
STRANGERS = [
    ("Control-LoRA", zeros("lora_controlnet", "input_hint_block.0.weight", "input_blocks.1.0.in_layers.2.up")),
    ("ControlNet-Union", OURS | zeros("task_embedding", "control_add_embedding.linear_1.weight")),
    (
        "ControlNet-Union",
        zeros("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "controlnet_mode_embedder.weight"),
    ),
    ("T2I-Adapter", zeros("adapter.body.0.resnets.0.block1.weight", "adapter.conv_in.weight")),
    ("T2I-Adapter", zeros("conv_in.weight", "body.0.block2.weight")),
    ("T2I-Adapter", zeros("body.0.in_conv.weight")),
    ("ControlNet-LLLite", zeros("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight")),
    ("ControlNet-XS", zeros("down_blocks.0.ctrl_to_base.0.weight", "controlnet_cond_embedding.conv_in.weight")),
    ("SparseCtrl", OURS | zeros("down_blocks.0.motion_modules.0.norm.weight")),
    ("layout of XLabs", zeros("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale")),
    ("Stability's own layout", zeros("controlnet_blocks.0.weight", "transformer_blocks.0.adaLN_modulation.1.bias")),
    ("Stable Diffusion 3", zeros("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")),
    ("for Flux", zeros("controlnet_blocks.0.weight", "controlnet_x_embedder.weight")),
    ("family that Bridle does not know", zeros("after_proj_list.18.bias")),
    ("IP-Adapter", zeros("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight")),
    ("a LoRA", zeros("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight")),
    ("a LoRA", zeros("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight")),
    ("textual inversion", zeros("emb_params")),
    ("base checkpoint", zeros("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x")),
    ("base's U-Net", zeros("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.0.conv1.weight")),
    ("autoencoder or text encoder", zeros("decoder.conv_in.weight")),
    ("nothing that Bridle knows", zeros("layer.weight")),
]


@pytest.mark.parametrize(("said", "tensors"), STRANGERS, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_no_usable_control_is_called_by_its_name(said: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=said) as raised:
        read_control(write_file(tmp_path / "a.safetensors", tensors))
    assert "; " in str(raised.value) or ": " in str(raised.value)  # and what to do


@pytest.mark.parametrize(
    "kind", ["ControlNetUnionModel", "T2IAdapter", "UNet2DConditionModel", "QwenImageControlNetModel"]
)
def test_a_folder_of_something_else_is_called_by_its_name(kind: str, tmp_path: Path) -> None:
    made.change_config(made.write_folder(tmp_path, NET), _class_name=kind)
    with pytest.raises(FileError, match=r"ControlNet-Union|T2I-Adapter|U-Net|a control for a family"):
        read_control(tmp_path)


@pytest.mark.parametrize("kind", ["SD3ControlNetModel", "FluxControlNetModel"])
def test_a_transformers_control_comes_as_it_is(kind: str, tmp_path: Path) -> None:
    tensors = zeros("controlnet_blocks.0.weight", "transformer_blocks.0.norm1.linear.weight")
    write_file(tmp_path / WEIGHTS, tensors, {"bridle": json.dumps({"steps": 7})})
    (tmp_path / CONFIG).write_text(json.dumps({"_class_name": kind, "num_layers": 1}))
    config, found, facts = read_control(tmp_path)
    assert (config, facts) == ({"_class_name": kind, "num_layers": 1}, {"steps": 7})
    assert made.same(found, tensors)


def cut(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def put(**changes: Tensor) -> Callable[[Path], object]:
    """Double underscores for dots."""
    changed = {name.replace("__", "."): value for name, value in changes.items()}
    return lambda path: write_file(path, PREFIXED | {f"control_model.{name}": value for name, value in changed.items()})


def drop(name: str) -> Callable[[Path], object]:
    return lambda path: write_file(path, {key: value for key, value in PREFIXED.items() if key != name})


NAN = torch.full((32,), float("nan"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "does not exist; give a weight file"),
        (cut, "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "is damaged"),
        (
            drop("control_model.middle_block.0.in_layers.0.bias"),
            "1 missing .'control_model.middle_block.0.in_layers.0.bias'",
        ),
        (drop("control_model.input_blocks.0.0.weight"), "lacks 'input_blocks.0.0.weight'"),
        (drop("control_model.input_blocks.5.0.out_layers.3.weight"), "lacks 'levels of equal blocks'|missing"),
        (put(surplus=torch.zeros(1)), "1 unknown .'control_model.surplus'"),
        (put(zero_convs__0__0__bias=torch.zeros(7)), r"controlnet_down_blocks.0.bias in .* has shape \[7\]"),
        (put(zero_convs__0__0__bias=NAN), "controlnet_down_blocks.0.bias in .* holds NaN"),
        (put(zero_convs__0__0__bias=NAN.nan_to_num(nan=torch.inf)), "controlnet_down_blocks.0.bias in .* infinity"),
        (put(zero_convs__0__0__bias=torch.zeros(32, dtype=torch.int64)), "is int64; expected float32"),
        (lambda path: write_file(path, PREFIXED, {"bridle": "{"}), "its metadata is no table"),
        (
            lambda path: write_file(path, PREFIXED, {"bridle": '{"config": 3}'}),
            "its configuration is none of a ControlNetModel",
        ),
        (
            lambda path: write_file(
                path, PREFIXED, {"bridle": '{"config": {"_class_name": "ControlNetModel", "layers_per_block": 1}}'}
            ),
            "missing",
        ),
    ],
)
def test_damage_is_named_with_its_remedy(damage: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.safetensors", PREFIXED)
    damage(path)
    with pytest.raises(FileError, match=said) as raised:
        read_control(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert ";" in str(raised.value) or "asks for" in str(raised.value)


def test_folders_that_lack_a_part_say_which(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "a")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shutil.move(shard, tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileError, match=f"{shard.name} does not exist"):
        read_control(folder)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(FileError, match="it names the file"):
        read_control(folder)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileError, match="is a pipeline, not a control"):
        read_control(tmp_path)
    with pytest.raises(FileError, match="no weight file; expected"):
        read_control(made.write_folder(tmp_path / "b", NET) / CONFIG)


class Malice:
    """A pickle that would write a file as soon as it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pth", "ckpt", "pt", "bin"])
@pytest.mark.parametrize("form", ["zip", "old", "plain"])
def test_a_file_never_runs_code(form: str, suffix: str, tmp_path: Path) -> None:
    path, touched = tmp_path / f"a.{suffix}", tmp_path / "touched"
    content = {"control_model.x": torch.zeros(1), "malice": Malice(touched)}
    if form == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        write_pickle(path, content, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(FileError, match=r"would have to run code; take the \.safetensors|is damaged"):
        read_control(path)
    assert not touched.exists()
    torch.load(path, weights_only=False) if form != "plain" else pickle.loads(path.read_bytes())  # noqa: S301
    assert touched.exists()  # it would have


def test_a_dictionary_in_itself_ends() -> None:
    path = Path("round.pth")
    found: dict[str, Any] = {}
    found["again"] = found
    from bridle.files.tensors import flatten

    with pytest.raises(FileError, match="no dictionary of tensors"):
        list(flatten(path, found))


def mutate(whole: bytes, chance: random.Random) -> bytes:
    """Flip, cut, insert or blank, more often where a file keeps its structure: at its ends."""
    spots = [range(len(whole)), range(min(40_000, len(whole))), range(max(0, len(whole) - 60_000), len(whole))]
    at, changed = chance.choice(chance.choice(spots)), bytearray(whole)
    match chance.choice(["flip", "cut", "insert", "blank"]):
        case "flip":
            for _ in range(chance.choice([1, 3, 20])):
                changed[min(len(whole) - 1, at + chance.randrange(50))] = chance.randrange(256)
        case "cut":
            del changed[at:]
        case "insert":
            changed[at:at] = chance.randbytes(chance.choice([1, 8, 100]))
        case "blank":
            changed[at : at + 16] = bytes(len(changed[at : at + 16]))
    return bytes(changed)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
def test_250_mutations_of_each_load_whole_or_are_one_clear_error(name: str, tmp_path: Path) -> None:
    tensors = {key: value.half() for key, value in PREFIXED.items()}
    path = tmp_path / name
    write_pickle(path, tensors) if path.suffix == ".pth" else write_file(path, tensors)
    whole, chance, loaded = path.read_bytes(), random.Random(5), 0
    for _ in range(250):
        path.write_bytes(mutate(whole, chance))
        try:
            found = read_control(path)[1]
        except FileError:
            continue
        assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in OURS.items()}
        assert all(torch.isfinite(value).all() for value in found.values())
        loaded += 1
    assert 0 < loaded < 250


def test_weights_are_read_anew_and_an_unknown_name_is_no_weight(tmp_path: Path) -> None:
    weights = open_weights(write_file(tmp_path / "a.safetensors", OFFICIAL))
    assert torch.equal(weights["input_blocks.0.0.bias"], OFFICIAL["input_blocks.0.0.bias"])
    assert weights.get("nothing") is None
