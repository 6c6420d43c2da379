"""An evaluation tells a control that steers from one that does not, and keeps all that it saw."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bridle.errors import BridleError, DataError, FileError, SampleError
from bridle.evaluate import Evaluation, evaluate, judge, read_evaluation, sentence, write_report, write_sheet
from bridle.evaluate.result import Mean, compare
from bridle.sample.picture import read_settings

Run = Callable[..., Evaluation]


@pytest.mark.parametrize(
    ("obeyed", "verdict", "words"),
    [
        (1.0, "follow", "The pictures follow the hints: edge F1 1.00 with the control"),
        (0.375, "in part", "only in part"),
        (0.0, "do not follow", "The pictures do not follow the hints"),
    ],
)
def test_the_verdict_is_what_the_generator_did(evaluated: Run, obeyed: float, verdict: str, words: str) -> None:
    evaluation = evaluated(obeyed)
    assert judge(evaluation) == verdict
    assert words in sentence(evaluation)
    assert evaluation.headline.reached == pytest.approx(obeyed, abs=0.1)


@pytest.mark.parametrize(
    ("condition", "measure", "words"),
    [
        ("depth", "depth_rmse", "depth RMSE {control:.1f} with the control, {without:.1f} without; the limit is 0.0"),
        ("normals", "normals_deg", "between normals {control:.1f}° with the control, {without:.1f}° without"),
    ],
)
def test_where_lower_figures_are_better_the_verdict_is_the_same(
    evaluated: Run, condition: str, measure: str, words: str
) -> None:
    for obeyed, verdict in ((1.0, "follow"), (0.375, "in part"), (0.0, "do not follow")):
        evaluation = evaluated(obeyed, condition=condition)
        figures = evaluation.headline
        assert evaluation.measure == measure
        assert judge(evaluation) == verdict
        assert figures.reached == pytest.approx(obeyed, abs=0.15)
        assert figures.gain.mean == pytest.approx(figures.without.mean - figures.control.mean)
        assert figures.room.mean == pytest.approx(figures.without.mean - figures.ceiling.mean)
        assert figures.room.mean > 0
        said = words.format(control=figures.control.mean, without=figures.without.mean)
        assert said in sentence(evaluation)
        assert sentence(evaluation).endswith("(lower is better).")


def test_lower_figures_that_rise_are_further_from_the_hints(evaluated: Run) -> None:
    evaluation = evaluated(0.0, condition="depth")
    worse = tuple(
        replace(
            pair,
            seeds=tuple(
                replace(seed, control={name: figure + 9 for name, figure in seed.without.items()})
                for seed in pair.seeds
            ),
        )
        for pair in evaluation.pairs
    )
    comparison = compare(worse, "depth_rmse")
    assert comparison.gain.mean == pytest.approx(-9)
    assert "further" in sentence(replace(evaluation, pairs=worse, figures={"depth_rmse": comparison}))


def test_few_pairs_conclude_nothing(evaluated: Run) -> None:
    assert judge(evaluated(count=4)) == "unclear"
    assert evaluated(count=1).headline.control.error is None


@pytest.mark.parametrize(("gain", "claim"), [(0.21, "only in part"), (0.19, "do not follow"), (-0.21, "further")])
def test_a_gain_counts_from_two_standard_errors(evaluated: Run, gain: float, claim: str) -> None:
    evaluation = evaluated()
    comparison = replace(evaluation.headline, gain=Mean(mean=gain, error=0.1), reached=gain)
    assert claim in sentence(replace(evaluation, figures={"f1": comparison}))


def test_a_ceiling_no_better_than_no_control_concludes_nothing(evaluated: Run) -> None:
    evaluation = evaluated()
    comparison = replace(evaluation.headline, room=replace(evaluation.headline.room, mean=0.0), reached=None)
    evaluation = replace(evaluation, figures={**evaluation.figures, "f1": comparison})
    assert judge(evaluation) == "unclear"
    assert "cannot say" in sentence(evaluation)


def test_errors_are_over_pairs_with_their_seeds_averaged(evaluated: Run) -> None:
    evaluation = evaluated(0.5)
    means = [statistics.fmean(seed.control["ssim"] for seed in pair.seeds) for pair in evaluation.pairs]
    figure = evaluation.figures["ssim"].control
    assert figure.mean == pytest.approx(statistics.fmean(means))
    assert figure.error == pytest.approx(statistics.stdev(means) / len(means) ** 0.5)


def test_both_arms_share_their_seeds(tmp_path, pairs, canny, generator, reconstruct) -> None:
    evaluate(pairs[:3], canny, generator, reconstruct, tmp_path, [4, 9], scale=0.7)
    assert generator.calls == [([4] * 3, 0.7), ([4] * 3, 0.0), ([9] * 3, 0.7), ([9] * 3, 0.0)]


def test_soft_hints_are_judged_by_ssim_alone(evaluated: Run) -> None:
    evaluation = evaluated(soft=True)
    assert (evaluation.measure, list(evaluation.figures)) == ("ssim", ["ssim"])
    assert sentence(evaluation).startswith("The pictures follow the hints: SSIM 1.00")


def test_the_file_gives_the_evaluation_back(evaluated: Run) -> None:
    evaluation = evaluated(0.5)
    assert read_evaluation(evaluation.folder) == evaluation


def test_every_picture_is_kept_with_what_made_it(evaluated: Run) -> None:
    evaluation = evaluated()
    second = evaluation.pairs[3].seeds[1]
    settings = read_settings(evaluation.folder / second.without_picture)
    assert settings == {"id": "shapes/3", "kind": "without-2", "prompt": "shapes 3", "seed": 2, "scale": 0.0}
    named = {getattr(pair, name) for pair in evaluation.pairs for name in vars(pair) if name.endswith("_picture")}
    drawn = {
        getattr(seed, name)
        for pair in evaluation.pairs
        for seed in pair.seeds
        for name in vars(seed)
        if name.endswith("_picture")
    }
    on_disk = {f"pictures/{path.name}" for path in (evaluation.folder / "pictures").iterdir()}
    assert named | drawn == on_disk
    assert len(on_disk) == 8 * (3 + 2 * 3)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_evaluation(tmp_path)
    for content in ("[]", "{", '{"format": 1}', '{"format": 99}'):
        (tmp_path / "evaluation.json").write_text(content)
        with pytest.raises(FileError, match="evaluate again"):
            read_evaluation(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda pairs: {"pairs": []}, DataError, "0 pairs"),
        (lambda pairs: {"seeds": []}, DataError, "0 seeds"),
        (lambda pairs: {"seeds": [3, 3]}, DataError, "seed 3"),
        (lambda pairs: {"settings": {"folder": Path("here")}}, SampleError, "setting folder"),
        (lambda pairs: {"pairs": pairs[:1] * 2}, DataError, "shapes/0"),
        (lambda pairs: {"pairs": [replace(pairs[0], hint=pairs[0].image)]}, DataError, "hint is"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_drawing(
    tmp_path, pairs, canny, generator, reconstruct, change, error: type[BridleError], words: str
) -> None:
    arguments = {"pairs": pairs, "seeds": [1], "folder": tmp_path, **change(pairs)}
    with pytest.raises(error, match=words):
        evaluate(annotator=canny, generate=generator, reconstruct=reconstruct, **arguments)
    assert generator.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_generator_that_skips_a_picture_is_refused(tmp_path, pairs, canny, reconstruct) -> None:
    with pytest.raises(SampleError, match="gave 1 pictures; expected 2"):
        evaluate(pairs[:2], canny, lambda *_: [pairs[0].image], reconstruct, tmp_path, [1])


def test_edges_that_shrinking_made_grey_are_measured_shown_and_reported_as_edges(
    tmp_path: Path, pairs, canny, generator, reconstruct
) -> None:
    grey = [replace(pair, hint=(0.7 * pair.hint).astype(np.uint8)) for pair in pairs]
    evaluation = evaluate(grey, canny, generator, reconstruct, tmp_path, [1])
    assert (evaluation.measure, judge(evaluation)) == ("f1", "follow")
    assert write_report(evaluation, tmp_path, "run", {}).exists()
    assert write_sheet(evaluation, tmp_path / "sheet.png").exists()
