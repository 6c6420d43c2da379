"""What both halves of classifier-free guidance have in common, computed for one of them.

The halves differ in their text alone, and the first layers of a U-Net do not see it: its first convolution, the first
residual block, the first self-attention, and the queries of the first cross-attention. In a U-Net whose first level
has no attention it is all of that level.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bridle.kernels.stand_in import Forward, Undo, stand_in

KNOWN = ("DownBlock2D", "CrossAttnDownBlock2D")  # what else an encoder may consist of is not looked into
PLAIN = ("AttnProcessor", "AttnProcessor2_0", "Attend")  # each row for itself; perturbed attention is not


def share_halves(*models: nn.Module) -> Undo:
    """Compute what both halves have in common for one of them. Bit-exact, but for what a batch rounds otherwise.

    That they are equal is seen each time, at the first convolution and at the first residual block.

    Args:
        models: U-Nets, or controls of them; any other is left as it is.

    Returns: what makes the models as they were.
    """
    with ExitStack() as undo:
        for model in models:
            conv_in, blocks = getattr(model, "conv_in", None), getattr(model, "down_blocks", None)
            if isinstance(conv_in, nn.Module) and isinstance(blocks, nn.ModuleList):
                undo.callback(stand_in(conv_in, halve_if_equal))
                prefix = Prefix()
                for module, standing in prefix.members(blocks):
                    undo.callback(stand_in(module, standing))
        return undo.pop_all().close


def halves_equal(*tensors: Tensor) -> bool:
    """Whether in each the first half of the rows is the second; False where gradients are asked for."""
    if torch.is_grad_enabled() or any(len(tensor) % 2 for tensor in tensors):
        return False
    return all(torch.equal(*tensor.chunk(2)) for tensor in tensors)


def twice(half: Tensor) -> Tensor:
    return torch.cat([half, half])


def halve_if_equal(plain: Forward) -> Forward:
    """Looks whether its input's halves are equal: for the latents, which are small."""

    def forward(hidden: Tensor) -> Any:
        return twice(plain(hidden.chunk(2)[0])) if halves_equal(hidden) else plain(hidden)

    return forward


class Prefix:
    """The layers of one model from its first residual block to its first cross-attention's queries.

    Attributes:
        equal: whether what passes through them now has equal halves; told by the first one.
    """

    def __init__(self) -> None:
        self.equal = False

    def members(self, blocks: Any) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        """The layers, in the order they are called in, and what stands in for each."""
        found: list[tuple[nn.Module, Callable[[Forward], Forward]]] = []
        for block in blocks:
            if type(block).__name__ not in KNOWN:
                return found
            for place, resnet in enumerate(block.resnets):
                found.append((resnet, self.later if found else self.first))
                if getattr(block, "has_cross_attention", False):
                    return [*found, *self.attention(block.attentions[place])]
            found += [(module, self.single) for module in block.downsamplers or ()]
        return found

    def attention(self, transformer: Any) -> list[tuple[nn.Module, Callable[[Forward], Forward]]]:
        first = getattr(transformer, "transformer_blocks", [None])[0]
        if first is None or first.attn1 is None or first.attn2 is None or first.only_cross_attention:
            return []
        if {type(first.attn1.processor).__name__, type(first.attn2.processor).__name__} - set(PLAIN):
            return []
        queries = first.attn2.to_q
        return [(transformer.proj_in, self.single), (first.attn1, self.self_attention), (queries, self.single)]

    def first(self, plain: Forward) -> Forward:
        def forward(hidden: Tensor, time: Tensor | None, *others: Any, **more: Any) -> Any:
            self.equal = halves_equal(hidden, *([] if time is None else [time]))
            return self.run(plain, hidden, time, *others, **more)

        return forward

    def later(self, plain: Forward) -> Forward:
        return partial(self.run, plain)

    def run(self, plain: Forward, hidden: Tensor, time: Tensor | None, *others: Any, **more: Any) -> Any:
        if not self.equal:
            return plain(hidden, time, *others, **more)
        half = None if time is None else time.chunk(2)[0]
        return twice(plain(hidden.chunk(2)[0], half, *others, **more))

    def single(self, plain: Forward) -> Forward:
        def forward(hidden: Tensor, *others: Any, **more: Any) -> Any:
            if not self.equal:
                return plain(hidden, *others, **more)
            return twice(plain(hidden.chunk(2)[0], *others, **more))

        return forward

    def self_attention(self, plain: Forward) -> Forward:
        def forward(hidden: Tensor, **more: Any) -> Any:
            if not self.equal or any(value is not None for value in more.values()):
                return plain(hidden, **more)
            return twice(plain(hidden.chunk(2)[0]))

        return forward
