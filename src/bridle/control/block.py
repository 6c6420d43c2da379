"""The unit that everything else is made of: a locked block, its trainable copy, and two zero convolutions.

In: the block's input x and a condition c. Out: y_c = F(x; Θ) + Z(F(x + Z(c; Θz1); Θc); Θz2). arXiv:2302.05543, eq. 2.
"""

import copy

from torch import Tensor, nn

CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def zero(layer: nn.Module) -> nn.Module:
    """Set every weight and bias of a layer to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def zero_conv(channels_in: int, channels_out: int, dimensions: int = 2) -> nn.Module:
    """A 1x1 convolution that starts as zero: [B, channels_in, ...] to [B, channels_out, ...].

    It still learns: its own gradient is the product of its input and what arrives from above, and neither is zero.
    """
    return zero(CONVOLUTIONS[dimensions](channels_in, channels_out, kernel_size=1))


def zero_linear(width_in: int, width_out: int) -> nn.Module:
    """The same for tokens: [B, L, width_in] to [B, L, width_out]."""
    return zero(nn.Linear(width_in, width_out))


class ControlledBlock(nn.Module):
    """Any block, with a control beside it. Until the first optimiser step its output is the locked one's, bit for bit.

    Args:
        block: F, called with one tensor and returning one; it is locked here, its copy is trained.
        zero_in: Z(·; Θz1), from the condition to the block's input; `zero_conv(...)` or `zero_linear(...)`.
        zero_out: Z(·; Θz2), from the copy's output to the block's output.
    """

    def __init__(self, block: nn.Module, zero_in: nn.Module, zero_out: nn.Module) -> None:
        super().__init__()
        self.copy = copy.deepcopy(block).requires_grad_(True)
        self.locked = block.requires_grad_(False).eval()
        self.zero_in = zero_in
        self.zero_out = zero_out

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        y: Tensor = self.locked(x)
        controlled: Tensor = self.zero_out(self.copy(x + self.zero_in(c)))
        return y + controlled

    def train(self, mode: bool = True) -> "ControlledBlock":
        """The locked block stays in evaluation mode, so that its dropout and statistics stay still as well."""
        super().train(mode)
        self.locked.eval()
        return self
