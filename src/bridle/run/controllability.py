"""The quick figure of a probe: do pictures obey? A control in; per held-out pair, how well a picture follows its hint.

As `bridle evaluate` measures, but on few pairs, with one seed and few denoising steps, and nothing is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.errors import DataError
from bridle.evaluate.evaluate import Annotator, HeldOutPair
from bridle.evaluate.fidelity import TOLERANCE_PX
from bridle.evaluate.measures import MEASURES, choose_measures
from bridle.sample.sampler import generate
from bridle.sample.settings import SampleSettings
from bridle.train.probe import Obedience

SEED = 0  # one noise for all probes, so that two of them differ by nothing but training


class Controllability:
    """Draws the same held-out pairs for every control it is shown.

    The measure is the one that decides for the annotator, as in `bridle.evaluate.measures`.

    Args:
        base: draws; the reference without control is drawn once, with the base as it is at the first call.
        pairs: held-out ones; the first `samples` of them are drawn.
        annotator: what made their hints, and annotates the pictures.
        how: guidance, batch and precision are taken from it.
        steps: denoising steps.

    Raises: DataError: there are fewer than two pairs, or their hints are not of the annotator's kind.
    """

    def __init__(
        self,
        base: Base,
        pairs: Sequence[HeldOutPair],
        annotator: Annotator,
        how: SampleSettings,
        *,
        samples: int,
        steps: int,
    ) -> None:
        self.base, self.pairs, self.annotator = base, pairs[:samples], annotator
        check_pairs(self.pairs, annotator)
        # Each family's own calls the base once per step, as `interval` counts. The full scale, because a user's lower
        # one would hide what the control has learned.
        self.how = replace(how, steps=steps, scheduler="auto", scale=1.0)
        self.name = choose_measures(annotator.name, [pair.hint for pair in self.pairs])[0]
        self._without: tuple[float, ...] = ()

    def __call__(self, control: Control, check: Callable[[], None] = lambda: None) -> Obedience:
        """Measure a control.

        Args:
            check: called between denoising steps; may raise, and the next call begins anew.
        """
        if not self._without:
            self._without = self._figures(None, check)
        figures, measure = self._figures(control, check), MEASURES[self.name]
        return Obedience(self.name, figures, self._without, measure.short, measure.lower_is_better)

    def _figures(self, control: Control | None, check: Callable[[], None]) -> tuple[float, ...]:
        hints, captions = [pair.hint for pair in self.pairs], [pair.caption for pair in self.pairs]
        seeds, (height, width, _) = [SEED] * len(hints), hints[0].shape
        # What overflows obeys nothing, and is no reason to end a run.
        images = generate(self.base, control, hints, captions, seeds, self.how, (height, width), check, strict=False)
        compare = MEASURES[self.name].compute
        annotated = [self.annotator(image) for image in images]
        return tuple(compare(hint, found, TOLERANCE_PX) for hint, found in zip(hints, annotated, strict=True))


def check_pairs(pairs: Sequence[HeldOutPair], annotator: Annotator) -> None:
    """Before training starts, not at its first probe."""
    remedy = "name the annotator that made the hints in data.annotator, or set probe.samples to 0"
    if len(pairs) < 2:
        more = "set data.held_out and probe.samples to 2 or more, or probe.samples to 0"
        raise DataError(f"{len(pairs)} held-out pairs to draw; a standard error takes 2: {more}")
    for pair in pairs:
        if pair.hint.shape[2] != annotator.channels:
            made = f"{annotator.name} makes {annotator.channels}"
            raise DataError(f"pair {pair.id}: hint has {pair.hint.shape[2]} channels, but {made}: {remedy}")
