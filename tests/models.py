"""Small denoisers of no family, written by hand: each with what makes its kind different."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 1000


def embed(timesteps: Tensor, width: int) -> Tensor:
    """[B] to [B, width]."""
    rates = torch.exp(torch.arange(width // 2) * (-6.0 / (width // 2)))
    angles = timesteps.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Block(nn.Module):
    """Two convolutions in 2-D or 3-D, told of the time; returns what it computed and, as some do, a skip beside it."""

    def __init__(self, width_in: int, width: int, time: int, conv: Any, *, pair: bool) -> None:
        super().__init__()
        self.first, self.second = conv(width_in, width, 3, padding=1), conv(width, width, 3, padding=1)
        self.time, self.norm, self.pair = nn.Linear(time, width), nn.GroupNorm(4, width), pair

    def forward(self, sample: Tensor, time: Tensor) -> Any:
        told = self.time(time).view(len(sample), -1, *[1] * (sample.ndim - 2))
        hidden = self.second(F.silu(self.norm(self.first(sample) + told)))
        return (hidden, hidden * 0.5) if self.pair else hidden


class SmallUNet(nn.Module):
    """One level down and up again, in two dimensions or three; blocks return tuples if `pair`."""

    def __init__(self, channels: int = 3, width: int = 16, axes: int = 2, *, pair: bool = False) -> None:
        super().__init__()
        conv: Any = {2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.width, self.pair = width, pair
        self.conv_in = conv(channels, width, 3, padding=1)
        self.down = nn.ModuleList(
            [Block(width, width, width, conv, pair=pair), Block(width, width, width, conv, pair=pair)]
        )
        self.middle = Block(width, width, width, conv, pair=pair)
        self.up = Block(2 * width, width, width, conv, pair=pair)
        self.conv_out = conv(width, channels, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        time = embed(timestep, self.width)
        hidden = self.conv_in(sample)
        fine = self._of(self.down[0](hidden, time))
        pool = F.avg_pool2d if sample.ndim == 4 else F.avg_pool3d
        coarse = self._of(self.down[1](sample=pool(fine, 2), time=time))
        wide = F.interpolate(self._of(self.middle(coarse, time)), scale_factor=2.0)
        return self.conv_out(self._of(self.up(torch.cat([wide, fine], 1), time)))

    def _of(self, output: Any) -> Tensor:
        return output[0] if self.pair else output


class Layer(nn.Module):
    """A transformer's, with adaptive scales as in DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.scales = nn.Linear(width, 2 * width)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        shift, scale = self.scales(time)[:, None].chunk(2, -1)
        told = self.norm(tokens) * (1 + scale) + shift
        tokens = tokens + self.attention(told, told, told, need_weights=False)[0]
        return tokens + self.mlp(self.norm(tokens))


class SmallDiT(nn.Module):
    """Pictures of 16x16 px as 64 tokens; positions are a layer's weight that is used without calling the layer."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.positions = nn.Embedding(64, width)
        self.time = nn.Linear(width, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.head = nn.Linear(width, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions.weight
        time = F.silu(self.time(embed(t, tokens.shape[-1])))
        for layer in self.layers:
            tokens = layer(tokens, time)
        return F.pixel_shuffle(self.head(tokens).transpose(1, 2).unflatten(2, (8, 8)), 2)


class SoundUNet(nn.Module):
    """Of mel spectrograms [B, 1, 20, T]: from there on one-dimensional, along time; returns a table."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.bands = nn.Conv2d(1, width, (20, 3), (20, 3))
        self.encoder = nn.ModuleList([nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 3, padding=1)])
        self.decoder = nn.Conv1d(2 * width, width, 3, padding=1)
        self.out = nn.ConvTranspose2d(width, 1, (20, 3), (20, 3))

    def forward(self, spectrogram: Tensor, timestep: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        hidden = self.bands(spectrogram).squeeze(2) + embed(timestep, self.bands.out_channels)[..., None]
        fine = F.silu(self.encoder[0](hidden))
        coarse = F.silu(self.encoder[1](F.avg_pool1d(fine, 2)))
        hidden = F.silu(self.decoder(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1)))
        return {"noise": gain * self.out(hidden.unsqueeze(2))}
