"""A model at the hub is taken from the cache of this machine; what is not there says which files to put where."""

import shutil
from pathlib import Path

import ldm
import pytest
import tiny
from huggingface_hub import constants
from safetensors.torch import save_file

from bridle.base.load import load_base
from bridle.errors import BaseError

ID = "someone/tiny"
USUAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # what a checkpoint of Stable Diffusion 1 is configured as


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, hub_id: str) -> Path:
    """A snapshot as the hub's client lays it out. Returns: its folder."""
    place = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = place / "snapshots" / "0123abcd"
    tiny.make_pipeline().save_pretrained(snapshot)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123abcd")
    return snapshot


def test_a_model_in_the_cache_is_found_without_a_network(cache: Path) -> None:
    put(cache, ID)
    base = load_base(ID)
    assert (base.name, base.size_px) == (ID, tiny.SIZE_PX)


def test_a_model_that_is_nowhere_says_which_files_to_put_where(cache: Path) -> None:
    with pytest.raises(BaseError) as raised:
        load_base(ID)
    said = [f"'{ID}' was not found: it is not in the cache", f"run `hf download {ID}`", "model_index.json, unet"]
    said += [f"copy {cache / 'models--someone--tiny'} from there to here", "path of a diffusers folder"]
    assert [part for part in said if part not in str(raised.value)] == []
    assert "\n" not in str(raised.value)


def test_a_model_of_which_only_a_part_was_fetched_says_what_is_missing(cache: Path) -> None:
    snapshot = put(cache, ID)
    (snapshot / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(snapshot / "tokenizer")
    with pytest.raises(BaseError, match=r"the cache lacks its unet/\*\.safetensors, tokenizer/\*\.json, and it cannot"):
        load_base(ID)


def test_a_checkpoint_is_configured_as_the_usual_model_in_the_cache(cache: Path, tmp_path: Path) -> None:
    for weights in put(cache, USUAL).rglob("*.safetensors"):
        weights.unlink()
    save_file(ldm.checkpoint_of(tiny.make_pipeline()), tmp_path / "tiny.safetensors")
    assert load_base(tmp_path / "tiny.safetensors").size_px == tiny.SIZE_PX
    with pytest.raises(BaseError, match=r"the cache lacks its unet/\*\.safetensors"):
        load_base(USUAL)  # what was enough for the checkpoint is not the model itself
