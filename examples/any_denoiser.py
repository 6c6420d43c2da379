"""Train a control of a model that Bridle does not know: a small U-Net, written here, that draws shapes.

Nothing is downloaded. The U-Net first learns to draw (a flow from noise to pictures, arXiv:2209.03003) and is locked;
then a control learns to place what it draws where an outline says. A minute and a half of one core:

    python examples/any_denoiser.py out/

Writes out/any_denoiser.png and the control's folder, and prints how well shapes fill their outlines.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from bridle import Control, attach, load_module_control, save_control
from bridle.sample.picture import grid

SIZE_PX, WIDTH = 16, 32
BATCH, BASE_STEPS, CONTROL_STEPS, SAMPLE_STEPS = 32, 1200, 600, 20
SHOWN, MEASURED = 4, 64


# --- a model and its data, as they would be there already


class Block(nn.Module):
    """Two convolutions beside a shortcut, told the time by a shift. Features [B, C, h, w], time [B, D]."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, channels_in), nn.GroupNorm(8, channels)])
        self.first, self.second = (
            nn.Conv2d(channels_in, channels, 3, padding=1),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        self.time, self.shortcut = nn.Linear(WIDTH, channels), nn.Conv2d(channels_in, channels, 1)

    def forward(self, features: Tensor, time: Tensor) -> Tensor:
        hidden = self.first(F.silu(self.norms[0](features))) + self.time(time)[..., None, None]
        return self.shortcut(features) + self.second(F.silu(self.norms[1](hidden)))


class UNet(nn.Module):
    """Noisy pictures [B, 3, 16, 16] and times [B] in [0, 1] to the flow, of the pictures' shape."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU())
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.down = nn.ModuleList([Block(WIDTH, WIDTH), Block(WIDTH, 2 * WIDTH), Block(2 * WIDTH, 2 * WIDTH)])
        self.middle = Block(2 * WIDTH, 2 * WIDTH)
        self.up = nn.ModuleList([Block(4 * WIDTH, 2 * WIDTH), Block(4 * WIDTH, WIDTH), Block(2 * WIDTH, WIDTH)])
        self.head = nn.Conv2d(WIDTH, 3, 3, padding=1)

    def forward(self, pictures: Tensor, times: Tensor) -> Tensor:
        angles = 1000 * times[:, None] * torch.exp(torch.arange(WIDTH // 2) * (-math.log(10_000) / (WIDTH // 2)))
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        features, skips = self.stem(pictures), []
        for block in self.down:
            features = block(features, time)
            skips.append(features)
            features = F.avg_pool2d(features, 2)
        features = self.middle(features, time)
        for block in self.up:
            features = block(torch.cat([F.interpolate(features, scale_factor=2.0), skips.pop()], 1), time)
        return self.head(features)


def draw_shapes(count: int, chance: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A bright disc, square or diamond each, on black.

    Returns: pictures [B, 3, 16, 16] in [-1, 1], outlines and insides [B, 1, 16, 16] in [0, 1].
    """
    radius = 2.5 + 2 * torch.rand(count, 1, 1, generator=chance)
    centre = 4 + (SIZE_PX - 9) * torch.rand(2, count, 1, 1, generator=chance)
    x, y = (
        (torch.arange(SIZE_PX).view(1, 1, -1) - centre[0]).abs(),
        (torch.arange(SIZE_PX).view(1, -1, 1) - centre[1]).abs(),
    )
    away = torch.stack([(x.square() + y.square()).sqrt(), torch.maximum(x, y) * 1.13, (x + y) * 0.8])
    kind = torch.randint(3, (count,), generator=chance)
    gap = (away[kind, torch.arange(count)] - radius)[:, None]
    inside, outline = (0.5 - gap).clamp(0, 1), (1 - gap.abs()).clamp(0, 1)
    colours = torch.eye(3)[torch.randint(3, (count,), generator=chance)] * 0.8 + 0.2
    return inside * colours[:, :, None, None] * 2 - 1, outline, inside


def flow_loss(model: nn.Module, pictures: Tensor, chance: torch.Generator) -> Tensor:
    """The error of the predicted flow, from the picture to the noise, at a random time for each picture."""
    noise, times = torch.randn(pictures.shape, generator=chance), torch.rand(len(pictures), generator=chance)
    share = times.view(-1, 1, 1, 1)
    return F.mse_loss(model((1 - share) * pictures + share * noise, times), noise - pictures)


def optimise(parameters: Iterable[nn.Parameter], steps: int, lr: float, loss: Callable[[], Tensor], name: str) -> None:
    """AdamW, with a learning rate that falls to zero."""
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    total = 0.0
    for step in range(1, steps + 1):
        error = loss()
        error.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        total += error.item()
        if step % 100 == 0:
            print(f"{name}: step {step} of {steps}, loss {total / 100:.3f}")
            total = 0.0


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor) -> Tensor:
    """Follow the flow from noise to pictures [B, 3, 16, 16], in steps of equal length."""
    pictures = noise
    for step in range(SAMPLE_STEPS, 0, -1):
        pictures = pictures - model(pictures, torch.full((len(noise),), step / SAMPLE_STEPS)) / SAMPLE_STEPS
    return pictures


