"""The control of any model, made by naming the blocks that it steers.

From the equation of a controlled block, y_c = F(x) + Z(F(x + Z(c))): F here is all that lies between the model's input
and the last tap. The copy of it is called as the model is, takes the hint's features at one block's input, and stops
after the last tap; what it computed at each tap goes through a zero layer and is added in the model by a hook.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from bridle.control.block import zero_conv, zero_linear
from bridle.control.control import Call, Control, Links, Pull, denoiser_of, read_call
from bridle.control.delta import check_delta
from bridle.control.grid import factors_between, grid_encoder, lay_out
from bridle.control.hint import HintEncoder, check_range, to_hint
from bridle.control.residuals import Residuals
from bridle.control.survey import Channels, Place, survey
from bridle.control.taps import Taps, call_steered, change_first, change_input
from bridle.control.text import Text
from bridle.errors import BaseError, BridleError, ConfigError, FileError, HintError, TrainError

PICTURE_AXES = 2


class Done(BaseException):
    """The last tap was reached. No `Exception`, so that no model catches it."""


class ModuleControl(Control):
    """Made by `Control.for_module`; saved by `save_control`, loaded by `load_module_control`.

    Args:
        part: the copy of the model, without what comes after the last tap.
        config: what `describe` gives; JSON.
    """

    CLASS = "BridleModuleControl"
    SHARED = ()

    def __init__(self, part: nn.Module, config: dict[str, Any]) -> None:
        factors = tuple(int(factor) for factor in config["factors"])
        super().__init__(config, "official", "all", max(factors))
        self.INPUT, self.factors = config["input"], factors
        self.entry, self.places = Place(**config["entry"]), [Place(**place) for place in config["taps"]]
        if not self.places or min(factors) < 1:
            raise ValueError(f"{len(self.places)} taps, factors {factors}")
        self.part = part
        like = next((value for value in part.parameters() if value.is_floating_point()), None)
        if like is None:
            raise BaseError(f"nothing up to the block {self.places[-1].name!r} can be trained; tap a later one")
        self.hint = grid_encoder(self.hint_channels, self.entry.width, self.factors).to(like.device, like.dtype)
        self.zeros = nn.ModuleList([zero_layer(place) for place in self.places]).to(like.device, like.dtype)
        self._features: Tensor | None = None  # while the copy runs
        self._seen: list[Tensor] = []
        # For good, not per run: a block that is run again on the way back must not go on without its hint unnoticed.
        part.get_submodule(self.entry.name).register_forward_pre_hook(self._enter, with_kwargs=True)
        for index, place in enumerate(self.places):
            part.get_submodule(place.name).register_forward_hook(partial(self._note, index))

    @classmethod
    def of(
        cls,
        model: Any,
        taps: Sequence[str],
        example: Sequence[Any] | Mapping[str, Any],
        hint: Tensor,
        hint_at: str | None,
        channels: Channels | None,
    ) -> Self:
        """See `Control.for_module`."""
        model = denoiser_of(model)
        call = name_arguments(model, example)
        config = describe(model, taps, call, hint, hint_at, channels)
        control = cls.rebuild(model, config).eval()
        try:
            with torch.no_grad():
                control.residuals(call, control.encode(control.read_hint(hint).to(control.device)))
        except BridleError:
            raise
        except Exception as error:
            remedy = "tap a later block, so that more of it is copied"
            raise BaseError(f"the model up to its last tap does not run by itself ({error}): {remedy}") from error
        return control

    @classmethod
    def rebuild(cls, model: nn.Module, config: dict[str, Any]) -> Self:
        """An untrained one from what its file says. Raises: KeyError, TypeError, ValueError: that is damaged."""
        blocks = dict(model.named_modules())
        kept_out: dict[int, Any] = {id(blocks[name]): nn.Identity() for name in config["dropped"]}
        return cls(copy.deepcopy(model, kept_out).requires_grad_(True), config)

    @classmethod
    def copy_of(
        cls,
        denoiser: Any,
        hint_channels: int,
        hint_encoder: HintEncoder,
        links: Links,
        size_factor: int,
        layers: int | None,
    ) -> NoReturn:
        raise BaseError(f"base is a {type(denoiser).__name__}, of no family: make its control with Control.for_module")

    @classmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> NoReturn:
        raise FileError(f"this control is of a {config.get('model')}: load it with load_module_control(folder, model)")

    @property
    def device(self) -> torch.device:
        return next(self.hint.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hint.parameters()).dtype

    @property
    def zero_layers(self) -> list[nn.Module]:
        return list(self.zeros)

    @property
    def joints(self) -> tuple[str, ...]:
        return (self.CLASS, *(place.name for place in self.places))

    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        """By position, as many of the three as the example had arguments."""
        return dict(zip(self.config["arguments"], (latents, timesteps, text.states), strict=False))

    def timestep(self, call: Call) -> Any:
        return call.get("timestep", torch.empty(0))  # nothing: then no share of the steps can be told

    def read_hint(self, hint: Any) -> Tensor:
        """Pictures as for any control; sound and volumes as tensors [B, K, ...] in [0, 1]."""
        axes = len(self.factors)
        if axes == PICTURE_AXES:
            return to_hint(hint, self.hint_channels)
        expected = f"expected a tensor [B, {self.hint_channels}, {', '.join('DHW'[-axes:])}] in [0, 1]"
        if not isinstance(hint, Tensor):
            raise HintError(f"hint is a {type(hint).__name__}; {expected}")
        hint = hint[None] if hint.ndim == axes + 1 else hint
        if hint.ndim != axes + 2 or hint.shape[1] != self.hint_channels or not hint.numel():
            raise HintError(f"hint has shape {list(hint.shape)}; {expected}")
        check_range(hint)
        return hint.float().contiguous()

    def check_hint(self, hint: Tensor, call: Call) -> None:
        """Whether its sizes can be divided; what they must come to is seen where the hint enters."""
        if hint.ndim != len(self.factors) + 2 or hint.shape[1] != self.hint_channels:
            raise HintError(
                f"hint has shape {list(hint.shape)}; expected {self.hint_channels} channels, as in training"
            )
        if any(size % factor for size, factor in zip(hint.shape[2:], self.factors, strict=True)):
            raise HintError(
                f"hint has sizes {list(hint.shape[2:])}; expected multiples of {list(self.factors)}: resize it"
            )

    def encode(self, hint: Tensor) -> Tensor:
        """[B, K, *grid] to [B, C, *coarse]."""
        features: Tensor = self.hint(hint.to(self.dtype))
        return features

    def residuals(self, call: Call, features: Tensor) -> Residuals:
        seen = self._run(call, features)
        links = tuple(layer(tensor) for layer, tensor in zip(self.zeros, seen, strict=True))
        tokens = features.ndim == PICTURE_AXES + 2 and all(link.ndim == 3 for link in links)
        return Residuals(links, grid=(features.shape[2], features.shape[3]) if tokens else None)

    def _run(self, call: Call, features: Tensor) -> list[Tensor]:
        """What the copy computes at every tap."""
        self._features, self._seen = features, []
        try:
            self.part(**call)
        except Done:
            return self._seen
        finally:
            self._features, self._seen = None, []
        raise BaseError(f"the model did not reach the tap {self.places[-1].name!r}, as it did in the example")

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        features = self._features
        if features is None:
            remedy = "turn off gradient checkpointing in the model, and make the control again"
            raise TrainError(f"block {self.entry.name!r} of a control was run by itself: {remedy}")
        last = not self.entry.axes
        return change_input(args, kwargs, lambda tensor: tensor + lay_out(features, tensor, last))

    def _note(self, index: int, block: nn.Module, args: Any, output: Any) -> None:
        if index != len(self._seen):
            raise BaseError(f"the tap {self.places[index].name!r} ran in another order than in the example")
        change_first(output, self._keep)
        if index == len(self.places) - 1:
            raise Done

    def _keep(self, tensor: Tensor) -> Tensor:
        self._seen.append(tensor)
        return tensor

    def keywords(self, residuals: Residuals) -> NoReturn:
        raise NotImplementedError("hooks add these residuals; the model has no arguments for them")

    def join(self, denoiser: Any, call: Call, residuals: Residuals) -> Tensor:
        output = call_steered(self, denoiser, call, residuals)
        kept: list[Tensor] = []
        change_first(getattr(output, "sample", output), lambda tensor: kept.append(tensor) or tensor)
        return kept[0]

    def steer(self, denoiser: nn.Module, pull: Pull) -> Callable[[], None]:
        taps = Taps(denoiser, pull)
        for link, place in enumerate(self.places):
            taps.add_to_output(denoiser.get_submodule(place.name), link)
        return taps.remove

    def check_fit(self, denoiser: Any, owner: str, device: torch.device | None = None) -> None:
        remedy = "attach it to the model that it was made of, or to one built alike"
        for name, problem in list_misfits(self.part, denoiser):
            raise ConfigError(f"{owner} does not fit this {type(denoiser).__name__}: {name} {problem}; {remedy}")
        weight = next(denoiser.parameters())
        device = device or weight.device
        if (self.device, self.dtype) != (device, weight.dtype):
            ours, theirs = f"{self.device} {self.dtype}", f"{device} {weight.dtype}"
            raise ConfigError(f"{owner} is on {ours}, the model on {theirs}: move one of them with .to(device, dtype)")
        check_delta(dict(denoiser.named_parameters()), self.base_delta, owner)


def describe(
    model: nn.Module,
    taps: Sequence[str],
    call: Mapping[str, Any],
    hint: Tensor,
    hint_at: str | None,
    channels: Channels | None,
) -> dict[str, Any]:
    """All that a control of a model is built from, beside the model. JSON."""
    if not 3 <= hint.ndim <= 5:
        raise HintError(f"hint has shape {list(hint.shape)}; expected [B, K, N], [B, K, H, W] or [B, K, D, H, W]")
    inputs = [name for name, value in call.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if not inputs:
        raise BaseError(f"the example {list(call)} holds no tensor of real numbers; expected what is to be denoised")
    seen = survey(model, call, taps, hint_at, hint.ndim - 2, channels)
    return {
        "model": type(model).__name__,
        "arguments": list(call),
        "input": inputs[0],
        "entry": asdict(seen.entry),
        "taps": [asdict(place) for place in seen.taps],
        "dropped": list(seen.dropped),
        "factors": list(factors_between(hint.shape[2:], seen.positions)),
        "conditioning_channels": hint.shape[1],
    }


def name_arguments(model: nn.Module, example: Sequence[Any] | Mapping[str, Any]) -> dict[str, Any]:
    """An example as a call. Raises: BaseError: the model's arguments have no names."""
    if isinstance(example, Tensor):
        example = (example,)
    call = read_call(model, (), example) if isinstance(example, Mapping) else read_call(model, tuple(example), {})
    if any(isinstance(value, tuple) and name == "args" for name, value in call.items()):
        raise BaseError(f"{type(model).__name__}.forward takes *args; expected arguments with names: wrap the model")
    return call


def zero_layer(place: Place) -> nn.Module:
    return zero_conv(place.width, place.width, place.axes) if place.axes else zero_linear(place.width, place.width)


def list_misfits(part: nn.Module, model: nn.Module) -> Iterator[tuple[str, str]]:
    """The parameters of a copied part that the model has not, or in another shape."""
    theirs = dict(model.named_parameters())
    for name, parameter in part.named_parameters():
        if name not in theirs:
            yield name, "is none of its parameters"
        elif parameter.shape != theirs[name].shape:
            yield name, f"has shape {list(theirs[name].shape)}, the control's {list(parameter.shape)}"
