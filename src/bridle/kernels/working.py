"""Forms of a weight to compute with, made when they are first needed and again once the weight may have changed."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from bridle.kernels import native

BF16 = torch.bfloat16
Form = Callable[[Tensor], Tensor]


class Working:
    """The forms of one parameter.

    Training keeps float32 weights and computes in bfloat16. Autocast casts a weight at every use, and autograd then
    holds each cast until the backward pass; here both passes share one.
    """

    def __init__(self) -> None:
        self.made: dict[str, Tensor] = {}
        self.of: tuple[int, int] | None = None

    def get(self, weight: Tensor, name: str, form: Form, kind: torch.dtype = BF16) -> Tensor:
        """The form of that name: `form` of the weight as numbers of a kind.

        A change of the weight is known by its version, which PyTorch counts; see `count_changes`.
        """
        now = (weight.data_ptr(), weight._version)
        if now != self.of:
            self.made, self.of = {}, now
        if kind is not BF16:
            name = f"{kind} {name}"
        if name not in self.made:
            with torch.no_grad():
                self.made[name] = form(self._cast(weight, kind))
        return self.made[name]

    def _cast(self, weight: Tensor, kind: torch.dtype) -> Tensor:
        """Kept where the weight is trained: of locked ones only what is packed is needed again."""
        if weight.dtype is kind:
            return weight.detach()
        if kind is BF16 and "cast" in self.made:
            return self.made["cast"]
        made = weight.detach().to(kind)
        if kind is BF16 and weight.requires_grad:
            self.made["cast"] = made
        return made

    def renew(self, weight: Tensor) -> None:
        """Keep the cast alone: somebody who changed the weight has changed it as well."""
        self.made, self.of = {"cast": self.made["cast"]}, (weight.data_ptr(), weight._version)


def working(module: nn.Module, name: str) -> Working:
    """The forms of a module's parameter; kept with the module, but not copied, saved or moved with it."""
    kept = vars(module).setdefault("_bridle_working", Forms())
    found: Working = kept.setdefault(name, Working())
    return found


def forget_forms(module: nn.Module) -> Callable[[], None]:
    """Returns: what forgets all forms that are made from now on, however long their weights last."""
    known = {name: (forms.of, set(forms.made)) for name, forms in vars(module).get("_bridle_working", {}).items()}

    def forget() -> None:
        for name, forms in vars(module).get("_bridle_working", {}).items():
            of, names = known.get(name, (None, ()))
            forms.made = {key: made for key, made in forms.made.items() if forms.of == of and key in names}
        if not known:
            vars(module).pop("_bridle_working", None)

    return forget


class Forms(dict[str, Working]):
    """Of one module. A deep copy of the module starts without any."""

    def __deepcopy__(self, memo: object) -> "Forms":
        return Forms()

    def __reduce__(self) -> tuple[type["Forms"], tuple[()]]:
        return Forms, ()


def cast(module: nn.Module, name: str, kind: torch.dtype = BF16) -> Any:
    """A module's parameter as numbers of a kind; None where it has none."""
    parameter = getattr(module, name)
    return None if parameter is None else working(module, name).get(parameter, "cast", identity, kind)


class Layer:
    """A convolution or linear layer, as kernels use it.

    Args:
        fixed: whether the weight stays as it is for long, so that it is worth packing; a locked one does.
        sparing: whether memory is worth more than time: then no form of the weight is kept.
    """

    def __init__(self, module: Any, *, fixed: bool = False, sparing: bool = False) -> None:
        self.module, self.fixed, self.sparing = module, fixed, sparing

    @property
    def trained(self) -> bool:
        """Whether the weight will be another one in the next step."""
        return self.module.weight.requires_grad and not self.fixed

    @property
    def lasts(self) -> bool:
        """Whether a form of the weight is made once for many steps."""
        return not (self.trained or self.sparing)

    def form(self, name: str, form: Form, kind: torch.dtype = BF16) -> Tensor:
        """See `Working.get`."""
        weight = self.module.weight
        if self.sparing:
            with torch.no_grad():
                return form(weight.detach().to(kind))
        return working(self.module, "weight").get(weight, name, form, kind)

    def bias(self, kind: torch.dtype = BF16) -> Any:
        return cast(self.module, "bias", kind)


def count_changes(optimizer: Optimizer, *_: Any) -> None:
    """Have an optimiser's step count as a change of its weights: that of fused ones does not by itself.

    To be registered as a hook after steps; it leaves alone what has an attribute `counts_changes`.
    """
    if not getattr(optimizer, "counts_changes", False):
        increment_version([weight for group in optimizer.param_groups for weight in group["params"]])


def learns(*parts: Tensor | None) -> bool:
    """Whether any of what is computed with wants a gradient."""
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


def gradient_type(weight: Tensor) -> torch.dtype:
    """What type of number its gradient is to have; before PyTorch 2.10 it is the weight's."""
    return (weight.is_leaf and getattr(weight, "grad_dtype", None)) or weight.dtype


def numbers_of(thing: Any) -> torch.dtype:
    """The type of number that a tensor, or a model, is computed with: autocast's, or else its own."""
    device = thing.device.type
    kind: torch.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else thing.dtype
    return kind


def computed_in(hidden: Tensor) -> torch.dtype | None:
    """In what kernels compute with these features, by their type or by autocast; None where there are none for that."""
    if hidden.device.type != "cpu":
        return None
    kind = numbers_of(hidden)
    return kind if kind in (BF16, torch.float32) else None


def identity(weight: Tensor) -> Tensor:
    return weight


def sum_rows(rows: Tensor) -> Tensor:
    """[N, C] to [C]: PyTorch's own sum over rows first makes a float32 copy of all of them."""
    if native.library(rows.dtype) is not None:
        return native.sum_rows(rows.contiguous())
    return (rows.new_ones(1, len(rows)) @ rows)[0]
