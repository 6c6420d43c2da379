"""The panels of the progress plot. In: rows of a run's logs, and axes over its steps. Out: curves with their names.

From what decides to what says least: how well pictures obey, the hint advantage, the zero convolutions, the loss.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from bridle.evaluate.measures import MEASURES

# Those of the report; told apart by lightness and along blue to yellow, which every common colour blindness keeps.
INK, QUIET, GRID = "#1b1e23", "#626973", "#ececea"
CONTROL, WITHOUT, ACCENT = "#0b66c3", "#8a8f98", "#b36b00"
NOISE = LinearSegmentedColormap.from_list("noise", ["#e6b469", "#5c3500"])
DEPTH = LinearSegmentedColormap.from_list("depth", ["#d3d6da", "#565b63"])

DPI = 160
SMALL, TEXT = 9.5, 10.5  # points; on a page a thousand pixels wide the smaller is 13 pixels high
BESIDE: dict[str, Any] = {"textcoords": "offset points", "fontsize": SMALL, "fontweight": "bold"}
# What an axis shows at least, so that noise about zero looks like zero.
LEAST_FIGURE, LEAST_ERROR, LEAST_ADVANTAGE, LEAST_NORM = 0.5, 5.0, 0.05, 0.1
ROUND = (1, 2, 5, 10)
MARKED = 60  # probes up to which each has its dot

Row = dict[str, Any]
Label = tuple[float, str, Any]  # height, text, colour
Panel = tuple[Sequence[Row], float, Callable[[Axes, Sequence[Row]], None]]  # figures, height in inches, what draws


def choose_panels(probes: Sequence[Row], metrics: Sequence[Row]) -> list[Panel]:
    """Those that there are figures for, the lowest first."""
    losses = [row for row, loss in zip(metrics, column(metrics, "loss"), strict=True) if np.isfinite(loss)]
    pictures = [row for row in probes if row["controllability"]]
    panels: list[Panel] = [
        (losses, 0.75, draw_loss),
        (probes, 1.5, draw_norms),
        (probes, 2.1, draw_advantage),
        (pictures, 2.1, draw_controllability),
    ]
    return [panel for panel in panels if panel[0]]


def draw_controllability(axes: Axes, rows: Sequence[Row]) -> None:
    """How well a few drawn pictures obey, beside the same pictures without control.

    The band is the error of the gain: pairs differ more from each other than pictures with control from those without.
    """
    measured = [row["controllability"] for row in rows]
    mean, error = column(measured, "mean"), column(measured, "gain", "error")
    without = measured[0]["without"]["mean"]
    measure = MEASURES[measured[0]["measure"]]
    say = measure.text
    name = measure.words + ", lower is better," * measure.lower_is_better
    head(axes, "Controllability", f"{name} of a few pictures drawn from held-out hints, ± standard error of the gain")
    low, high = extent(mean, mean - error, mean + error, np.array([without], dtype=float))
    axes.set_ylim(low, max(LEAST_ERROR if measure.top is None else LEAST_FIGURE, 1.08 * high))
    axes.axhline(without, color=WITHOUT, linewidth=1.2, linestyle=(0, (5, 3)))
    draw_band(axes, column(rows, "step"), mean, error)
    label_ends(axes, [(mean[-1], f"control {say(mean[-1])}", CONTROL), (without, f"without {say(without)}", QUIET)])


def draw_advantage(axes: Axes, rows: Sequence[Row]) -> None:
    """The hint advantage overall, and by timestep band from the least noise to the most."""
    mean, error = column(rows, "advantage", "mean"), column(rows, "advantage", "error")
    steps = column(rows, "step")
    bands = np.array([[band["mean"] for band in row["bands"]] for row in rows], dtype=float).T
    head(axes, "Hint advantage", "denoising error that a pair's own hint saves over another's; 0: no difference")
    low, high = extent(mean, mean - error, mean + error, bands)
    axes.set_ylim(min(1.08 * low, -0.06 * LEAST_ADVANTAGE), max(1.08 * high, LEAST_ADVANTAGE))
    axes.axhline(0, color=WITHOUT, linewidth=1.0)
    colours = NOISE(np.linspace(0, 1, len(bands)))
    for band, colour in zip(bands, colours, strict=True):
        axes.plot(steps, band, color=colour, linewidth=1.2)
    draw_band(axes, steps, mean, error)
    ends: list[Label] = [(bands[0, -1], "least noise", ACCENT), (bands[-1, -1], "most noise", colours[-1])]
    label_ends(axes, [(mean[-1], f"overall {mean[-1]:.2f}", CONTROL), *ends])


def draw_norms(axes: Axes, rows: Sequence[Row]) -> None:
    """How far each zero convolution is from zero; the middle link is the last."""
    steps, norms = column(rows, "step"), np.array([row["norms"] for row in rows], dtype=float).T
    head(axes, "Zero convolutions", "norm of each link's weights: how far it has opened")
    axes.set_ylim(0, max(LEAST_NORM, 1.08 * extent(norms)[1]))
    colours = DEPTH(np.linspace(0, 1, len(norms) - 1))
    for norm, colour in zip(norms, colours, strict=False):
        axes.plot(steps, norm, color=colour, linewidth=1.2)
    axes.plot(steps, norms[-1], color=ACCENT, clip_on=False, **strong(steps))
    ends: list[Label] = [(norms[0, -1], "first skip", QUIET), (norms[-2, -1], "last skip", colours[-1])]
    label_ends(axes, [(norms[-1, -1], "middle", ACCENT), *ends])


def draw_loss(axes: Axes, rows: Sequence[Row]) -> None:
    """The training loss. Its noise hides what is learned, so it is small, and an outlier may leave the panel."""
    head(axes, "Training loss", "says little: it hardly changes when the control is learned")
    loss, steps = column(rows, "loss"), column(rows, "step")
    low, high = np.percentile(loss, [1, 99])
    axes.set_ylim(0.9 * low, 1.1 * high)
    axes.plot(steps, loss, color=WITHOUT, alpha=0.35, linewidth=0.8)
    axes.plot(steps, smooth(loss), color=QUIET, linewidth=1.6)


def style(axes: Axes, numbered: bool) -> None:
    """A quiet grid; steps stand below the lowest panel only."""
    axes.grid(axis="y", color=GRID, linewidth=1.0)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=QUIET, labelsize=SMALL, pad=6, labelbottom=numbered)
    axes.yaxis.set_major_locator(MaxNLocator(5 if axes.bbox.height > DPI else 2, steps=ROUND))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=ROUND, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.axhline(0, color=GRID, linewidth=1.0)
    if numbered:
        axes.set_xlabel("step", color=QUIET, fontsize=SMALL, labelpad=5)


def head(axes: Axes, title: str, meaning: str) -> None:
    """What a panel shows, above it; on white, so that marks pass behind."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    put = partial(axes.annotate, textcoords="offset points", va="baseline", bbox=box)
    first = put(title, (0, 1), xytext=(0, 10), xycoords="axes fraction", fontsize=TEXT, fontweight="bold", color=INK)
    put(meaning, (1, 1), xytext=(8, 10), xycoords=(first, "axes fraction"), fontsize=SMALL, color=QUIET)


