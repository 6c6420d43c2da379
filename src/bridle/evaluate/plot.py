"""The three figures as one inline SVG: a row each, pairs as faint dots, the mean with its error bar over them.

Horizontal places are percentages, so that the plot narrows with the page while its text keeps its size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bridle.evaluate.measures import Measure
from bridle.evaluate.result import Evaluation, Mean, pair_figures

ROW_PX = 66
TRACK_PX = 42  # below the row's top, where its label stands
AXIS_PX = 26
TICKS = 4  # between 0 and 1, and about so many elsewhere


@dataclass(frozen=True)
class Axis:
    """From the first tick to the last. ticks: ascending."""

    ticks: tuple[float, ...]

    @classmethod
    def of(cls, measure: Measure, values: Sequence[float]) -> "Axis":
        """One that holds all values and zero, and the best one of a measure that has one above."""
        top = max(values, default=0.0) if measure.top is None else measure.top
        step = 1 / TICKS if measure.top is not None else _round(top / TICKS)
        # SSIM may fall below zero.
        first, last = math.floor(min(0.0, *values) / step), math.ceil(top / step)
        return cls(tuple(step * index for index in range(first, last + 1)))

    def place(self, value: float) -> str:
        return f"{100 * (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0]):.2f}%"


def plot(evaluation: Evaluation) -> str:
    """The deciding measure with control, without, and at the ceiling, as an SVG element."""
    comparison, measure = evaluation.headline, evaluation.deciding
    values = list(zip(*(pair_figures(pair, evaluation.measure) for pair in evaluation.pairs), strict=True))
    rows = (
        (measure.bound.capitalize(), "ceiling", comparison.ceiling, values[2]),
        ("With control", "control", comparison.control, values[0]),
        ("Without control", "without", comparison.without, values[1]),
    )
    axis = Axis.of(measure, [value for arm in values for value in arm])
    height = ROW_PX * len(rows) + AXIS_PX
    body = "".join(_row(index * ROW_PX, *row, measure, axis) for index, row in enumerate(rows))
    spoken = ", ".join(f"{label} {measure.text(mean.mean)}" for label, _, mean, _ in rows)
    return (
        f'<svg class="plot" role="img" aria-label="{spoken}" width="100%" height="{height}">'
        f"{_draw_axis(axis, measure.unit, ROW_PX * len(rows))}{body}</svg>"
    )


def _round(step: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is no smaller; 1 for 0."""
    if step <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step)


def _draw_axis(axis: Axis, unit: str, bottom: int) -> str:
    anchors = ["start", *["middle"] * (len(axis.ticks) - 2), "end"]
    return "".join(
        f'<line class="grid" x1="{axis.place(tick)}" x2="{axis.place(tick)}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" x="{axis.place(tick)}" y="{bottom + 20}" text-anchor="{anchor}">{tick:g}{unit}</text>'
        for tick, anchor in zip(axis.ticks, anchors, strict=True)
    )


def _row(top: int, label: str, kind: str, mean: Mean, values: tuple[float, ...], measure: Measure, axis: Axis) -> str:
    y, x = top + TRACK_PX, axis.place(mean.mean)
    dots = "".join(f'<circle class="pair" cx="{axis.place(value)}" cy="{y}" r="4"/>' for value in values)
    return (
        f'<g class="{kind}"><text class="label" x="0" y="{top + 22}">{label}</text>'
        f'<text class="value" x="100%" y="{top + 22}" text-anchor="end">{_with_error(mean, measure)}</text>'
        f'<line class="track" x1="0" x2="100%" y1="{y}" y2="{y}"/>{dots}{_bar(mean, y, axis)}'
        f'<circle class="mean" cx="{x}" cy="{y}" r="6.5"/></g>'
    )


def _bar(mean: Mean, y: int, axis: Axis) -> str:
    if mean.error is None:
        return ""
    start, end = axis.place(mean.mean - mean.error), axis.place(mean.mean + mean.error)
    caps = "".join(f'<line class="bar" x1="{x}" x2="{x}" y1="{y - 11}" y2="{y + 11}"/>' for x in (start, end))
    return f'<line class="bar" x1="{start}" x2="{end}" y1="{y}" y2="{y}"/>{caps}'


def _with_error(mean: Mean, measure: Measure) -> str:
    return measure.text(mean.mean) + (f" ± {measure.text(mean.error)}" if mean.error is not None else "")
