"""The block does what equation 2 says, around any module, and starts as the locked block."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bridle.control.block import ControlledBlock, zero_conv, zero_linear

Parts = tuple[nn.Module, nn.Module, nn.Module, Tensor]


def around_linear() -> Parts:
    return nn.Linear(6, 6), zero_linear(6, 6), zero_linear(6, 6), torch.randn(2, 5, 6)


def around_conv2d() -> Parts:
    return nn.Conv2d(4, 8, 3, padding=1), zero_conv(4, 4), zero_conv(8, 8), torch.randn(2, 4, 6, 6)


def around_conv3d() -> Parts:
    return nn.Conv3d(3, 3, 3, padding=1), zero_conv(3, 3, 3), zero_conv(3, 3, 3), torch.randn(2, 3, 4, 4, 4)


def around_sequence() -> Parts:
    block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Dropout(0.5))
    return block, zero_conv(4, 4), zero_conv(4, 4), torch.randn(2, 4, 6, 6)


any_block = pytest.mark.parametrize("make", [around_linear, around_conv2d, around_conv3d, around_sequence])


@any_block
def test_at_the_start_the_output_is_that_of_the_locked_block(make: Callable[[], Parts]) -> None:
    block, zero_in, zero_out, x = make()
    controlled = ControlledBlock(block, zero_in, zero_out)
    assert torch.equal(controlled(x, torch.randn_like(x)), block.eval()(x))


@any_block
def test_the_output_is_the_equation_written_out(make: Callable[[], Parts]) -> None:
    block, zero_in, zero_out, x = make()
    controlled, c = ControlledBlock(block, zero_in, zero_out).eval(), torch.randn_like(x)
    for parameter in (*zero_in.parameters(), *zero_out.parameters(), *controlled.copy.parameters()):
        nn.init.normal_(parameter)
    assert torch.equal(controlled(x, c), block(x) + zero_out(controlled.copy(x + zero_in(c))))
    assert not torch.allclose(controlled(x, c), controlled(x, 2 * c))  # the condition counts


@any_block
def test_training_moves_the_copy_and_never_the_locked_block(make: Callable[[], Parts]) -> None:
    block, zero_in, zero_out, x = make()
    controlled = ControlledBlock(block, zero_in, zero_out)
    before = {name: value.clone() for name, value in controlled.state_dict().items()}
    trained = [parameter for parameter in controlled.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(3):
        controlled(x, torch.ones_like(x)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = controlled.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("locked.") for name in moved)
    assert {name.split(".")[0] for name in moved} == {"copy", "zero_in", "zero_out"}
