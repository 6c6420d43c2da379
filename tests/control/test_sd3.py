"""The control of Stable Diffusion 3: the published sizes, its two ways with hints and captions, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_transformers as tt
import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from torch import Tensor

from bridle.base.base import Base
from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.errors import BaseError, FileError
from bridle.files.weights import CONFIG, load_control, save_control

# transformer/config.json of stabilityai/stable-diffusion-3-medium-diffusers, -3.5-medium and -3.5-large.
MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
MEDIUM_35 = MEDIUM | {"qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 384}
LARGE_35 = MEDIUM | {"qk_norm": "rms_norm", "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432}


@pytest.mark.parametrize(
    ("settings", "layers", "width", "base_millions", "millions"),
    [(MEDIUM, 12, 1536, 2028, 1062), (MEDIUM_35, 12, 1536, 2243, 1261), (LARGE_35, 19, 2432, 8056, 4187)],
    ids=["3 medium", "3.5 medium", "3.5 large"],
)
def test_at_full_size_half_of_the_blocks_are_copied_under_diffusers_names(
    settings: dict[str, Any], layers: int, width: int, base_millions: int, millions: int
) -> None:
    with torch.device("meta"):
        base = SD3Transformer2DModel(**settings)
        control = Control.from_base(base)
        reference = SD3ControlNetModel(**control.config)
        inputs = torch.zeros(1, 16, 128, 128), torch.zeros(1), Text(torch.zeros(1, 333, 4096), torch.zeros(1, 2048))
        residuals = control(*inputs, torch.zeros(1, 16, 128, 128))
    assert shapes(control) == shapes(reference)
    assert [list(link.shape) for link in residuals.links] == [[1, 64 * 64, width]] * layers
    assert residuals.grid == (64, 64)
    assert count(base) // 10**6 == base_millions
    assert count(control) // 10**6 == millions


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in model.state_dict().items()}


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def informed(tmp_path: Path) -> tuple[Control, SD3ControlNetModel]:
    """A control of the other kind, as diffusers wrote it: told of pooled captions, its hints shifted."""
    control = tt.wake(Control.from_base(tt.make_sd3()))
    reference: Any = SD3ControlNetModel.from_config(control.config | {"force_zeros_for_pooled_projection": False})
    reference.load_state_dict(control.state_dict())
    reference.save_pretrained(tmp_path)
    return load_control(tmp_path), reference.eval()


def test_what_a_file_says_of_pooled_captions_and_hints_is_kept(informed: tuple[Control, SD3ControlNetModel]) -> None:
    control, reference = informed
    plain = Control.from_base(tt.make_sd3())
    inputs = tt.make_inputs()
    call = control.call(*inputs[:3])
    pipeline, hint = tt.sd3_pipeline(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = reference(controlnet_cond=inputs[3], **call).controlnet_block_samples
        assert all(torch.equal(a, b) for a, b in zip(control(*inputs).links, theirs, strict=True))
        mean: Tensor = pipeline.vae.encode(2 * hint - 1).latent_dist.mean
    assert torch.equal(control.fit_hint(hint, pipeline), (mean - 0.1) * 1.5)
    assert torch.equal(plain.fit_hint(hint, pipeline), mean * 1.5)


def test_a_new_control_is_told_nothing_of_pooled_captions() -> None:
    control = tt.wake(Control.from_base(tt.make_sd3()))
    latents, timesteps, text, hint = tt.make_inputs()
    other = Text(text.states, text.states.mean(1))
    with torch.no_grad():
        ours, theirs = (control(latents, timesteps, said, hint).links for said in (text, other))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"extra_conditioning_channels": 1}, "wants 1 channels beside the hint's, for inpainting"),
        ({"joint_attention_dim": None}, "is of the 8B kind"),
        ({"use_pos_embed": False}, "is of the 8B kind"),
        ({"pos_embed_max_size": None}, r"is damaged \(pos_embed_max_size is missing\)"),
    ],
)
def test_a_control_that_cannot_be_used_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_control(Control.from_base(tt.make_sd3()), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | changes))
    with pytest.raises(FileError, match=said):
        load_control(tmp_path)


def test_a_base_that_takes_more_than_noise_is_refused() -> None:
    with pytest.raises(BaseError, match="base takes 17 channels beside the noisy ones"):
        Control.from_base(tt.make_sd3(in_channels=33))


def test_a_base_may_lack_its_largest_text_encoder() -> None:
    pipeline = tt.sd3_pipeline()
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    base = Base(pipeline)
    assert len(base.encoders) == 3
    text = base.encode_captions(["a bar"])
    assert text.states.shape[1:] == (16 + 256, tt.WIDTH)
    assert not text.states[:, 16:].any()
    with attach(pipeline, edge=Control.from_base(pipeline)):
        pass
