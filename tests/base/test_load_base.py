"""A base is found, locked and checked; what is no base says what to give instead."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_pixel
import tiny_sdxl
import tiny_transformers
import torch
from diffusers import EDMEulerScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from bridle.base.base import Base
from bridle.base.load import load_base
from bridle.errors import BaseError
from bridle.kernels import conv
from bridle.kernels.quicken import speeds_up


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tmp_path_factory.mktemp("base"))
    tiny.make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


def test_a_folder_loads_as_the_pipeline_that_was_saved_locked_and_in_evaluation_mode(base: Base) -> None:
    ours, saved = base.pipeline, tiny.make_pipeline()
    for part in ("unet", "vae", "text_encoder"):
        model = getattr(ours, part)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        expected = getattr(saved, part).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert (base.size_factor, base.size_px, base.device.type) == (8, 64, "cpu")


FAMILIES: dict[str, Callable[[], Any]] = {
    "sd1": tiny.make_pipeline,
    "sd2": tiny.make_sd2_pipeline,
    "sdxl": tiny_sdxl.make_pipeline,
    "sd3": tiny_transformers.sd3_pipeline,
    "sd3 without T5": lambda: without_t5(tiny_transformers.sd3_pipeline()),
    "flux": tiny_transformers.flux_pipeline,
    "pixel": tiny_pixel.make_pipeline,
}


def without_t5(pipeline: Any) -> Any:
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    return pipeline


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_every_family_loads_with_all_its_parts(family: str, tmp_path: Path) -> None:
    saved = FAMILIES[family]()
    saved.save_pretrained(tmp_path)
    ours = load_base(tmp_path).pipeline
    assert type(ours) is type(saved)
    assert {name: type(part) for name, part in ours.components.items()} == {
        name: type(part) for name, part in saved.components.items()
    }
    for name, part in saved.components.items():
        if isinstance(part, torch.nn.Module):
            loaded = getattr(ours, name).state_dict()
            assert all(torch.equal(value, loaded[key]) for key, value in part.state_dict().items())


def test_pictures_are_encoded_by_the_kernels_and_the_autoencoder_stays_as_it_is(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not speeds_up(torch.float32):
        pytest.skip("no C compiler here")
    computed = []
    compute = conv.forward
    monkeypatch.setattr(conv, "forward", lambda hidden, spec: computed.append(hidden.dtype) or compute(hidden, spec))
    base.encode_images(torch.zeros(1, 3, 64, 64))
    assert set(computed) == {torch.float32}
    assert not any("forward" in vars(module) for module in base.vae.modules())


def test_latents_are_the_posterior_of_the_autoencoder_times_its_scaling(base: Base) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = base.encode_images(pixels)
    with torch.no_grad():
        posterior = base.pipeline.vae.encode(pixels).latent_dist
    for found, theirs in ((mean, posterior.mean), (std, posterior.std)):
        torch.testing.assert_close(found, theirs * base.pipeline.vae.config.scaling_factor, rtol=1e-4, atol=1e-6)
    assert mean.shape == (2, 4, 8, 8)
    with torch.no_grad():
        decoded = base.pipeline.vae.decode(posterior.mean).sample
    assert torch.allclose(base.decode(mean), decoded.clamp(-1, 1), atol=1e-4)


def test_captions_are_encoded_as_the_pipeline_encodes_its_prompts(base: Base) -> None:
    captions = ["", "a red apple", "a very long caption that is cut because no more tokens fit"]
    with torch.no_grad():
        expected, _ = base.pipeline.encode_prompt(captions, "cpu", 1, False)
    states = base.encode_captions(captions).states
    assert torch.equal(states, expected)
    assert not torch.equal(states[0], states[1])
    assert states.shape == (3, tiny.TOKENS, tiny.WIDTH)


def test_captions_are_encoded_in_any_number(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.base.base.CAPTIONS_AT_ONCE", 2)
    captions = ["red", "green", "blue", "red", ""]
    states = base.encode_captions(captions).states
    alone = [base.encode_captions([caption]).states for caption in captions]
    assert torch.allclose(states, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_the_fingerprint_changes_with_one_weight_of_an_encoder(base: Base, part: str) -> None:
    other = tiny.make_base()
    assert other.fingerprint == base.fingerprint
    changed = tiny.make_base()
    with torch.no_grad():
        next(getattr(changed.pipeline, part).parameters()).view(-1)[0] += 1e-3
    assert changed.fingerprint != base.fingerprint


def test_the_fingerprint_changes_with_the_scaling(base: Base) -> None:
    changed = tiny.make_base()
    changed.pipeline.vae.register_to_config(scaling_factor=0.5)
    assert changed.fingerprint != base.fingerprint


def test_the_schedule_is_that_of_training_whatever_the_sampler(base: Base) -> None:
    from diffusers import EulerDiscreteScheduler

    other = tiny.make_base()
    other.pipeline.scheduler = EulerDiscreteScheduler.from_config(other.pipeline.scheduler.config)
    assert torch.equal(other.schedule.signal, base.schedule.signal)
    assert torch.equal(base.schedule.signal, base.pipeline.scheduler.alphas_cumprod.sqrt())


@pytest.mark.parametrize("where", ["no-such-model", "no/such/folder", "./nothing here", "no-such/file.safetensors"])
def test_a_base_that_is_not_there_says_what_to_give(where: str) -> None:
    with pytest.raises(BaseError) as raised:
        load_base(where)
    said = [where, "was not found", '"embedded"', "path of a diffusers folder", ".safetensors or .ckpt", "hub id"]
    assert [part for part in said if part not in str(raised.value)] == []
    assert "\n" not in str(raised.value)


def test_a_folder_that_holds_no_base_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"cannot be loaded .*expected a diffusers folder with model_index.json"):
        load_base(tmp_path)


def test_a_damaged_base_is_named(tmp_path: Path) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BaseError, match=rf"base folder {tmp_path} cannot be loaded"):
        load_base(tmp_path)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(BaseError, match=r"lacks vae/\*\.safetensors, scheduler/\*\.json; expected a diffusers folder"):
        load_base(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_that_a_folder_lacks_is_named_and_not_made_up(tmp_path: Path, part: str) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path)
    (path,) = (tmp_path / part).glob("*.safetensors")
    tensors = load_file(path)
    lost = next(name for name in tensors if name.endswith("norm1.weight"))
    del tensors[lost]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(BaseError, match=rf"lacks, or has NaN in, 1 of the \d+ weights of its {part}, such as {lost};"):
        load_base(tmp_path)


def test_a_folder_with_weights_in_float16_alone_loads(tmp_path: Path) -> None:
    tiny.make_pipeline().save_pretrained(tmp_path, variant="fp16")
    assert load_base(tmp_path, dtype=torch.float16).denoiser.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"_class_name": ["pipeline", "Trap"]}, "wants to run code of its own"),
        ({"unet": ["trap", "UNet2DConditionModel"]}, r"wants to run code of its own \(trap.UNet2DConditionModel\)"),
        ({"unet": ["diffusers", "MotionModel"]}, "is a MotionModel with 1 text encoders; expected UNet2DCondition"),
        ({"unet": [None, None]}, "is a pipeline without U-Net or transformer"),
        ({"text_encoder": ["os", "system"]}, r"wants to run code of its own \(os.system\)"),
    ],
)
def test_an_index_that_asks_for_other_code_is_refused_and_runs_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("trap.py", "pipeline.py", "unet/trap.py"):
        (tmp_path / name).write_text("raise SystemExit('trapped')")
    monkeypatch.chdir(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(BaseError, match=said):
        load_base(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "null", "{" * 10])
def test_a_damaged_index_is_refused(folder: Path, tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(BaseError, match=r"cannot be loaded \(model_index.json is"):
        load_base(tmp_path)


def test_the_extras_of_published_folders_are_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionInpaintPipeline",
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "requires_safety_checker": True,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    pipeline = load_base(tmp_path).pipeline
    assert type(pipeline) is StableDiffusionPipeline
    assert (pipeline.safety_checker, pipeline.config.requires_safety_checker) == (None, False)


def test_a_base_that_asks_for_conditions_of_other_families_is_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "class_embed_type": "timestep",
    }
    tiny.make_pipeline(tiny.make_unet(**changes)).save_pretrained(tmp_path)
    with pytest.raises(BaseError, match=r"needs class_embed_type, .*Stable Diffusion 1, 2 or XL"):
        load_base(tmp_path)


@pytest.mark.parametrize("device", ["gpu", "", "meta", "cuda", "cuda:0", "cpu:1"])
def test_a_device_that_is_not_there_is_named_before_anything_is_loaded(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("bridle.base.load.read_folder", lambda *_: pytest.fail("loaded"))
    with pytest.raises(BaseError, match=f"device '{device}' is none that PyTorch can use .*; expected cpu, or auto"):
        load_base("embedded", device=device)


def test_a_pipeline_without_a_part_is_refused() -> None:
    pipeline: StableDiffusionPipeline = tiny.make_pipeline()
    pipeline.text_encoder = None
    with pytest.raises(BaseError, match="StableDiffusionPipeline without text_encoder; expected a Stable Diffusion"):
        Base(pipeline)


def test_a_base_with_levels_or_latents_of_another_kind_is_refused() -> None:
    pipeline = tiny_sdxl.make_pipeline()
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(BaseError, match=r"latents_mean\); expected them only scaled"):
        Base(pipeline)
    pipeline = tiny_sdxl.make_pipeline()
    pipeline.scheduler = EDMEulerScheduler()
    with pytest.raises(BaseError, match="base has the scheduler EDMEulerScheduler; expected prediction_type"):
        Base(pipeline)
