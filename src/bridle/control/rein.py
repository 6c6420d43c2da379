"""One attached control: its hint, how strongly it pulls, and where in the picture."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self, get_args

import torch
from torch import Tensor

from bridle.control.control import Call, Control, denoiser_of
from bridle.control.half import Half
from bridle.control.hint import to_mask
from bridle.control.progress import Place
from bridle.control.pulls import Pull, compute
from bridle.control.residuals import Residuals
from bridle.control.rows import Rows
from bridle.control.strength import Guess, Strength
from bridle.errors import ConfigError, HintError


class Rein:
    """What `rig["name"]` gives. Change it at any time between two calls of the pipeline.

    Attributes:
        strength: scale, start and end, weights, keyframes, half.
        mask: [1 or B, 1, H, W] in [0, 1], or None: it acts everywhere.
        pictures: of the batch, those it acts in, by number and rising; all where None. Hints and masks are then theirs.
        hold: whether the residuals of the last step without it are used again; strength and mask are this step's.
        held: these residuals, at full strength.
    """

    def __init__(self, name: str, control: Control) -> None:
        self.name, self.control = name, control
        self.strength = Strength()
        self.mask: Tensor | None = None
        self.pictures: tuple[int, ...] | None = None
        self.hold = False
        self.held: Residuals | None = None
        self._hint: Tensor | None = None
        self._prepared: Tensor | None = None  # the hint as the control's encoder takes it
        self._features: Tensor | None = None
        self._encoder: Any = None  # the state of the weights that they were encoded with
        # Where the weights are kept, which others may take the place of; looking for that in every step takes ten times
        # as long as looking there.
        self._places = [(module._parameters, name) for module in control.modules() for name in module._parameters]

    def set(
        self,
        *,
        hint: Any = None,
        scale: float | None = None,
        start: float | None = None,
        end: float | None = None,
        weights: str | tuple[float, ...] | list[float] | None = None,
        keyframes: Any = None,
        half: Half | None = None,
        guess: Guess | None = None,
        mask: Any = None,
    ) -> Self:
        """Change what is given, keep the rest. For all but hint, mask and guess see `Strength`.

        Args:
            hint: a PIL image, a uint8 array [H, W, K], or a tensor [B, K, H, W] in [0, 1].
            mask: where it acts: a hint of one channel, 1 inside.
            guess: guess mode, for an empty prompt: that definition's weights, in the conditional half only.

        Raises: HintError, ConfigError.
        """
        given = {"scale": scale, "start": start, "end": end, "half": half, **guess_mode(guess, weights, half)}
        if weights is not None:
            given["weights"] = weights if isinstance(weights, str) else tuple(weights)
        if keyframes is not None:
            given["keyframes"] = tuple((share, factor) for share, factor in keyframes)
        strength = replace(self.strength, **{name: value for name, value in given.items() if value is not None})
        mask = None if mask is None else to_mask(mask)
        if hint is not None:
            self._hint, self._prepared, self._features = self.control.read_hint(hint), None, None
        self.strength, self.mask = strength, self.mask if mask is None else mask
        return self

    def ask(self, call: Call, pipeline: Any, place: Place) -> Pull | None:
        """What is to be computed for it in a call; None where it does not act."""
        if not place.known and self.strength.changes:
            what = f'control "{self.name}" is to act by start, end or keyframes'
            remedy = "attach to the pipeline that samples, or leave them out"
            raise ConfigError(f"{what}, but nothing says where in the sampling this call lies: {remedy}")
        if not self.hold:
            self.held = None
        factor = self.strength.at(place.begin, place.finish)
        rows = Rows.of(pipeline, len(call[self.control.INPUT]), place.again)
        own: Half = "conditional" if self.control.pools else "both"
        acting = rows.acting(self.strength.half or own, self.pictures)
        return Pull(self, rows, acting, factor) if factor and acting.rows else None

    def answer(self, pull: Pull, residuals: Residuals, call: Call, pipeline: Any) -> Residuals:
        """What it adds to a call, from the residuals at full strength."""
        latents = call[self.control.INPUT]
        residuals = self.strength.apply(residuals, pull.factor, latents.shape[-1])
        if self.mask is not None:
            residuals = residuals.masked(pull.rows.spread(self.mask.to(latents.device), pull.acting))
        return self.control.place(pull.rows.fill(residuals, pull.acting), denoiser_of(pipeline))

    def pull(self, call: Call, pipeline: Any, place: Place) -> Residuals | None:
        """What it alone adds to a call; None where it does not act."""
        pull = self.ask(call, pipeline, place)
        if pull is None:
            return None
        return self.answer(pull, *compute([pull], call, pipeline), call, pipeline)

    def features(self, call: Call, pipeline: Any) -> Tensor:
        """The encoded hint, computed once for all steps. Raises: HintError: no hint was set, or its size is wrong."""
        if self._hint is None:
            raise HintError(
                f'control "{self.name}" has no hint; call rig["{self.name}"].set(hint=...) before the pipeline'
            )
        if self._prepared is None:
            self._prepared = self.control.fit_hint(self._hint.to(self.control.device), pipeline)
        self.control.check_hint(self._prepared, call)
        if torch.is_grad_enabled():
            return self.control.encode(self._prepared)
        encoder = state_of(weight for kept, name in self._places if (weight := kept[name]) is not None)
        if self._features is None or self._encoder != encoder:
            self._features, self._encoder = self.control.encode(self._prepared), encoder
        return self._features


def state_of(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What tells when weights have changed; of those that inference mode made, nothing does."""
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]


def guess_mode(guess: str | None, weights: Any, half: Any) -> dict[str, Any]:
    """What guess mode stands for. Raises: ConfigError: there is no such definition, or it is contradicted."""
    if guess is None:
        return {}
    if guess not in get_args(Guess):
        raise ConfigError(f"guess is {guess!r}; expected one of {', '.join(get_args(Guess))}")
    if weights is not None or half is not None:
        raise ConfigError(f"guess {guess!r} stands for weights={guess!r}, half='conditional'; give it, or those two")
    return {"weights": guess, "half": "conditional"}
