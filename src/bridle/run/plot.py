"""The progress of a run as one picture. In: the rows that a run logs. Out: `progress.png`.

Has the control been learned, and when? Does it still improve? A sentence says it, panels over one step axis show it,
and lines through all of them mark what happened.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast, get_args

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from bridle.atomic import write_with
from bridle.run.panels import BESIDE, CONTROL, DPI, INK, QUIET, TEXT, Panel, Row, choose_panels, style
from bridle.train.convergence import figures
from bridle.train.log import EVENTS, METRICS, PROBES, read_rows
from bridle.train.regime import Phase
from bridle.train.watch import Watch

PLOT = "progress.png"
JOINED = {"connected": "all links join", "unlocked": "base unlocked"}

WIDTH, LEFT, RIGHT, BOTTOM, HEADER, GAP, FLAG = 10.0, 0.7, 1.4, 0.65, 0.9, 0.5, 0.24  # inches
LETTER = 0.085  # inches, the width of one of a mark's label, on the safe side
TITLE = 16  # points
NAME_LETTERS = 70


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step."""

    step: int
    label: str
    colour: str


def write_plot(folder: Path) -> Path | None:
    """Draw the rows of a run's folder into its `progress.png`. Returns: its path, or None before the first probe."""
    probes, metrics, events = (read_rows(folder / name) for name in (PROBES, METRICS, EVENTS))
    if not probes:
        return None
    title = headline(probes, events)
    figure = draw(folder.resolve().name, title, probes, metrics, marks(probes, events))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a folder's name may be in letters that the font lacks
        write_with(folder / PLOT, lambda path: FigureCanvasAgg(figure).print_png(path, metadata={"Title": title}))
    return folder / PLOT


def headline(probes: Sequence[Row], events: Sequence[Row]) -> str:
    """Whether the control is learned, and when, in one sentence."""
    learned = [event["message"] for event in events if event["kind"] == "learned"]
    newest = probes[-1]
    return learned[0] if learned else f"control not learned yet at step {newest['step']} ({figures(newest)})"


def marks(probes: Sequence[Row], events: Sequence[Row]) -> list[Mark]:
    """What the picture points out, in order of steps; what happened at one step shares a mark."""
    phases = get_args(Phase)
    later = phases[phases.index(probes[0]["phase"]) + 1 :]  # phases follow one another, and none is left out
    switches = [event["step"] for event in events if event["kind"] == "switch"]
    found = [(event["step"], "learned", CONTROL) for event in events if event["kind"] == "learned"][:1]
    found += [(step, JOINED[phase], QUIET) for step, phase in zip(switches, later, strict=False)]
    best = Watch(probes).best
    found += [] if best is None else [(probes[best]["step"], "best", INK)]
    at = {step: [row for row in found if row[0] == step] for step in sorted({step for step, _, _ in found})}
    return [Mark(step, ", ".join(label for _, label, _ in here), here[0][2]) for step, here in at.items()]


def flag_rows(places: Sequence[float], widths: Sequence[float]) -> list[int]:
    """The row above the panels that each mark's label stands in, to the right of its line; 0 is the lowest.

    An earlier label stands above the later ones that it would run into, so that no line crosses a label.

    Args:
        places: of the lines, ascending.
        widths: of the labels, in the same unit.
    """
    rows: list[int] = []
    for index in reversed(range(len(places))):
        reached = sum(place < places[index] + widths[index] for place in places[index + 1 :])
        rows.insert(0, max(rows[:reached], default=-1) + 1)
    return rows


def draw(name: str, title: str, probes: Sequence[Row], metrics: Sequence[Row], marked: Sequence[Mark]) -> Figure:
    """The whole picture: panels, the marks' lines through all of them and their labels above, the sentence on top."""
    last = max(row["step"] for row in [*probes, *metrics, {"step": 1}])
    limits = (-0.008 * last, 1.012 * last)
    inch = (WIDTH - LEFT - RIGHT) / (limits[1] - limits[0])
    rows = flag_rows([mark.step * inch for mark in marked], [LETTER * (len(mark.label) + 1) for mark in marked])
    *lower, top = draw_panels(choose_panels(probes, metrics), limits, FLAG * (max(rows, default=-1) + 1) + HEADER)
    for axes in lower:
        draw_lines(axes, marked, [GAP] * len(marked))
    draw_lines(top, marked, [GAP + FLAG * (row + 0.6) for row in rows])
    draw_flags(top, marked, rows)
    figure = cast(Figure, top.figure)
    draw_header(figure, name, title)
    return figure


def draw_panels(panels: Sequence[Panel], limits: tuple[float, float], above: float) -> list[Axes]:
    """All panels, the lowest first, in a new figure that has room above them."""
    total = BOTTOM + sum(height + GAP for _, height, _ in panels) + above
    figure, bottom, drawn = Figure((WIDTH, total), dpi=DPI, facecolor="white"), BOTTOM, []
    for rows, height, draw_panel in panels:
        place = (LEFT / WIDTH, bottom / total, (WIDTH - LEFT - RIGHT) / WIDTH, height / total)
        axes = figure.add_axes(place, xlim=limits, frame_on=False)
        style(axes, numbered=not drawn)
        draw_panel(axes, rows)
        drawn.append(axes)
        bottom += height + GAP
    return drawn


def draw_header(figure: Figure, name: str, title: str) -> None:
    """The run's name, the sentence, and beside it the figures that it is founded on."""
    sentence, _, founded = title.partition(" (")
    y = 1 - 0.72 / figure.get_figheight()
    say = partial(figure.text, LEFT / WIDTH, parse_math=False)
    say(1 - 0.38 / figure.get_figheight(), name[:NAME_LETTERS], color=QUIET, fontsize=TEXT)
    first = say(y, sentence[:1].upper() + sentence[1:], color=INK, fontsize=TITLE, fontweight="bold")
    put = partial(Annotation, xycoords=(first, "figure fraction"), xytext=(10, 0), textcoords="offset points")
    figure.add_artist(put(founded.removesuffix(")"), (1, y), color=QUIET, fontsize=TEXT, parse_math=False))


def draw_lines(axes: Axes, marked: Sequence[Mark], above: Sequence[float]) -> None:
    """A line for each mark through a panel and so many inches above it, behind curves and headings."""
    draw_line = partial(axes.axvline, linewidth=0.9, clip_on=False, zorder=1.5)
    for mark, rise in zip(marked, above, strict=True):
        draw_line(mark.step, 0, 1 + rise * DPI / axes.bbox.height, color=mark.colour)


def draw_flags(axes: Axes, marked: Sequence[Mark], rows: Sequence[int]) -> None:
    """The marks' labels over the uppermost panel."""
    put = partial(axes.annotate, xycoords=axes.get_xaxis_transform())
    for mark, row in zip(marked, rows, strict=True):
        place = (mark.step, 1 + (GAP + FLAG * row) * DPI / axes.bbox.height)
        put(mark.label, place, **BESIDE, xytext=(5, 0), color=mark.colour)
