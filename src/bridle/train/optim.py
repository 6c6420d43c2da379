"""Optimisers. In: groups of parameters. Out: a torch optimiser, and its state as a flat table of named tensors."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal
from typing import cast as typed

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from bridle.errors import ConfigError, TrainError
from bridle.kernels import eight_bit, native
from bridle.kernels.working import Working
from bridle.train.adamw import DenseAdamW, DenseAdamW8bit, as_it_lies, compiles, reorder_blocks

OptimizerKind = Literal["adamw", "adamw8bit"]
TABLES = ("qmap1", "qmap2")  # of bitsandbytes: constants, the same for every parameter


def make_optimizer(
    kind: OptimizerKind,
    groups: Sequence[Mapping[str, Any]],
    *,
    weight_decay: float,
    products: Mapping[nn.Parameter, Working] | None = None,
) -> Optimizer:
    """Make an optimiser.

    Args:
        kind: "adamw" keeps 8 bytes of state per parameter, "adamw8bit" 2 (in tensors of 4096 and more).
        groups: each {"params": [...], "lr": ...}, and whatever else the caller keeps there.
        products: weights whose gradients may be bfloat16, and the cast of which is renewed with them.

    Raises: ConfigError: the kind needs an extra that is not installed, where our own loops do not compute it.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    if kind == "adamw":
        return DenseAdamW([dict(group) for group in groups], weight_decay, products or {})
    ours = compiles(parameters) and eight_bit.library() is not None
    for parameter in parameters:
        # Blocks of 8-bit moments follow the order in memory; bitsandbytes knows one order alone, we know two.
        if not (ours and as_it_lies(parameter).is_contiguous()):
            parameter.data = parameter.data.contiguous()
    if ours:
        return DenseAdamW8bit([dict(group) for group in groups], weight_decay, products or {})
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        remedy = "pip install bitsandbytes, or set it to 'adamw'"
        raise ConfigError(f"setting train.optimizer is {kind!r}, but bitsandbytes is not installed; {remedy}") from None
    optimizer: Optimizer = AdamW8bit([dict(group) for group in groups], weight_decay=weight_decay)
    return optimizer


def has_eight_bits(on_cpu: bool) -> bool:
    """Whether `make_optimizer` has a kind with 8 bits for dense float32 weights."""
    ours = on_cpu and native.library() is not None and eight_bit.library() is not None
    return ours or find_spec("bitsandbytes") is not None


def halve_gradients(optimizer: Optimizer, *, on: bool) -> None:
    """Have the gradients of an optimiser's products be bfloat16, or float32 again; none may be there yet.

    Products in bfloat16 give no other gradients anyway. Sums of several passes, though, are to be float32.
    """
    products = list(optimizer.products) if isinstance(optimizer, DenseAdamW) else []
    if products and compiles(products) and hasattr(Tensor, "grad_dtype"):
        for weight in products:
            weight.grad_dtype = torch.bfloat16 if on else torch.float32


def clip(optimizer: Optimizer, parameters: Sequence[nn.Parameter], most: float, scaled: float = 1.0) -> float:
    """Scale all gradients down to an L2 norm of at most `most`, for the next step. Returns: the norm before.

    Where the optimiser is fused and nothing is sharded it scales them as it reads them: that saves a pass over all.

    Args:
        scaled: what the loss was multiplied by; the gradients are divided by it first.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients) / scaled
    if isinstance(optimizer, AdamW) and not isinstance(norm, DTensor):
        vars(optimizer)["grad_scale"] = ((norm + 1e-6) / most).clamp(min=1.0) * scaled  # what gradients are divided by
    else:
        if scaled != 1:
            torch._foreach_div_(gradients, scaled)
        nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2, float32: PyTorch's own would be rounded to bfloat16 where gradients are."""
    if all(g.device.type == "cpu" and type(g) is Tensor and is_dense(g) for g in gradients) and native.library():
        return torch.tensor(sum(native.square_sum(gradient) for gradient in gradients)).sqrt()
    return nn.utils.get_total_norm(gradients)


def is_dense(tensor: Tensor) -> bool:
    """Whether it is all of a piece of memory, in any order, of numbers that our loops know."""
    return tensor.dtype in (torch.float32, torch.bfloat16) and as_it_lies(tensor).is_contiguous()


def optimizer_state(optimizer: Optimizer, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
    """The state of every parameter that has taken a step, as "<name>.<entry>".

    Entries are "exp_avg", "exp_avg_sq" and "step" for "adamw"; "state1", "state2", "step" and, where these are uint8,
    "absmax1" and "absmax2" for "adamw8bit" ("absmax1_last" and "absmax2_last" where blocks follow channels last).
    Tensors are the optimiser's own, not copies: write them before the next step. Those of a sharded parameter are
    DTensors.
    """
    states = typed(Mapping[nn.Parameter, dict[str, Any]], optimizer.state)
    return {
        f"{names[parameter]}.{entry}": torch.as_tensor(value)
        for parameter, state in states.items()
        for entry, value in state.items()
        if entry not in TABLES
    }


def restore_optimizer(optimizer: Optimizer, names: Mapping[nn.Parameter, str], tensors: Mapping[str, Tensor]) -> None:
    """Go on with a state that `optimizer_state` gave; what it does not name starts fresh.

    Args:
        optimizer: of the same kind, with any parameters in any groups; it copies the tensors.
        names: of its parameters.

    Raises: TrainError: an entry is missing, or has another shape than the parameter asks for.
    """
    saved: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition(".")
        saved[name][entry] = tensor
    for group_at, group in enumerate(optimizer.param_groups):
        for at, parameter in enumerate(group["params"]):
            optimizer.state.pop(parameter, None)
            if names[parameter] in saved:
                state = fresh_state(optimizer, group_at, at)
                fill(state, reorder_blocks(saved[names[parameter]], parameter), names[parameter])
                optimizer.state[parameter] = state


def fresh_state(optimizer: Optimizer, group_at: int, at: int) -> dict[str, Any]:
    """What the optimiser itself would begin with for one parameter: on its device, in its order in memory."""
    group = optimizer.param_groups[group_at]
    parameter = group["params"][at]
    if isinstance(optimizer, DenseAdamW):
        return optimizer.fresh(parameter)
    bitsandbytes: Any = optimizer
    bitsandbytes.init_state(group, parameter, group_at, at)
    return dict(optimizer.state[parameter])


@torch.no_grad()
def fill(state: dict[str, Any], saved: Mapping[str, Tensor], name: str) -> None:
    """Copy saved entries into a fresh state. Raises: TrainError: they do not fit it."""
    expected = state.keys() - set(TABLES)
    if saved.keys() != expected:
        remedy = "go on with the train.optimizer that the run began with"
        raise TrainError(f"optimiser state of {name} has {sorted(saved)}; expected {sorted(expected)}: {remedy}")
    for entry, value in saved.items():
        if entry == "step" and isinstance(state["step"], int):  # bitsandbytes counts in Python
            state["step"] = int(value)
        elif value.shape != state[entry].shape:
            remedy = "the control or the base was made otherwise"
            shapes = f"{list(value.shape)}; expected {list(state[entry].shape)}"
            raise TrainError(f"optimiser state {name}.{entry} has shape {shapes}: {remedy}")
        else:
            state[entry].copy_(value)
