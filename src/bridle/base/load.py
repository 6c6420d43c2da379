"""Bases: the embedded one, a diffusers folder, or a hub id. Out: a `Base`, a stock pipeline with encoders at hand."""

import hashlib
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from bridle.control.unet import check_base
from bridle.errors import BaseError

EMBEDDED = "embedded"
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
CAPTIONS_AT_ONCE = 64


class Base:
    """A locked Stable Diffusion, its parts in evaluation mode and without gradients.

    Args:
        pipeline: a stock diffusers pipeline with `unet`, `vae`, `text_encoder`, `tokenizer` and `scheduler`.
        name: what a control trained on it says of it.

    Raises: BaseError: a part is missing, or the U-Net is of a family that is not supported.
    """

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if getattr(pipeline, part, None) is None:
                kind = type(pipeline).__name__
                raise BaseError(f"base is a {kind} without {part}; expected a Stable Diffusion pipeline with all parts")
        check_base(pipeline.unet)
        self.pipeline, self.name = pipeline, name
        for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
            part.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return self.unet.device  # type: ignore[no-any-return]

    @property
    def size_factor(self) -> int:
        """Pixels per latent, along each side; 8 for Stable Diffusion."""
        return int(2 ** (len(self.pipeline.vae.config.block_out_channels) - 1))

    @property
    def size_px(self) -> int:
        """The side of the square that the base was trained on."""
        return int(self.unet.config.sample_size) * self.size_factor

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights of both encoders: what cached latents and texts depend on."""
        digest = hashlib.sha256()
        for model in (self.pipeline.vae, self.pipeline.text_encoder):
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(str(self.pipeline.vae.config.scaling_factor).encode())
        return digest.hexdigest()

    @property
    def schedule(self) -> Any:
        """The noise schedule that the base was trained with, whatever scheduler it samples with."""
        return DDPMScheduler.from_config(self.pipeline.scheduler.config)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] to the posterior's mean and deviation, each [B, C, h, w] float32, scaled."""
        vae = self.pipeline.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        scaling = vae.config.scaling_factor
        return (posterior.mean * scaling).float().cpu(), (posterior.std * scaling).float().cpu()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """N captions to their states [N, L, D] float32; what is too long is cut, as the pipeline does."""
        tokenizer, encoder = self.pipeline.tokenizer, self.pipeline.text_encoder
        states = []
        for start in range(0, len(captions), CAPTIONS_AT_ONCE):
            some = captions[start : start + CAPTIONS_AT_ONCE]
            length = tokenizer.model_max_length
            tokens = tokenizer(some, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            states.append(encoder(tokens.input_ids.to(encoder.device))[0].float().cpu())
        return torch.cat(states)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] float32 in [-1, 1]."""
        vae = self.pipeline.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype)).sample
        return pixels.float().clamp(-1, 1).cpu()  # type: ignore[no-any-return]


def embedded_folder() -> Path:
    """The newest base that the package carries: `embedded/v0`, `embedded/v1`, ..."""
    versions = sorted(EMBEDDED_FOLDER.glob("v*"), key=lambda path: int(path.name[1:]))
    if not versions:
        raise BaseError(f"this installation carries no embedded base in {EMBEDDED_FOLDER}; install the package again")
    return versions[-1]


def load_base(where: str | Path = EMBEDDED, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Base:
    """Load a base.

    Args:
        where: "embedded", a folder in diffusers format, or a hub id that is already in the local cache.
        dtype: of the weights in memory; training keeps float32 and computes in bfloat16.
        device: a torch device, or "auto": a GPU where there is one.

    Raises: BaseError: nothing is found there, or it is no Stable Diffusion.
    """
    embedded = str(where) == EMBEDDED
    folder = embedded_folder() if embedded else where
    device = pick_device(device)
    try:
        with quiet():
            pipeline = StableDiffusionPipeline.from_pretrained(
                folder, dtype=dtype, safety_checker=None, requires_safety_checker=False, low_cpu_mem_usage=False
            )
    except (OSError, ValueError) as error:
        raise BaseError(explain(str(where), error)) from None
    return Base(pipeline.to(device), f"{EMBEDDED}/{Path(folder).name}" if embedded else str(where))


def pick_device(name: str) -> str:
    """ "auto" is a GPU where there is one; any other name stays."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


@contextmanager
def quiet() -> Generator[None]:
    """Without the libraries' bars for loading, which end before anyone has read them."""
    libraries = (diffusers_logging, transformers_logging)
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def explain(where: str, error: Exception) -> str:
    """One line for what went wrong, with what to do."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(where).exists():
        expected = "a diffusers folder with model_index.json, unet, vae, text_encoder, tokenizer and scheduler"
        return f"base folder {where} cannot be loaded ({first}); expected {expected}"
    remedy = 'give "embedded", the path of a diffusers folder, or the id of a model that is in the local cache'
    return f"base {where!r} was not found ({first}); {remedy}"
