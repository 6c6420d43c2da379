"""AdamW (arXiv 1711.05101) of weights as they lie in memory, with moments in float32 or in 8 bits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import AdamW
from torch.optim.adamw import adamw

from bridle.kernels import eight_bit, native
from bridle.kernels.working import Working

LAST = "_last"  # after the name of blocks that follow channels last


class DenseAdamW(AdamW):
    """PyTorch's fused AdamW, which copies all that is not contiguous on the way in and out, given it as it lies.

    Weights that convolve with channels last are dense, but in another order; the update asks for no order. On a CPU
    that can compile, a loop of our own takes its place, which needs fewer passes; gradients may then be bfloat16.
    """

    def __init__(
        self, groups: list[dict[str, Any]], weight_decay: float, products: Mapping[nn.Parameter, Working]
    ) -> None:
        super().__init__(groups, weight_decay=weight_decay, fused=True)
        self.products = products
        self.counts_changes = True

    def fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What one begins with: on its device, in its order in memory."""
        step = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        divide = getattr(self, "grad_scale", None)
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = self.fresh(parameter)
            if parameters and compiles(parameters):
                self.by_loop(group, parameters, 1.0 if divide is None else 1.0 / divide.item())
                continue
            states = [self.state[parameter] for parameter in parameters]
            adamw(
                [as_it_lies(parameter) for parameter in parameters],
                [as_it_lies(lying_like(parameter, parameter.grad)) for parameter in parameters],
                [as_it_lies(state["exp_avg"]) for state in states],
                [as_it_lies(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                grad_scale=divide,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            increment_version(parameters)

    def by_loop(self, group: dict[str, Any], parameters: Sequence[nn.Parameter], scale: float) -> None:
        """The same for a group by our own loop. Args: scale: what gradients are multiplied by."""
        beta1, beta2 = group["betas"]
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            state["step"] += 1
            taken = int(state["step"])
            corrected, root = 1 / (1 - beta1**taken), (1 - beta2**taken) ** -0.5
            how = group["lr"], beta1, beta2, group["eps"], group["weight_decay"], corrected, root
            gradient = lying_like(parameter, gradient)
            forms = self.products.get(parameter)
            cast = None if forms is None else forms.made.get("cast")
            self.update(parameter, gradient, state, cast, scale, *how)
            increment_version(parameter)
            if forms is not None and cast is not None:
                forms.renew(parameter)

    def update(self, parameter: nn.Parameter, gradient: Tensor, state: Mapping[str, Tensor], *rest: Any) -> None:
        """One weight. Args: rest: what `native.adamw` takes, from `cast` on."""
        native.adamw(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], *rest)


class DenseAdamW8bit(DenseAdamW):
    """The same with moments in 8 bits, as bitsandbytes' AdamW8bit keeps them; on a CPU that can compile.

    State of weights of 4096 numbers and more is bitsandbytes', but that blocks follow the order in memory: where that
    is another one than the indices', the blocks' largest numbers go by other names.
    """

    def fresh(self, parameter: nn.Parameter) -> dict[str, Any]:
        if parameter.numel() < eight_bit.LEAST:
            return {"step": 0, "state1": torch.zeros_like(parameter), "state2": torch.zeros_like(parameter)}
        state: dict[str, Any] = {"step": 0}
        for signed, codes, largest in moments_of(parameter):
            nothing = int(eight_bit.quantize(torch.zeros(1), signed=signed)[0])
            state[codes] = torch.full_like(parameter, nothing, dtype=torch.uint8)
            state[largest] = torch.zeros(-(-parameter.numel() // eight_bit.BLOCK))
        return state

    def update(self, parameter: nn.Parameter, gradient: Tensor, state: Mapping[str, Tensor], *rest: Any) -> None:
        if parameter.numel() < eight_bit.LEAST:
            native.adamw(parameter, gradient, state["state1"], state["state2"], *rest)
            return
        (_, first, largest_first), (_, second, largest_second) = moments_of(parameter)
        parts = state[first], state[second], state[largest_first], state[largest_second]
        eight_bit.adamw(parameter, gradient, *parts, *rest)


def moments_of(parameter: Tensor, *, other: bool = False) -> list[tuple[bool, str, str]]:
    """Of both moments: whether they have a sign, and the names of the codes and of the blocks' largest numbers.

    Args:
        other: the names for the other of the two orders in which a weight may lie.
    """
    order = LAST if parameter.is_contiguous() == other else ""
    return [(True, "state1", f"absmax1{order}"), (False, "state2", f"absmax2{order}")]


def reorder_blocks(saved: Mapping[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """8-bit state of a weight, quantised again where blocks followed another order than that in which it lies."""
    last, found = not parameter.is_contiguous(), dict(saved)
    ours, theirs = moments_of(parameter), moments_of(parameter, other=True)
    for (signed, codes, largest), (_, _, before) in zip(ours, theirs, strict=True):
        if before not in found:
            continue
        numbers = eight_bit.dequantize(turned(saved[codes], not last).flatten(), found.pop(before), signed=signed)
        lying = turned(turned_back(numbers.view(turned(parameter, not last).shape), not last), last)
        again, found[largest] = eight_bit.quantize(lying.flatten(), signed=signed)
        found[codes] = turned_back(again.view(lying.shape), last)
    return found


def turned(tensor: Tensor, last: bool) -> Tensor:
    """[D, C, h, w] with its indices in the order of channels last, where that is asked for."""
    return tensor.permute(0, 2, 3, 1) if last else tensor


def turned_back(tensor: Tensor, last: bool) -> Tensor:
    return tensor.permute(0, 3, 1, 2) if last else tensor


def compiles(parameters: Sequence[Tensor]) -> bool:
    """Whether our own loops do: for dense float32 weights on a CPU that can compile, whole in this process."""
    plain = all(type(parameter) in (Tensor, nn.Parameter) for parameter in parameters)
    kind = {(parameter.device.type, parameter.dtype) for parameter in parameters}
    return plain and kind == {("cpu", torch.float32)} and native.library() is not None


def lying_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its numbers in the order in which the parameter's lie."""
    mine, its = parameter.stride(), gradient.stride()
    if mine == its or all(size == 1 or a == b for size, a, b in zip(parameter.shape, mine, its, strict=True)):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def as_it_lies(tensor: Tensor) -> Tensor:
    """The same memory as a contiguous tensor, where its channels are last."""
    return turned(tensor, tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
