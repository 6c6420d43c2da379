"""What no file filled stays NaN, whatever layer it is in."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from bridle.base.blank import Blank, check_filled
from bridle.errors import BaseError

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "convolution": lambda: nn.Conv2d(4, 4, 3),
    "upwards": lambda: nn.ConvTranspose2d(4, 4, 3),
    "layer norm": lambda: nn.LayerNorm(4),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "batch norm": lambda: nn.BatchNorm2d(4),
    "embedding": lambda: nn.Embedding(4, 4),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "activation": lambda: nn.PReLU(),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_every_weight_is_nan_until_it_is_copied_into(layer: str) -> None:
    made, filled = LAYERS[layer](), LAYERS[layer]()
    state = torch.get_rng_state()
    with Blank():
        blank = LAYERS[layer]()
        assert all(weight.isnan().all() for weight in blank.parameters())
        filled.load_state_dict(made.state_dict())
    assert torch.equal(torch.get_rng_state(), state), "it drew random numbers"
    assert all(torch.equal(a, b) for a, b in zip(filled.parameters(), made.parameters(), strict=True))
    check_filled({"unet": filled}, "here")
    with pytest.raises(BaseError, match=r"base here is damaged: it lacks, or has NaN in, .* weights of its unet"):
        check_filled({"unet": blank}, "here")


def test_afterwards_layers_start_as_ever() -> None:
    with Blank():
        pass
    assert nn.Linear(4, 4).weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_none_is_enough(dtype: torch.dtype) -> None:
    layer = nn.Linear(64, 64).to(dtype)
    nn.init.constant_(layer.weight, torch.finfo(dtype).max)  # the sum is infinite, which is no NaN
    check_filled({"unet": layer}, "here")
    with torch.no_grad():
        layer.weight[3, 5] = torch.nan
    with pytest.raises(BaseError, match="1 of the 2 weights of its unet, such as weight"):
        check_filled({"unet": layer}, "here")
