"""A base: a locked stock pipeline, with what training and drawing ask of it at hand."""

import hashlib
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bridle.base.family import family_of
from bridle.base.schedule import Schedule, read_schedule
from bridle.base.tokens import count_tokens, longest_reader, quiet_about_cuts
from bridle.control.control import Control, control_class, denoiser_of, kind_of
from bridle.control.text import Text, join_texts
from bridle.errors import BaseError
from bridle.kernels.quicken import quicken

CAPTIONS_AT_ONCE = 64


class Base:
    """A locked pipeline of any family, its parts in evaluation mode and without gradients.

    Args:
        pipeline: a stock diffusers pipeline, from text to image.
        name: what a control trained on it says of it.

    Raises: BaseError: a part is missing, or the pipeline is of no family that is supported, be it for the kind of its
        noise levels or latents.
    """

    def __init__(self, pipeline: Any, name: str = "unnamed") -> None:
        self.control_class: type[Control] = control_class(kind_of(denoiser_of(pipeline)))
        self.control_class.check_base(denoiser_of(pipeline))
        self.family = family_of(pipeline)
        for part in self.family.parts:
            if getattr(pipeline, part, None) is None:
                kind, family = type(pipeline).__name__, self.family.name
                raise BaseError(f"base is a {kind} without {part}; expected a {family} pipeline with all parts")
        read_schedule(pipeline.scheduler)
        if getattr(pipeline, "vae", None) is not None and pipeline.vae.config.get("latents_mean") is not None:
            expected = "expected them only scaled, as in every family that is supported: use another base"
            raise BaseError(f"base has latents with a mean of each channel's own (latents_mean); {expected}")
        self.pipeline, self.name, self.halved = pipeline, name, False
        for model in (self.denoiser, *self.encoders):
            model.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)

    @property
    def denoiser(self) -> Any:
        """The U-Net or transformer."""
        return denoiser_of(self.pipeline)

    @property
    def encoders(self) -> list[nn.Module]:
        """What training needs only once per pair: the autoencoder, where there is one, and the text encoders."""
        found = [getattr(self.pipeline, name, None) for name in ("vae", *self.family.encoders)]
        return [part for part in found if part is not None]

    @property
    def vae(self) -> Any:
        """The autoencoder; None where the base works on pixels."""
        return getattr(self.pipeline, "vae", None)

    @property
    def device(self) -> torch.device:
        return self.denoiser.device  # type: ignore[no-any-return]

    @property
    def size_factor(self) -> int:
        """Pixels per latent, along each side; 8 for Stable Diffusion, 1 without an autoencoder."""
        return 1 if self.vae is None else int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        return int(self.denoiser.config.in_channels if self.vae is None else self.vae.config.latent_channels)

    @property
    def size_px(self) -> int:
        """The side of the square that the base was trained on."""
        size = self.denoiser.config.get("sample_size") or self.pipeline.default_sample_size
        return int(size) * self.size_factor

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the encoders' weights: what cached latents and texts depend on.

        Raises: BaseError: they were rounded to 16 bits before anybody asked.
        """
        if self.halved:
            raise BaseError("base was halved, and its fingerprint is that of the weights before: load it again")
        digest = hashlib.sha256()
        for model in self.encoders:
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(str(self._scaling if self.vae is not None else None).encode())
        return digest.hexdigest()

    def halve(self, dtype: torch.dtype = torch.bfloat16, *, but_copied: bool = False) -> None:
        """Keep all weights in 16 bits from now on, which takes half the memory; a base on pixels stays as it is.

        The fingerprint stays what it was, if it was asked for before.

        Args:
            but_copied: of a U-Net's own the decoder's alone for now: a control copies the others in full.
        """
        if self.vae is None:  # stock pipelines hand such pictures to NumPy as they are, which knows no bfloat16
            return
        self.halved = True
        own = getattr(self.denoiser, "up_blocks", nn.ModuleList()) if but_copied else self.denoiser
        for model in (own, *self.encoders):
            nn.Module.to(model, dtype)  # diffusers' own warns, of nothing in bases that are known here
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def schedule(self) -> Schedule:
        """The noise levels that the base was trained with, whatever scheduler it samples with."""
        return read_schedule(self.pipeline.scheduler)

    @property
    def _scaling(self) -> tuple[float, float]:
        """Of latents: (z - shift) * scale."""
        return getattr(self.vae.config, "shift_factor", None) or 0.0, self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] to the posterior's mean and deviation, each [B, C, h, w] float32, scaled."""
        if self.vae is None:
            return pixels.float(), torch.zeros_like(pixels, dtype=torch.float32)
        with ExitStack() as around:
            around.callback(quicken(self.vae, fixed=True))
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        shift, scale = self._scaling
        return ((posterior.mean - shift) * scale).float().cpu(), (posterior.std * scale).float().cpu()

    @torch.no_grad()
    def encode_hints(self, hints: Tensor) -> Tensor:
        """Hints [B, K, H, W] uint8 as the control's encoder takes them: as they are, or through the autoencoder."""
        if not self.control_class.PREPARES:
            return hints
        return self.control_class.prepare(hints.float() / 255, self.pipeline).float().cpu()

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Text:
        """N captions to what the denoiser is told of them, float32; what is too long is cut, as the pipeline does."""
        starts = range(0, len(captions), CAPTIONS_AT_ONCE)
        with quiet_about_cuts(self.pipeline):
            some = [self.family.encode(self.pipeline, captions[start : start + CAPTIONS_AT_ONCE]) for start in starts]
        return join_texts([text.to("cpu", torch.float32) for text in some])

    @property
    def max_tokens(self) -> int:
        """As many tokens of a caption are read, those at its ends included; 0 where captions are not read at all."""
        return longest_reader(self.pipeline, self.family)[1]

    def count_tokens(self, captions: list[str]) -> list[int]:
        """Of each caption, uncut; 0 where captions are not read at all."""
        tokenizer, _ = longest_reader(self.pipeline, self.family)
        return [0] * len(captions) if tokenizer is None else count_tokens(tokenizer, captions)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pixels [B, 3, H, W] float32 in [-1, 1]."""
        if self.vae is not None:
            shift, scale = self._scaling
            latents = self.vae.decode((latents / scale + shift).to(self.vae.device, self.vae.dtype)).sample
        return latents.float().clamp(-1, 1).cpu()
