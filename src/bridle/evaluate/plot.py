"""The three figures as one inline SVG: a row each, pairs as faint dots, the mean with its error bar over them.

Horizontal places are percentages, so that the plot narrows with the page while its text keeps its size.
"""

import math

from bridle.evaluate.result import Evaluation, Mean, pair_figures

ROW_PX = 66
TRACK_PX = 42  # below the row's top, where its label stands
AXIS_PX = 26
TICKS = 4


def plot(evaluation: Evaluation) -> str:
    """The deciding measure with control, without, and at the ceiling, as an SVG element."""
    comparison = evaluation.headline
    values = list(zip(*(pair_figures(pair, evaluation.measure) for pair in evaluation.pairs), strict=True))
    rows = (
        ("Ceiling", "ceiling", comparison.ceiling, values[2]),
        ("With control", "control", comparison.control, values[0]),
        ("Without control", "without", comparison.without, values[1]),
    )
    low = min(0.0, math.floor(min(map(min, values)) * TICKS) / TICKS)  # SSIM may fall below zero
    height = ROW_PX * len(rows) + AXIS_PX
    body = "".join(_row(index * ROW_PX, *row, low) for index, row in enumerate(rows))
    spoken = ", ".join(f"{label} {mean.mean:.2f}" for label, _, mean, _ in rows)
    return (
        f'<svg class="plot" role="img" aria-label="{spoken}" width="100%" height="{height}">'
        f"{_axis(low, ROW_PX * len(rows))}{body}</svg>"
    )


def _axis(low: float, bottom: int) -> str:
    steps = round((1.0 - low) * TICKS)
    ticks = [low + index / TICKS for index in range(steps + 1)]
    return "".join(_tick(tick, low, bottom) for tick in ticks)


def _tick(tick: float, low: float, bottom: int) -> str:
    x = _place(tick, low)
    anchor = "start" if tick == low else "end" if tick == 1.0 else "middle"
    return (
        f'<line class="grid" x1="{x}" x2="{x}" y1="4" y2="{bottom}"/>'
        f'<text class="tick" x="{x}" y="{bottom + 20}" text-anchor="{anchor}">{tick:g}</text>'
    )


def _row(top: int, label: str, kind: str, mean: Mean, values: tuple[float, ...], low: float) -> str:
    y, x = top + TRACK_PX, _place(mean.mean, low)
    dots = "".join(f'<circle class="pair" cx="{_place(value, low)}" cy="{y}" r="4"/>' for value in values)
    return (
        f'<g class="{kind}"><text class="label" x="0" y="{top + 22}">{label}</text>'
        f'<text class="value" x="100%" y="{top + 22}" text-anchor="end">{_with_error(mean)}</text>'
        f'<line class="track" x1="0" x2="100%" y1="{y}" y2="{y}"/>{dots}{_bar(mean, y, low)}'
        f'<circle class="mean" cx="{x}" cy="{y}" r="6.5"/></g>'
    )


def _bar(mean: Mean, y: int, low: float) -> str:
    if mean.error is None:
        return ""
    start, end = _place(mean.mean - mean.error, low), _place(mean.mean + mean.error, low)
    caps = "".join(f'<line class="bar" x1="{x}" x2="{x}" y1="{y - 11}" y2="{y + 11}"/>' for x in (start, end))
    return f'<line class="bar" x1="{start}" x2="{end}" y1="{y}" y2="{y}"/>{caps}'


def _with_error(mean: Mean) -> str:
    return f"{mean.mean:.2f}" + (f" ± {mean.error:.2f}" if mean.error is not None else "")


def _place(value: float, low: float) -> str:
    return f"{100 * (value - low) / (1.0 - low):.2f}%"
