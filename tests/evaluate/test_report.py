"""The report stands alone, says what the figures say, and shows user text as text."""

import base64
import io
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from bridle.errors import FileError
from bridle.evaluate import Evaluation, sentence, write_report, write_sheet
from bridle.evaluate.gallery import EXTRA, GROUND, HIT, MISSED, comparison_picture, overlay
from bridle.evaluate.plot import plot

Run = Callable[..., Evaluation]
HOSTILE = "<script>alert('x')</script> & \"quotes\""


def read(file: Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture)


class Page(HTMLParser):
    """The elements of a page and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_nothing_of_anyone(evaluated: Run) -> None:
    evaluation = evaluated()
    page = Page(write_report(evaluation, evaluation.folder, "run", {}))
    links = [value or "" for _, attrs in page.elements for name, value in attrs.items() if name in ("src", "href")]
    assert len(links) == 8 * 8
    assert all(link.startswith("data:image/png;base64,") for link in links)
    first = read(io.BytesIO(base64.b64decode(links[0].partition(",")[2])))
    assert np.array_equal(first, read(evaluation.folder / evaluation.pairs[0].hint_picture))
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    assert "url(" not in page.text
    assert "@import" not in page.text


@pytest.mark.parametrize("obeyed", [0.0, 1.0])
def test_the_headline_is_the_verdict(evaluated: Run, obeyed: float) -> None:
    evaluation = evaluated(obeyed)
    assert sentence(evaluation) in Page(write_report(evaluation, evaluation.folder, "run", {})).text


def test_user_text_stays_text(evaluated: Run) -> None:
    evaluation = evaluated()
    pairs = tuple(replace(pair, caption=HOSTILE) for pair in evaluation.pairs)
    evaluation = replace(evaluation, pairs=pairs, condition=HOSTILE, settings={HOSTILE: HOSTILE})
    page = Page(write_report(evaluation, evaluation.folder, HOSTILE, {HOSTILE: HOSTILE}))
    assert "script" not in {tag for tag, _ in page.elements}
    # title twice, facts and settings twice each, the condition twice, and a caption for each pair
    assert page.text.count(HOSTILE) == 8 + len(pairs)


def test_the_gallery_says_what_it_leaves_out(evaluated: Run) -> None:
    evaluation = evaluated()
    page = Page(write_report(evaluation, evaluation.folder, "run", {}, shown_pairs=3))
    assert "The first 3 of 8 pairs" in page.text
    assert sum(tag == "article" for tag, _ in page.elements) == 3


def test_the_plot_puts_every_mean_and_pair_in_its_place(evaluated: Run) -> None:
    evaluation = evaluated(0.5)
    circles = list(ElementTree.fromstring(plot(evaluation)).iter("circle"))
    means = [float(node.attrib["cx"].rstrip("%")) for node in circles if node.attrib["class"] == "mean"]
    comparison = evaluation.headline
    expected = [100 * figure.mean for figure in (comparison.ceiling, comparison.control, comparison.without)]
    assert means == pytest.approx(expected, abs=0.01)
    assert sum(node.attrib["class"] == "pair" for node in circles) == 3 * len(evaluation.pairs)


def test_the_plot_and_the_table_of_errors_end_at_the_greatest_and_name_their_unit(evaluated: Run) -> None:
    evaluation = evaluated(0.5, condition="normals")
    drawing = ElementTree.fromstring(plot(evaluation))
    places = [float(node.attrib["cx"].rstrip("%")) for node in drawing.iter("circle")]
    assert min(places) == 0  # the limit of a perfect autoencoder
    assert 60 < max(places) <= 100
    ticks = [node.text for node in drawing.iter("text") if node.attrib["class"] == "tick"]
    assert all(tick and tick.endswith("°") for tick in ticks)
    page = Page(write_report(evaluation, evaluation.folder, "run", {})).text
    assert "Mean angle between normals (lower is better)" in page
    assert "(limit − without)" in page
    assert "Ceiling" not in page
    assert "Annotated again" in page


def test_the_overlay_colours_right_missed_and_extra_edges() -> None:
    hint, output = np.zeros((2, 12, 12, 3), np.uint8)
    hint[2, 2], hint[5, 5] = 255, 255
    output[2, 2], output[9, 9] = 255, 255
    picture = overlay(hint, output, tolerance_px=1)
    colours = [tuple(int(value) for value in picture[place]) for place in ((2, 2), (5, 5), (9, 9), (0, 0))]
    assert colours == [HIT, MISSED, EXTRA, GROUND]


@pytest.mark.parametrize("condition", ["", "depth", "normals", "segmentation"])
def test_the_sheet_shows_the_first_pairs(evaluated: Run, tmp_path: Path, condition: str) -> None:
    evaluation = evaluated(condition=condition)
    heights = [read(write_sheet(evaluation, tmp_path / "sheet.png", rows)).shape[0] for rows in (1, 2, 3)]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 256


def test_maps_are_shown_as_they_were_annotated(evaluated: Run) -> None:
    evaluation = evaluated(condition="segmentation")
    pair = evaluation.pairs[0]
    shown = comparison_picture(evaluation, pair, pair.seeds[0])
    assert np.array_equal(shown, read(evaluation.folder / pair.seeds[0].annotated_picture))


def test_a_missing_picture_is_named(evaluated: Run) -> None:
    evaluation = evaluated()
    missing = evaluation.folder / evaluation.pairs[0].ceiling_picture
    missing.unlink()
    with pytest.raises(FileError, match=missing.name):
        write_report(evaluation, evaluation.folder, "run", {})
