"""A base in one file loads offline as the pipeline it was made of, whatever wrote it, and never runs code."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ldm
import pytest
import tiny
import tiny_sdxl
import torch
from safetensors.torch import load_file, save_file

from bridle.base.load import load_base
from bridle.errors import BaseError

FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": tiny.make_pipeline,
    "sd2": tiny.make_sd2_pipeline,
    "sdxl": tiny_sdxl.make_pipeline,
}


def write(pipeline: Any, path: Path) -> Path:
    """A checkpoint with what belongs to it beside it: the pipeline's folder, without weights."""
    pipeline.save_pretrained(path.with_suffix(""))
    for weights in path.with_suffix("").rglob("*.safetensors"):
        weights.unlink()
    tensors = ldm.checkpoint_of(pipeline)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny.make_pipeline(), Path(tmp_path_factory.mktemp("checkpoint")) / "tiny.safetensors")


@pytest.fixture
def copy(file: Path, tmp_path: Path) -> Path:
    """One to damage."""
    shutil.copytree(file.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / file.name


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_the_pipeline_it_was_made_of(family: str, suffix: str, tmp_path: Path) -> None:
    saved = FAMILIES[family]()
    base = load_base(write(saved, tmp_path / f"tiny{suffix}"))
    assert type(base.pipeline) is type(saved)
    assert base.schedule.prediction == saved.scheduler.config.prediction_type
    parts = [name for name, part in saved.components.items() if isinstance(part, torch.nn.Module)]
    assert parts == [name for name, part in base.pipeline.components.items() if isinstance(part, torch.nn.Module)]
    for part in parts:
        ours, expected = getattr(base.pipeline, part).state_dict(), getattr(saved, part).state_dict()
        assert ours.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in ours.items())
    captions = ["a red apple", ""]
    assert torch.equal(base.encode_captions(captions).states, type(base)(saved).encode_captions(captions).states)


def test_a_checkpoint_in_the_folder_that_belongs_to_it_finds_it(copy: Path) -> None:
    inside = copy.rename(copy.with_suffix("") / "model.safetensors")
    assert load_base(inside).size_px == tiny.SIZE_PX


def test_a_checkpoint_alone_says_what_to_put_where(copy: Path) -> None:
    shutil.rmtree(copy.with_suffix(""))
    with pytest.raises(BaseError) as raised:
        load_base(copy)
    said = ["without configuration and tokenizer", f"beside it as {copy.with_suffix('')}", "hf download"]
    said += ["models--stable-diffusion-v1-5--stable-diffusion-v1-5"]
    assert [part for part in said if part not in str(raised.value)] == []
    assert "\n" not in str(raised.value)


def test_a_checkpoint_without_its_tokenizer_says_so(copy: Path) -> None:
    shutil.rmtree(copy.with_suffix("") / "tokenizer")
    with pytest.raises(
        BaseError, match=rf"tiny.safetensors needs tokenizer/\*.json, which {copy.with_suffix('')} lacks"
    ):
        load_base(copy)


@pytest.mark.parametrize(
    ("lost", "part"),
    [
        ("model.diffusion_model.out.2.bias", "unet, such as conv_out.bias"),
        ("first_stage_model.decoder.conv_out.bias", "vae, such as decoder.conv_out.bias"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias",
            "text_encoder, such as encoder.layers.0.mlp.fc1.bias",
        ),
    ],
)
@pytest.mark.parametrize("damage", ["lost", "nan"])
def test_a_weight_that_is_lost_or_no_number_is_named(copy: Path, lost: str, part: str, damage: str) -> None:
    tensors = load_file(copy)
    if damage == "lost":
        del tensors[lost]
    else:
        tensors[lost][-1] = torch.nan
    save_file(tensors, copy)
    with pytest.raises(BaseError, match=rf"damaged: it lacks, or has NaN in, 1 of the \d+ weights of its {part};"):
        load_base(copy)


def test_a_truncated_checkpoint_is_refused(copy: Path) -> None:
    copy.write_bytes(copy.read_bytes()[:100_000])
    with pytest.raises(BaseError, match=r"cannot be loaded .* take another copy"):
        load_base(copy)


def test_a_file_that_is_no_base_is_refused(tmp_path: Path) -> None:
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(BaseError, match="holds no base; `bridle info"):
        load_base(tmp_path / "lora.safetensors")


class Trap:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("trapped"),)


def test_a_checkpoint_that_brings_code_is_refused_and_runs_none(
    copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": load_file(copy), "trap": Trap()}, copy.with_suffix(".ckpt"))
    with pytest.raises(BaseError, match=r"Bridle runs nothing from files: take it as \.safetensors"):
        load_base(copy.with_suffix(".ckpt"))
    assert not Path("trapped").exists()
    with copy.with_suffix(".ckpt").open("wb") as bare:
        pickle.dump(Trap(), bare)
    with pytest.raises(BaseError, match="Bridle runs nothing"):
        load_base(copy.with_suffix(".ckpt"))
    assert not Path("trapped").exists()


def test_a_file_of_another_kind_says_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseError, match=r"is a \.gguf file; expected \.safetensors or \.ckpt, or a folder"):
        load_base(tmp_path / "base.gguf")
