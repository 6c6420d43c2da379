"""What all controls have in common, whatever family of bases they steer.

A control meets its base in the base's own words: the arguments of its denoiser's `forward`, by name, which are its
*call*. From a call come the control's residuals, and they go back among the arguments. So training, which makes the
call itself, and `attach`, which overhears a stock pipeline's, run the same code; a family is one small file that says
how to make a call, what is copied, and where the links join.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from bridle.control.delta import check_delta, parameters_of
from bridle.control.hint import HintEncoder, to_hint
from bridle.control.residuals import Residuals
from bridle.control.text import Text
from bridle.errors import BaseError, ConfigError

Links = Literal["all", "middle"]
Call = Mapping[str, Any]  # the arguments of a denoiser's `forward`, by name
Pull = Callable[[Call], Residuals | None]

# The family of each denoiser, and of each class that a control's configuration may name; imported when needed.
BASES = {
    "UNet2DConditionModel": "bridle.control.unet:UNetControl",
    "SD3Transformer2DModel": "bridle.control.sd3:SD3Control",
    "FluxTransformer2DModel": "bridle.control.flux:FluxControl",
    "UNet2DModel": "bridle.control.pixel:PixelControl",
}
CLASSES = {
    "ControlNetModel": "bridle.control.unet:UNetControl",
    "SD3ControlNetModel": "bridle.control.sd3:SD3Control",
    "FluxControlNetModel": "bridle.control.flux:FluxControl",
    "BridlePixelControl": "bridle.control.pixel:PixelControl",
    "BridleModuleControl": "bridle.control.module:ModuleControl",
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
    INPUT: str = "sample"
    # Whether `prepare` has anything to do: hints are then pictures of three channels.
    PREPARES: ClassVar[bool] = False
    # Pixels per latent, along each side, where nothing else is said.
    SIZE_FACTOR: ClassVar[int] = 8
    # Latents per token, along each side: pictures are of multiples of this.
    PATCH: ClassVar[int] = 1
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
        size_factor: int | None = None,
        layers: int | None = None,
    ) -> "Control":
        """Copy what a control of this base copies.

        Args:
            base: a `bridle.Base`, a pipeline, or its U-Net or transformer; it is left as it is.
            hint_channels: of the hint: 1 for a mask, 3 for a picture, any other number as well.
            hint_encoder: "official" or "paper".
            links: "all", or "middle".
            size_factor: pixels per latent in each direction; where None a `Base`'s own, or the family's.
            layers: of a transformer: how many of its first blocks are copied, and of a second kind of blocks as well;
                where None, half of them (Stable Diffusion 3) or 4 (Flux).

        Raises: BaseError: the base is of no family that is supported, or needs what none supports. ConfigError: an
            option has no such value, or this family has no such option.
        """
        if hint_channels < 1:
            raise ConfigError(f"hint_channels is {hint_channels}; expected 1 or more")
        denoiser = denoiser_of(base)
        family = control_class(kind_of(denoiser))
        family.check_base(denoiser)
        check_plain(denoiser)
        if size_factor is None:
            size_factor = getattr(base, "size_factor", family.SIZE_FACTOR)
        return family.copy_of(denoiser, hint_channels, hint_encoder, links, size_factor, layers)

    @staticmethod
    def for_module(
        model: nn.Module,
        taps: Sequence[str],
        *,
        example: Sequence[Any] | Mapping[str, Any],
        hint: Tensor,
        hint_at: str | None = None,
        channels: Literal["first", "last"] | None = None,
    ) -> "Control":
        """A control of any model, by naming the blocks that it steers; see docs/any-denoiser.md.

        What lies between the model's input and the last tap is copied, the rest is not.

        Args:
            model: left as it is. Lock it yourself: `model.requires_grad_(False).eval()`.
            taps: dotted names of blocks whose outputs take residuals, as `model.named_modules()` has them.
            example: what the model is called with, by position or by name. It is run once, to see what goes where.
            hint: of that example, [B, K, N], [B, K, H, W] or [B, K, D, H, W] in [0, 1].
            hint_at: the block at whose input the hint is added; the first of the taps where None.
            channels: where the blocks' features have their channels. Where None: last if they are tokens [B, L, D], and
                first if they are a grid [B, C, ...]; three dimensions are tokens unless the hint has as many.

        Raises: BaseError: a name is none of the model's, or a block cannot be tapped. HintError: the hint's size is no
            multiple of the features'.
        """
        from bridle.control.module import ModuleControl  # here, because it is a Control itself

        return ModuleControl.of(model, taps, example, hint, hint_at, channels)

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
    def idle(self) -> tuple[str, ...]:
        """Where the parameters are that no link depends on: files hold them, but they cannot be trained."""
        return ()

    @property
    def joints(self) -> tuple[str, ...]:
        """Where its links join the base: the same for all controls of one attachment."""
        return (self.CLASS,)

    @property
    def pools(self) -> bool:
        """Whether it adds one value per channel, wherever in the picture: for style, as the official shuffle control.

        Such a control acts in the conditional half of the guidance alone, unless told otherwise, as in diffusers.
        """
        return False

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

    def read_hint(self, hint: Any) -> Tensor:
        """What people have at hand as a tensor [B, K, ...]. Raises: HintError: see `bridle.control.hint.to_hint`."""
        return to_hint(hint, self.hint_channels)

    @classmethod
    def prepare(cls, hint: Tensor, pipeline: Any) -> Tensor:
        """Turn a hint into what `encode` takes: nothing to do, unless the base's autoencoder sees hints first.

        Args:
            hint: [B, K, H, W] in [0, 1].
            pipeline: of the base.
        """
        return hint

    def fit_hint(self, hint: Tensor, pipeline: Any) -> Tensor:
        """Prepare a hint for this one control. Those made here want what `prepare` gives, others may differ."""
        return self.prepare(hint, pipeline)

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

    def place(self, residuals: Residuals, denoiser: Any) -> Residuals:
        """One residual for every place where the base takes one, so that controls of different depth can be summed."""
        return residuals

    @abstractmethod
    def keywords(self, residuals: Residuals) -> dict[str, Any]:
        """The residuals, placed, as arguments of the denoiser's `forward`."""

    def given(self, call: Call) -> Residuals | None:
        """The residuals that a call brings along, put there by a pipeline with a control of its own."""
        return None

    def timestep(self, call: Call) -> Any:
        """The noise level of a call, as its pipeline's scheduler counts them: a number or a scalar tensor."""
        return call["timestep"]

    def join(self, denoiser: Any, call: Call, residuals: Residuals) -> Tensor:
        """The base's prediction, steered: [B, C, h, w]."""
        output: Tensor = denoiser(**call, **self.keywords(self.place(residuals, denoiser))).sample
        return output

    def steer(self, denoiser: nn.Module, pull: Pull) -> Callable[[], None]:
        """Add what `pull` gives to every call of the denoiser, whoever calls it. Returns: what ends that."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            residuals = pull(read_call(module, args, kwargs))
            return args, kwargs if residuals is None else kwargs | self.keywords(residuals)

        return denoiser.register_forward_pre_hook(before, with_kwargs=True).remove

    def check_fit(self, denoiser: Any, owner: str, device: torch.device | None = None) -> None:
        """Whether this control can steer that base.

        Args:
            owner: what errors call this control.
            device: where the base computes; where None, where its weights are.

        Raises: BaseError: the base is not supported. ConfigError: it is of another family, widths, device or type, or
            the base delta does not fit.
        """
        control_class(kind_of(denoiser)).check_base(denoiser)
        remedy = "attach it to the base it was trained on, or to one of the same family"
        if HOMES.get(kind_of(denoiser)) != HOMES[self.CLASS]:
            raise ConfigError(f"{owner} steers {self.CLASS}s' bases, this one is a {kind_of(denoiser)}: {remedy}")
        for key in self.SHARED:
            ours, theirs = self.config.get(key), denoiser.config.get(key)
            if tuple_of(ours) != tuple_of(theirs):
                raise ConfigError(f"{owner} has {key} {ours}, the pipeline {theirs}: {remedy}")
        device = device or denoiser.device
        if (self.device, self.dtype) != (device, denoiser.dtype):
            ours, theirs = f"{self.device} {self.dtype}", f"{device} {denoiser.dtype}"
            remedy = f'move it with control.to("{device}", {denoiser.dtype})'
            raise ConfigError(f"{owner} is on {ours}, the pipeline on {theirs}: {remedy}")
        check_delta(parameters_of(denoiser), self.base_delta, owner)


def denoiser_of(base: Any) -> Any:
    """Of a pipeline, or a `Base`, its U-Net or transformer; of a model itself, whatever its parts are called."""
    if isinstance(base, nn.Module):
        return base
    names = ("unet", "transformer", "denoiser")
    return next((part for name in names if (part := getattr(base, name, None)) is not None), base)


def check_plain(denoiser: Any) -> None:
    """Raises: BaseError: it carries a LoRA or an IP-Adapter, which a copy would carry too."""
    if getattr(denoiser, "peft_config", None):
        raise BaseError("base carries a LoRA, which would be copied along; call pipeline.unload_lora_weights() first")
    if any("IPAdapter" in type(processor).__name__ for processor in getattr(denoiser, "attn_processors", {}).values()):
        raise BaseError("base carries an IP-Adapter, which would be copied along; call unload_ip_adapter() first")


def kind_of(denoiser: Any) -> str:
    """The name of its class; of a sharded one, of the class that FSDP has put one of its own in front of."""
    kind = type(denoiser)
    sharded = kind.__name__.startswith("FSDP") and len(kind.__bases__) > 1
    return str((kind.__bases__[-1] if sharded else kind).__name__)


def control_class(name: str) -> type[Control]:
    """The family of a denoiser, or of a control's file, by its class. Raises: BaseError: there is none."""
    if name not in HOMES:
        supported = ", ".join(BASES)
        other = "for any other model there is Control.for_module"
        raise BaseError(f"base is a {name}; expected a Base, a pipeline, or one of {supported}; {other}")
    module, _, attribute = HOMES[name].partition(":")
    return cast(type[Control], getattr(import_module(module), attribute))


def read_call(denoiser: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    signature = inspect.signature(type(denoiser).forward)
    _, *arguments = signature.bind(denoiser, *args, **kwargs).arguments.items()
    call = dict(arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            call |= call.pop(name, {})
    return call


def tuple_of(value: Any) -> Any:
    """JSON turns tuples into lists; compare them as one."""
    return tuple(value) if isinstance(value, (list, tuple)) else value
