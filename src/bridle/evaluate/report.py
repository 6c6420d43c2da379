"""An evaluation as one page: `report.html`, with its pictures inside, no script, and nothing loaded from elsewhere."""

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from bridle.atomic import write_bytes
from bridle.data.words import counted
from bridle.evaluate.gallery import (
    EXTRA,
    HIT,
    MISSED,
    comparison_picture,
    comparison_title,
    load_picture,
    shows_edges,
)
from bridle.evaluate.measures import MEASURES, Measure
from bridle.evaluate.plot import plot
from bridle.evaluate.result import Evaluation, Mean, PairResult, SeedResult, pair_figures
from bridle.evaluate.style import STYLE
from bridle.evaluate.verdict import rule, sentence

FILE = "report.html"
SHOWN_PAIRS = 24
ROW = 6
EMBEDDED_PX = 256  # larger pictures are embedded smaller; the originals stay in the evaluation's folder

# The page proves by itself that it asks nothing of anyone.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    evaluation: Evaluation, folder: Path, title: str, facts: Mapping[str, str], shown_pairs: int = SHOWN_PAIRS
) -> Path:
    """Write the page.

    Args:
        title: stands above the headline, such as the run's name.
        facts: settings and times for the last table, in the order given.
        shown_pairs: the gallery holds the first so many.

    Returns: the path of `report.html`.
    Raises: FileError: a picture of the evaluation is missing.
    """
    parts = (
        _opening(evaluation, title),
        _figures(evaluation),
        _gallery(evaluation, shown_pairs),
        _facts(evaluation, facts),
    )
    path = folder / FILE
    write_bytes(path, _page(title, "\n".join(parts)).encode())
    return path


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def _opening(evaluation: Evaluation, title: str) -> str:
    pairs, seeds = counted(len(evaluation.pairs), "held-out pair"), counted(len(evaluation.seeds), "seed")
    measured = (
        f"{pairs}, {seeds} each, control scale {evaluation.scale:g}. Every picture was annotated again with "
        f"{escape(evaluation.condition)} and compared with its hint; the {evaluation.deciding.bound} is the target "
        "itself after a trip through the autoencoder."
    )
    legend = "Large dots are means, bars one standard error over pairs, faint dots single pairs."
    return (
        f'<p class="title">{escape(title)}</p><h1>{escape(sentence(evaluation))}</h1><p class="quiet">{measured}</p>'
        f'<div class="card">{plot(evaluation)}<p class="quiet" style="margin:14px 0 0">'
        f"{_measure_title(evaluation.deciding, evaluation)}. {legend}</p></div>"
    )


def _figures(evaluation: Evaluation) -> str:
    bound = evaluation.deciding.bound
    titles = ("Without", "With control", bound.capitalize(), "Reached")
    heads = "".join(f'<th scope="col">{title}</th>' for title in titles)
    rows = "".join(_figures_row(evaluation, name) for name in evaluation.figures)
    return (
        '<h2>Figures</h2><div class="card scroll"><table class="figures"><thead><tr><th scope="col">Measure</th>'
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="quiet">Reached is (with − without) / ({bound} − without). {rule(bound)}</p>'
    )


def _figures_row(evaluation: Evaluation, name: str) -> str:
    comparison, measure = evaluation.figures[name], MEASURES[name]
    means = (comparison.without, comparison.control, comparison.ceiling)
    reached = "–" if comparison.reached is None else f"{comparison.reached:.0%}"
    cells = "".join(f"<td>{cell}</td>" for cell in (*(_cell(mean, measure) for mean in means), reached))
    return f'<tr><th scope="row">{_measure_title(measure, evaluation)}</th>{cells}</tr>'


def _cell(mean: Mean, measure: Measure) -> str:
    error = "" if mean.error is None else f" <small>± {measure.text(mean.error, more=1)}</small>"
    return measure.text(mean.mean, more=1) + error


def _measure_title(measure: Measure, evaluation: Evaluation) -> str:
    note = " (lower is better)" if measure.lower_is_better else ""
    return measure.title.format(tolerance_px=evaluation.tolerance_px) + note


def _gallery(evaluation: Evaluation, shown_pairs: int) -> str:
    shown = evaluation.pairs[:shown_pairs]
    left_out = len(evaluation.pairs) - len(shown)
    note = f"The first {len(shown)} of {len(evaluation.pairs)} pairs, unselected." if left_out else "All pairs."
    articles = "\n".join(_article(evaluation, pair) for pair in shown)
    return f'<h2>Pictures</h2><p class="quiet">{note}</p>{_legend(evaluation)}{articles}'


def _legend(evaluation: Evaluation) -> str:
    if not shows_edges(evaluation):
        return ""
    entries = (
        (HIT, "edge of the hint, followed"),
        (MISSED, "edge of the hint, missed"),
        (EXTRA, "edge the hint has not"),
    )
    items = "".join(f'<li><i style="background:rgb{colour}"></i>{text}</li>' for colour, text in entries)
    return f'<ul class="legend">{items}</ul>'


def _article(evaluation: Evaluation, pair: PairResult) -> str:
    measure = evaluation.deciding
    control, without, ceiling = map(measure.text, pair_figures(pair, evaluation.measure))
    figures = f"{measure.short} {control} with, {without} without, {measure.bound} {ceiling}"
    pictures = [
        _figure(load_picture(evaluation, pair.hint_picture), "Hint"),
        _figure(load_picture(evaluation, pair.target_picture), "Target"),
        *(figure for result in pair.seeds for figure in _seed_figures(evaluation, pair, result)),
        _figure(
            load_picture(evaluation, pair.seeds[0].without_picture), "Without control", f"seed {pair.seeds[0].seed}"
        ),
        _figure(load_picture(evaluation, pair.ceiling_picture), measure.bound.capitalize()),
    ]
    return (
        f'<article class="card"><header><h3>{escape(pair.caption or pair.id)}</h3><small>{figures}</small></header>'
        f'<div class="pictures" style="--columns:{_columns(len(pictures))}">{"".join(pictures)}</div></article>'
    )


def _columns(pictures: int) -> int:
    """Pictures in a row on a wide page: one row of up to six, else two full rows where that fits."""
    return pictures if pictures <= ROW else min(ROW, pictures // 2)


def _seed_figures(evaluation: Evaluation, pair: PairResult, result: SeedResult) -> tuple[str, str]:
    value = f"{evaluation.deciding.short} {evaluation.deciding.text(result.control[evaluation.measure])}"
    title = comparison_title(evaluation)
    return (
        _figure(load_picture(evaluation, result.control_picture), "With control", f"seed {result.seed}"),
        _figure(comparison_picture(evaluation, pair, result), f"{title[0].upper()}{title[1:]}", value),
    )


def _figure(image: np.ndarray, title: str, note: str = "") -> str:
    note = f" {escape(note)}" if note else ""
    return (
        f'<figure><img alt="{title}{note}" src="{_embed(image)}"><figcaption><b>{title}</b>{note}</figcaption></figure>'
    )


def _embed(image: np.ndarray) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((EMBEDDED_PX, EMBEDDED_PX))
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def _facts(evaluation: Evaluation, facts: Mapping[str, str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    entries = (
        *facts.items(),
        ("Condition", evaluation.condition),
        ("Seeds", ", ".join(map(str, evaluation.seeds))),
        *evaluation.settings.items(),
        ("Versions", versions),
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>' for name, value in entries
    )
    return f'<h2>How it was made</h2><div class="card"><table class="facts"><tbody>{rows}</tbody></table></div>'