# --- its control


def make_control(model: nn.Module, chance: torch.Generator) -> Control:
    """The way down and the middle are copied; the outline enters before the first block of them."""
    pictures, outlines, _ = draw_shapes(2, chance)
    return Control.for_module(
        model, ["down.0", "down.1", "down.2", "middle"], example=(pictures, torch.rand(2)), hint=outlines
    )


def train_control(model: nn.Module, control: Control, chance: torch.Generator) -> None:
    """The model's own loss, with the outlines as hints; attached, the control is in the model's every call."""
    with attach(model, outline=control) as rig:

        def loss() -> Tensor:
            pictures, outlines, _ = draw_shapes(BATCH, chance)
            rig["outline"].set(hint=outlines)
            return flow_loss(model, pictures, chance)

        optimise(control.parameters(), CONTROL_STEPS, 2e-3, loss, "control")


def overlap(pictures: Tensor, insides: Tensor) -> float:
    """Intersection over union of what is drawn and what should be, mean over pictures; 1 is all of it and no more."""
    drawn, wanted = pictures.amax(1, keepdim=True) > 0, insides > 0.5
    shares = (drawn & wanted).sum((1, 2, 3)) / (drawn | wanted).sum((1, 2, 3))
    return shares.mean().item()


def to_image(picture: Tensor) -> np.ndarray:
    """[1 or 3, 16, 16] in [-1, 1] to [128, 128, 3] uint8, each pixel a square of eight."""
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).byte().expand(3, -1, -1).permute(1, 2, 0).numpy()
    return pixels.repeat(8, 0).repeat(8, 1)


def main(folder: Path) -> float:
    """Train, save, load, draw, measure. Returns: the overlap with control, on outlines it has never seen."""
    torch.manual_seed(0)
    chance, began = torch.Generator().manual_seed(0), time.monotonic()
    model = UNet()
    optimise(
        model.parameters(), BASE_STEPS, 2e-3, lambda: flow_loss(model, draw_shapes(BATCH, chance)[0], chance), "base"
    )
    model.requires_grad_(False).eval()

    control = make_control(model, chance)
    train_control(model, control, chance)
    save_control(control, folder / "control", {"base": "examples/any_denoiser.py", "hint": "outline"})
    control = load_module_control(folder / "control", model)

    _, outlines, insides = draw_shapes(MEASURED, chance)
    noise = torch.randn(MEASURED, 3, SIZE_PX, SIZE_PX, generator=chance)
    free = sample(model, noise)
    with attach(model, outline=control) as rig:
        rig["outline"].set(hint=outlines)
        steered = sample(model, noise)
    assert torch.equal(sample(model, noise), free)  # detached, the model is what it was

    rows = [[to_image(image[at]) for image in (outlines * 2 - 1, free, steered)] for at in range(SHOWN)]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid(rows, ["hint", "without control", "with control"])).save(folder / "any_denoiser.png")
    before, after = overlap(free, insides), overlap(steered, insides)
    print(f"overlap with the outlines: {before:.2f} without control, {after:.2f} with it")
    print(f"{folder / 'any_denoiser.png'}, after {time.monotonic() - began:.0f} s")
    return after


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out"))
