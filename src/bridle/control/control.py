"""What all controls have in common, whatever family of bases they steer.

A control meets its base in the base's own words: the arguments of its denoiser's `forward`, by name, which are its
*call*. From a call come the control's residuals, and they go back among the arguments. So training, which makes the
call itself, and `attach`, which overhears a stock pipeline's, run the same code; a family is one small file that says
how to make a call, what is copied, and where the links join.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from bridle.control.delta import check_delta
from bridle.control.hint import HintEncoder
from bridle.control.residuals import Residuals
from bridle.control.text import Text
from bridle.errors import BaseError, ConfigError

Links = Literal["all", "middle"]
Call = Mapping[str, Any]  # the arguments of a denoiser's `forward`, by name
Pull = Callable[[Call], Residuals | None]

# The family of each denoiser, and of each class that a control's configuration may name; imported when needed.
BASES = {
    "UNet2DConditionModel": "bridle.control.unet:UNetControl",
}
CLASSES = {
    "ControlNetModel": "bridle.control.unet:UNetControl",
}
HOMES = BASES | CLASSES


class Control(nn.Module, ABC):
    """The trainable branch. Make one with `Control.from_base`, or load one with `bridle.load_control`.

    Attributes:
        config: what diffusers' class for such controls would be configured with.
        hint_encoder: "official" (loads elsewhere) or "paper" (Bridle only).
        links: "all", or "middle": the skip links are neither computed nor trained.
        size_factor: pixels per latent in each direction.
        base_delta: what training changed in the base, see `bridle.control.delta`; empty where the base stayed locked.
            `attach` applies it. No parameter: it is neither trained nor moved.
    """

    # diffusers' class of such controls; what `config.json` calls them.
    CLASS: ClassVar[str]
    # The settings of a base that a control of it shares, so that it is seen where one does not fit.
    SHARED: ClassVar[tuple[str, ...]]
    # The argument of its denoiser's `forward` that is being denoised, one row per picture.
    INPUT: ClassVar[str] = "sample"
    # Whether `prepare` has anything to do: hints are then pictures of three channels.
    PREPARES: ClassVar[bool] = False
    # Where the parameters are that only the skip links need, which "middle" leaves out.
    SKIPS: ClassVar[tuple[str, ...]] = ()
    # Of the base: what comes after the links, which can be unlocked by itself. Empty: nothing can.
    DECODER: ClassVar[tuple[str, ...]] = ()

    config: dict[str, Any]
    hint_encoder: HintEncoder
    links: Links
    size_factor: int
    base_delta: dict[str, Tensor]

    def __init__(self, config: dict[str, Any], hint_encoder: HintEncoder, links: Links, size_factor: int) -> None:
        super().__init__()
        if links not in ("all", "middle"):
            raise ConfigError(f"links is {links!r}; expected 'all' or 'middle'")
        self.config, self.hint_encoder, self.links, self.size_factor = config, hint_encoder, links, size_factor
        self.base_delta = {}

    @classmethod
    def from_base(
        cls,
        base: Any,
        *,
        hint_channels: int = 3,
        hint_encoder: HintEncoder = "official",
        links: Links = "all",
        size_factor: int = 8,
        layers: int | None = None,
    ) -> "Control":
        """Copy what a control of this base copies.

        Args:
            base: a pipeline, or its U-Net or transformer; it is left as it is.
            hint_channels: of the hint: 1 for a mask, 3 for a picture, any other number as well.
            hint_encoder: "official" or "paper".
            links: "all", or "middle".
            size_factor: pixels per latent in each direction.
            layers: of a transformer: how many of its first blocks are copied; half of them where None.

        Raises: BaseError: the base is of no family that is supported, or needs what none supports. ConfigError: an
            option has no such value, or this family has no such option.
        """
        if hint_channels < 1:
            raise ConfigError(f"hint_channels is {hint_channels}; expected 1 or more")
        denoiser = denoiser_of(base)
        family = control_class(type(denoiser).__name__)
        family.check_base(denoiser)
        return family.copy_of(denoiser, hint_channels, hint_encoder, links, size_factor, layers)

    @classmethod
    def check_base(cls, denoiser: Any) -> None:
        """Raises: BaseError: the denoiser is of this family, but needs what its controls do not carry."""

    @classmethod
    @abstractmethod
    def copy_of(
        cls,
        denoiser: Any,
        hint_channels: int,
        hint_encoder: HintEncoder,
        links: Links,
        size_factor: int,
        layers: int | None,
    ) -> Self:
        """A control of a denoiser: copies with zero convolutions. As `from_base`, which checks what comes in."""

    @classmethod
    @abstractmethod
    def build(cls, config: dict[str, Any], facts: Mapping[str, Any]) -> Self:
        """One without weights, from what its file says. Asked on the meta device, where it takes no memory.

        Raises: TypeError, ValueError, ConfigError: the configuration is damaged.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @property
    def hint_channels(self) -> int:
        return int(self.config["conditioning_channels"])

    @property
    @abstractmethod
    def zero_layers(self) -> list[nn.Module]:
        """The zero convolutions that lead out, one per link, in the order of the links."""

    # --- from a call to residuals

    @abstractmethod
    def call(self, latents: Tensor, timesteps: Tensor, text: Text) -> dict[str, Any]:
        """What the denoiser is called with in training.

        Args:
            latents: [B, C, h, w], noisy.
            timesteps: [B] or a scalar, as the schedule counts noise levels.
        """

    def forward(self, latents: Tensor, timesteps: Tensor, text: Text | Tensor, hint: Tensor) -> Residuals:
        """What this control adds at every link.

        Args:
            latents: [B, C, h, w], noisy.
            timesteps: [B] or a scalar, integers in the base's schedule.
            text: the captions; states [B, L, D] alone where the base takes no more.
            hint: [B, K, H, W] in [0, 1], with H = size_factor * h and W likewise; see `prepare`.

        Raises: HintError: the hint's shape does not fit.
        """
        call = self.call(latents, timesteps, Text.of(text))
        self.check_hint(hint, call)
        return self.residuals(call, self.encode(hint))

    @classmethod
    def prepare(cls, hint: Tensor, pipeline: Any) -> Tensor:
        """Turn a hint into what `encode` takes: nothing to do, unless the base's autoencoder sees hints first.

        Args:
            hint: [B, K, H, W] in [0, 1].
            pipeline: of the base.
        """
        return hint

    @abstractmethod
    def check_hint(self, hint: Tensor, call: Call) -> None:
        """Whether a prepared hint fits what the denoiser is called with. Raises: HintError."""

    @abstractmethod
    def encode(self, hint: Tensor) -> Tensor:
        """A prepared hint's features, [B, ...]. They depend on no timestep: sampling computes them once."""

    @abstractmethod
    def residuals(self, call: Call, features: Tensor) -> Residuals:
        """The same as calling the control, with the hint already encoded."""

    # --- and from residuals to the base

    @abstractmethod
    def keywords(self, residuals: Residuals) -> dict[str, Any]:
        """The residuals as arguments of the denoiser's `forward`."""

    def given(self, call: Call) -> Residuals | None:
        """The residuals that a call brings along, put there by a pipeline with a control of its own."""
        return None

    def timestep(self, call: Call) -> Any:
        """The noise level of a call, as its pipeline's scheduler counts them: a number or a scalar tensor."""
        return call["timestep"]

    def join(self, denoiser: Any, call: Call, residuals: Residuals) -> Tensor:
        """The base's prediction, steered: [B, C, h, w]."""
        output: Tensor = denoiser(**call, **self.keywords(residuals)).sample
        return output

    def steer(self, denoiser: nn.Module, pull: Pull) -> Callable[[], None]:
        """Add what `pull` gives to every call of the denoiser, whoever calls it. Returns: what ends that."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            residuals = pull(read_call(module, args, kwargs))
            return args, kwargs if residuals is None else kwargs | self.keywords(residuals)

        return denoiser.register_forward_pre_hook(before, with_kwargs=True).remove

    def check_fit(self, denoiser: Any, owner: str) -> None:
        """Whether this control can steer that base.

        Args:
            owner: what errors call this control.

        Raises: ConfigError: it is of another family, widths, device or type, or the base delta does not fit.
        """
        remedy = "attach it to the base it was trained on, or to one of the same family"
        if HOMES.get(type(denoiser).__name__) != HOMES[self.CLASS]:
            raise ConfigError(f"{owner} steers {self.CLASS}s' bases, this one is a {type(denoiser).__name__}: {remedy}")
        for key in self.SHARED:
            ours, theirs = self.config.get(key), denoiser.config.get(key)
            if tuple_of(ours) != tuple_of(theirs):
                raise ConfigError(f"{owner} has {key} {ours}, the pipeline {theirs}: {remedy}")
        if (self.device, self.dtype) != (denoiser.device, denoiser.dtype):
            ours, theirs = f"{self.device} {self.dtype}", f"{denoiser.device} {denoiser.dtype}"
            remedy = "move it with control.to(pipeline.device, pipeline.dtype)"
            raise ConfigError(f"{owner} is on {ours}, the pipeline on {theirs}: {remedy}")
        check_delta(dict(denoiser.named_parameters()), self.base_delta, owner)


def denoiser_of(base: Any) -> Any:
    """Of a pipeline its U-Net or transformer; of anything else itself."""
    return getattr(base, "unet", None) or getattr(base, "transformer", None) or base


def control_class(name: str) -> type[Control]:
    """The family of a denoiser, or of a control's file, by its class. Raises: BaseError: there is none."""
    if name not in HOMES:
        supported = ", ".join(BASES)
        raise BaseError(f"base is a {name}; expected a pipeline, or one of {supported}")
    module, _, attribute = HOMES[name].partition(":")
    return cast(type[Control], getattr(import_module(module), attribute))


def read_call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    _, *arguments = inspect.signature(type(denoiser).forward).bind(denoiser, *args, **kwargs).arguments.items()
    return dict(arguments)


def tuple_of(value: Any) -> Any:
    """JSON turns tuples into lists; compare them as one."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
