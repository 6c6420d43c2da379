"""The progress plot: it says when control was learned, shows noise as flat, and stays readable whatever was logged."""

import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from bridle.run.panels import smooth, spread
from bridle.run.plot import draw, flag_rows, headline, marks, write_plot

LEARNED = {"step": 40, "kind": "learned", "message": "control learned at step 40 (advantage 0.12 ± 0.01)"}
OBEYS = {"measure": "f1", "mean": 0.4, "error": 0.1, "without": {"mean": 0.3, "error": 0.1}}


def probe(step, advantage=0.0, phase="connected", figure=0.4, learned=False):
    share = {"mean": advantage, "error": abs(advantage) / 10}
    obeys = figure and OBEYS | {"mean": figure, "gain": {"mean": figure - 0.3, "error": 0.02}}
    bands = [share | {"from": 250 * band, "to": 250 * (band + 1)} for band in range(4)]
    norms = [step / 100 + link for link in range(13)] if step else [0.0] * 13
    parts = {"advantage": share, "bands": bands, "norms": norms, "controllability": obeys, "learned": learned}
    return {"step": step, "phase": phase, **parts}


def metric(step, loss=0.2):
    return {"step": step, "loss": loss}


def write_rows(folder, probes=(), metrics=(), events=()):
    folder.mkdir(exist_ok=True)
    for name, rows in (("probes", probes), ("metrics", metrics), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def texts(figure: Figure) -> list[Text]:
    return [*figure.findobj(lambda artist: type(artist) is not Text and isinstance(artist, Text)), *figure.texts]


def drawn(probes, metrics=(), events=()) -> Figure:
    return draw("w" * 200, headline(probes, events), probes, metrics, marks(probes, events))


def headings(figure: Figure) -> list[str]:
    return [axes.texts[0].get_text() for axes in figure.axes]


def test_there_is_no_picture_before_the_first_probe(tmp_path: Path) -> None:
    assert write_plot(write_rows(tmp_path, metrics=[metric(10)])) is None
    assert not (tmp_path / "progress.png").exists()


@pytest.mark.parametrize(
    ("probes", "metrics"),
    [
        ([probe(0)], []),
        ([probe(0, figure=None), probe(20, 0.1, figure=None)], [metric(10)]),
        ([probe(0), probe(20, math.nan), probe(40, 0.1)], [metric(10, math.nan), metric(20, None), metric(30)]),
        ([probe(step, 0.1) for step in range(0, 4000, 2)], [metric(step) for step in range(1, 4000)]),
    ],
    ids=["one probe", "no samples", "not finite", "thousands"],
)
def test_whatever_was_logged_is_drawn(tmp_path: Path, probes, metrics) -> None:
    path = write_plot(write_rows(tmp_path, probes, metrics))
    assert path is not None
    with Image.open(path) as picture:
        assert np.asarray(picture.convert("L")).min() < 64


def test_errors_are_drawn_in_their_unit_and_said_to_be_better_when_lower() -> None:
    probes = [probe(0), probe(20, 0.1)]
    for row, mean in zip(probes, (44.0, 21.5), strict=True):
        gain = {"mean": 44.0 - mean, "error": 1.0}
        row["controllability"] |= {"measure": "normals_deg", "mean": mean, "without": {"mean": 44.0}, "gain": gain}
    figure = drawn(probes)
    said = " ".join(text.get_text() for text in texts(figure))
    assert "mean angle between normals, lower is better, of a few pictures" in said
    assert "control 21.5°" in said
    top = next(axes for axes in figure.axes if axes.texts[0].get_text() == "Controllability")
    assert top.get_ylim()[1] > 44  # the pictures without control are in the panel


@pytest.mark.parametrize("name", ["$_$", "控制", "a" * 200])
def test_the_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert write_plot(write_rows(tmp_path / name, [probe(0)])) == tmp_path / name / "progress.png"


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    whole = write_plot(write_rows(tmp_path / "run", [probe(0), probe(20)], [metric(10)]))
    assert whole is not None
    before = whole.read_bytes()
    with open(tmp_path / "run" / "probes.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 40, "advan')
    write_plot(tmp_path / "run")
    assert whole.read_bytes() == before


def test_the_picture_says_when_control_was_learned(tmp_path: Path) -> None:
    folder = write_rows(tmp_path, [probe(0), probe(20), probe(40, 0.1, learned=True)], events=[LEARNED])
    with Image.open(write_plot(folder) or "") as picture:
        assert picture.info["Title"] == "control learned at step 40 (advantage 0.12 ± 0.01)"
    shown = [text.get_text() for text in texts(drawn([probe(0), probe(40, 0.1, learned=True)], events=[LEARNED]))]
    assert {"Control learned at step 40", "advantage 0.12 ± 0.01", "learned, best"} <= set(shown)


def test_until_then_it_says_that_it_is_not() -> None:
    switch = {"step": 20, "kind": "switch", "message": "step 20: all links connected"}
    assert headline([probe(0), probe(30, 0.01)], [switch]).startswith(
        "control not learned yet at step 30 (advantage 0.01"
    )


def test_switches_are_named_by_the_phases_they_lead_to_and_the_best_control_is_marked() -> None:
    probes = [probe(0, phase="middle"), probe(40, learned=True), probe(60, figure=0.6, learned=True)]
    probes += [probe(80, figure=0.5, learned=True)]
    events = [{"step": 40, "kind": "switch"}, LEARNED, {"step": 70, "kind": "switch"}]
    found = [(mark.step, mark.label) for mark in marks(probes, events)]
    assert found == [(40, "learned, all links join"), (60, "best"), (70, "base unlocked")]
    large = [{"step": 50, "kind": "switch"}]
    assert [mark.label for mark in marks([probe(0)], large)] == ["base unlocked"]


def test_noise_about_zero_is_drawn_flat() -> None:
    figure = drawn([probe(step, random.Random(step).uniform(-0.001, 0.001)) for step in range(0, 600, 20)])
    low, high = figure.axes[headings(figure).index("Hint advantage")].get_ylim()
    assert 0.002 / (high - low) < 0.05


def test_a_panel_without_figures_is_left_out() -> None:
    everything = headings(drawn([probe(0), probe(20)], [metric(10)]))
    assert everything == ["Training loss", "Zero convolutions", "Hint advantage", "Controllability"]
    assert headings(drawn([probe(0, figure=None)])) == ["Zero convolutions", "Hint advantage"]
    assert headings(drawn([probe(0, figure=None), probe(20)]))[-1] == "Controllability"


@pytest.mark.parametrize("last", [40, 44, 1000])
def test_no_two_texts_overlap_and_none_is_cut_off(last: int) -> None:
    probes = [probe(0, phase="middle"), probe(40, learned=True), probe(42, 0.1, figure=0.5, learned=True)]
    events = [{"step": 38, "kind": "switch"}, LEARNED, {"step": 41, "kind": "switch"}]
    figure = drawn([row for row in [*probes, probe(last, 0.1, learned=True)] if row["step"] <= last], events=events)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    shown = [text for text in texts(figure) if text.get_text()]
    assert len(shown) >= 15
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in shown]
    overlapping = [
        (shown[one].get_text(), shown[other].get_text())
        for one, other in itertools.combinations(range(len(shown)), 2)
        if boxes[one].overlaps(boxes[other])
    ]
    assert overlapping == []
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_no_line_crosses_a_label() -> None:
    source = random.Random(0)
    for _ in range(200):
        places = sorted(source.uniform(0, 8) for _ in range(4))
        widths = [source.uniform(0.4, 2) for _ in places]
        rows = flag_rows(places, widths)
        for one, other in itertools.combinations(range(4), 2):
            assert places[other] >= places[one] + widths[one] or rows[other] < rows[one]


def test_names_of_lines_keep_apart_in_order_and_inside() -> None:
    source = random.Random(0)
    for _ in range(200):
        placed = spread(sorted(source.uniform(0, 1) for _ in range(4)), 0.1, 1.0)
        assert min(b - a for a, b in itertools.pairwise(placed)) > 0.0999
        assert placed[0] >= 0
        assert placed[-1] <= 1
    assert spread([0.1, 0.5, 0.9], 0.1, 1.0) == [0.1, 0.5, 0.9]


def test_the_smoothed_loss_neither_bends_at_its_ends_nor_jumps_with_one_value() -> None:
    assert np.allclose(smooth(np.full(100, 0.2)), 0.2)
    spike = np.full(100, 0.2)
    spike[50] = 1.2
    assert smooth(spike).max() < 0.3
