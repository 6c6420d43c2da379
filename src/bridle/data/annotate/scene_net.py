"""The network behind the depth, normals and segmentation annotators: a picture in, all three maps out.

A U-Net whose three heads share one trunk, because all of them need the same: where the thing ends and how the floor
runs. B is batch, H×W pixels.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 64, 112, 160)  # at a half, a quarter, an eighth and a sixteenth of the picture
FACTOR = 16  # sides are multiples of it
LABELS = 4  # wall, floor, thing, second thing
GROUPS = 8
_OUTPUTS = 1 + 3 + LABELS


@dataclass(frozen=True)
class SceneMaps:
    """depth: [B, H, W], inverse depth of the picture's own range, near is 1. normals: [B, 3, H, W], of length 1; x
    right, y up, z towards the camera. labels: [B, 4, H, W], unnormalised log probabilities."""

    depth: Tensor
    normals: Tensor
    labels: Tensor


class SceneNet(nn.Module):
    """Estimates the maps of simple scenes, in about 1.6 million weights.

    At half the picture's size inside, and with few channels there, because one processor core has to do: the maps come
    to full size by rearranging channels.
    """

    def __init__(self) -> None:
        super().__init__()
        first, second, third, last = WIDTHS
        self.stem = nn.Conv2d(3 * 4, first, 3, padding=1)
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in ((first, second), (second, third), (third, last))
        )
        self.encode = nn.ModuleList((_Block(second), _Block(third), nn.Sequential(_Block(last), _Block(last))))
        self.up = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in ((last, third), (third, second), (second, first)))
        self.decode = nn.ModuleList((_Block(third), _Block(second), _Block(first)))
        self.head = nn.Conv2d(first, _OUTPUTS * 4, 3, padding=1)

    def forward(self, pictures: Tensor) -> SceneMaps:
        """pictures: [B, 3, H, W] in [0, 1], H and W multiples of 16."""
        hidden = self.stem(F.pixel_unshuffle(2 * pictures - 1, 2))
        skips = []
        for down, encode in zip(self.down, self.encode, strict=True):
            skips.append(hidden)
            hidden = encode(down(F.silu(hidden)))
        for up, decode in zip(self.up, self.decode, strict=True):
            hidden = decode(skips.pop() + F.interpolate(up(F.silu(hidden)), scale_factor=2, mode="nearest"))
        depth, normals, labels = F.pixel_shuffle(self.head(F.silu(hidden)), 2).float().split((1, 3, LABELS), 1)
        return SceneMaps(depth[:, 0], F.normalize(normals, dim=1), labels)


class _Block(nn.Module):
    """Adds to its input what two convolutions make of it; nothing at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width, h, w] to the same."""
        return hidden + self.second(F.silu(self.first(F.silu(self.norm(hidden)))))