def draw_band(axes: Axes, steps: np.ndarray, mean: np.ndarray, error: np.ndarray) -> None:
    """The line that counts, and its standard error."""
    axes.fill_between(steps, mean - error, mean + error, color=CONTROL, alpha=0.14, linewidth=0)
    axes.plot(steps, mean, color=CONTROL, clip_on=False, **strong(steps))


def strong(steps: np.ndarray) -> dict[str, Any]:
    """How a line that counts is drawn: many probes make it thin, or their noise would fill the panel."""
    few = len(steps) <= MARKED
    return {"linewidth": 2.2, "marker": "o", "markersize": 3.5} if few else {"linewidth": 1.4}


def label_ends(axes: Axes, labels: Sequence[Label]) -> None:
    """Name lines at the right of their last points, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    labels = sorted((label for label in labels if np.isfinite(label[0])), key=lambda label: label[0])
    gap = 1.4 * SMALL / 72 * DPI / axes.bbox.height
    places = spread([(height - low) / (high - low) for height, _, _ in labels], gap, 1.0)
    put = partial(axes.annotate, xycoords="axes fraction", va="center")
    for place, (_, text, colour) in zip(places, labels, strict=True):
        put(text, (1, place), **BESIDE, xytext=(6, 0), color=colour)


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move ascending heights upwards until they are `gap` apart, and back from the top where they pass it."""
    placed = list(heights)
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], top)
        top = placed[index] - gap
    return placed


def smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a tenth of the values about each; at the ends over those that there are."""
    count, half = len(values), len(values) // 20
    sums, places = np.concatenate([[0.0], values.cumsum()]), np.arange(count)
    start, end = np.maximum(places - half, 0), np.minimum(places + half + 1, count)
    return (sums[end] - sums[start]) / (end - start)


def extent(*parts: np.ndarray) -> tuple[float, float]:
    """The least and the greatest of all values, and of zero; without those that are not finite."""
    values = np.concatenate([part.ravel() for part in parts])
    finite = values[np.isfinite(values)]
    return float(finite.min(initial=0.0)), float(finite.max(initial=0.0))


def column(rows: Sequence[Row], *keys: str) -> np.ndarray:
    """One figure of each row; NaN where it is None."""
    values: Sequence[Any] = rows
    for key in keys:
        values = [row[key] for row in values]
    return np.array(values, dtype=float)
