"""The peer that Bridle's training is measured against: what diffusers' example script for ControlNets does.

Written from diffusers' public classes after `examples/controlnet/train_controlnet.py` of version 0.42 with
`--mixed_precision bf16` (or `no`: all in float32), step by step: autoencoder and text encoder run in every step,
the locked models are cast to bfloat16, the control keeps float32 weights under autocast and gives float32, clipping and
AdamW as PyTorch has them by default, gradients are zeroed and kept (`set_grads_to_none` is off). Loading, logging and
saving are left out.
"""

import dataclasses
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel


@dataclasses.dataclass
class Models:
    """What a text-to-image pipeline is made of."""

    vae: Any
    text_encoder: Any
    unet: Any
    tokens: int

    @staticmethod
    def sd15() -> "Models":
        """Of the size of Stable Diffusion 1.5, with random weights."""
        torch.manual_seed(0)
        widths = (128, 256, 512, 512)
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        text_encoder = CLIPTextModel(CLIPTextConfig(**sizes))
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        return Models(vae, text_encoder, unet, 77)

    @staticmethod
    def embedded() -> "Models":
        """The base that ships with Bridle."""
        from bridle.base.load import load_base

        pipeline = load_base("embedded").pipeline
        tokens = pipeline.tokenizer.model_max_length
        return Models(pipeline.vae, pipeline.text_encoder, pipeline.unet, tokens)

    def to(self, device: torch.device) -> "Models":
        """Modules are moved in place, as `Module.to` does."""
        moved = (model.to(device) for model in (self.vae, self.text_encoder, self.unet))
        return Models(*moved, self.tokens)


@dataclasses.dataclass
class Batch:
    """What a step reads. `latents` and `text` stand in for the encoders' outputs where these do not run."""

    pixels: Tensor
    hint: Tensor
    ids: Tensor
    latents: Tensor
    text: Tensor
    noise: Tensor
    timesteps: Tensor

    @staticmethod
    def random(models: Models, batch: int, width: int) -> "Batch":
        """Drawn on the CPU, so that every device sees the same numbers. Args: width: of the square latents."""
        source = torch.Generator().manual_seed(1)
        size_px, shape = 8 * width, (batch, models.unet.config.in_channels, width, width)
        return Batch(
            pixels=torch.rand(batch, 3, size_px, size_px, generator=source) * 2 - 1,
            hint=torch.randint(256, (batch, 3, size_px, size_px), generator=source) / 255,
            ids=torch.randint(5, 300, (batch, models.tokens), generator=source),
            latents=torch.randn(shape, generator=source),
            text=torch.randn(batch, models.tokens, models.unet.config.cross_attention_dim, generator=source),
            noise=torch.randn(shape, generator=source),
            timesteps=torch.randint(1000, (batch,), generator=source),
        )

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


class Peer:
    """The script's loop.

    Args:
        models: on the device where it is to run; so is each batch.
        encode: whether autoencoder and text encoder run in every step, as they do in the script.
        kind: bfloat16 as its `--mixed_precision bf16`, float32 as `no`.
    """

    def __init__(self, models: Models, encode: bool, kind: torch.dtype = torch.bfloat16) -> None:
        self.encode, self.kind = encode, kind
        self.vae = models.vae.requires_grad_(False).to(kind)
        self.unet = models.unet.requires_grad_(False)
        self.text_encoder = models.text_encoder.requires_grad_(False).to(kind)
        self.control = ControlNetModel.from_unet(self.unet).to(self.unet.device).train()  # it is made on the CPU
        self.unet.to(kind)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.optimizer = torch.optim.AdamW(self.control.parameters(), lr=1e-5, weight_decay=1e-2)

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error of the noise."""
        kind = self.kind
        latents, text = batch.latents.to(kind), batch.text.to(kind)
        if self.encode:
            with torch.no_grad():
                latents = self.vae.encode(batch.pixels.to(kind)).latent_dist.sample() * self.vae.config.scaling_factor
                text = self.text_encoder(batch.ids, return_dict=False)[0]
        noisy = self.scheduler.add_noise(latents.float(), batch.noise, batch.timesteps).to(kind)
        with torch.autocast(noisy.device.type, kind, enabled=kind is not torch.float32):
            down, middle = self.control(
                noisy, batch.timesteps, text, controlnet_cond=batch.hint.to(kind), return_dict=False
            )
        down, middle = [link.float() for link in down], middle.float()
        output = self.unet(
            noisy,
            batch.timesteps,
            text,
            down_block_additional_residuals=[link.to(kind) for link in down],
            mid_block_additional_residual=middle.to(kind),
            return_dict=False,
        )[0]
        return F.mse_loss(output.float(), batch.noise, reduction="mean")

    def step(self, batch: Batch) -> float:
        """One optimiser step. Returns: the loss."""
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.control.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return loss.item()
