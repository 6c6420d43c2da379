"""The quick figure is what `evaluate` would measure, the same every time, and can be ended between denoising steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from bridle.base.base import Base
from bridle.control.control import Control
from bridle.data.annotate.canny import Canny
from bridle.data.annotate.soft_edge import SoftEdge
from bridle.errors import DataError, SampleError
from bridle.evaluate import HeldOutPair, evaluate
from bridle.evaluate.evaluate import Annotator
from bridle.run.controllability import SEED, Controllability
from bridle.run.evaluating import generator
from bridle.run.previews import Previews
from bridle.sample.sampler import generate, reconstruct
from bridle.sample.settings import SampleSettings

HOW = SampleSettings(steps=7, guidance=2.0, scale=0.5, scheduler="euler")
STEPS = 2


class Nearness(SoftEdge):
    """Maps that count as depth."""

    name = "depth"


@pytest.fixture(scope="module")
def base() -> Base:
    return tiny.make_base()


@pytest.fixture(scope="module")
def control(base: Base) -> Control:
    return tiny.wake(Control.from_base(base.pipeline)).eval()


def make_pairs(annotator: Annotator, count: int = 4) -> list[HeldOutPair]:
    images = [tiny.make_hint(seed) for seed in range(count)]
    return [
        HeldOutPair(id=str(seed), image=image, hint=annotator(image), caption=f"pattern {seed}")
        for seed, image in enumerate(images)
    ]


def make(base: Base, annotator: Annotator, **changes: Any) -> Controllability:
    return Controllability(base, make_pairs(annotator), annotator, HOW, **({"samples": 3, "steps": STEPS} | changes))


@pytest.mark.parametrize("annotator", [Canny(), SoftEdge(), Nearness()], ids=["f1", "ssim", "depth"])
def test_figures_are_those_of_evaluate_on_the_first_pairs_at_full_scale(
    base: Base, control: Control, annotator: Annotator, tmp_path: Path
) -> None:
    row = make(base, annotator)(control).row()
    how = SampleSettings(steps=STEPS, guidance=HOW.guidance, scheduler="ddim")
    measured = evaluate(
        make_pairs(annotator)[:3],
        annotator,
        generator(base, control, how, lambda count: None),
        lambda images: reconstruct(base, images),
        tmp_path,
        [SEED],
    )
    figures = [pair.seeds[0].control[row["measure"]] for pair in measured.pairs]
    without = [pair.seeds[0].without[row["measure"]] for pair in measured.pairs]
    gains = np.subtract(figures, without) * (-1 if annotator.name == "depth" else 1)
    assert row["measure"] == measured.measure
    assert row["lower_is_better"] == (annotator.name == "depth")
    assert row["gain"]["mean"] == pytest.approx(measured.headline.gain.mean)
    assert row["figures"] == figures
    assert (row["mean"], row["without"]["mean"]) == pytest.approx((np.mean(figures), np.mean(without)))
    assert row["gain"] == pytest.approx({"mean": gains.mean(), "error": gains.std(ddof=1) / 3**0.5})
    assert np.abs(gains).max() > 1e-3  # else the arms are alike for another reason
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_pictures_without_control_are_drawn_once(base: Base, control: Control) -> None:
    passes: list[int] = []
    hook = base.denoiser.register_forward_pre_hook(lambda module, args: passes.append(1))
    try:
        measure = make(base, Canny())
        first = measure(control)
        assert len(passes) == 2 * STEPS
        assert measure(control) == first
        assert len(passes) == 3 * STEPS
    finally:
        hook.remove()


def test_drawing_ends_between_two_denoising_steps_and_begins_anew_next_time(base: Base, control: Control) -> None:
    expected, measure, checks = make(base, Canny(), steps=5)(control), make(base, Canny(), steps=5), []

    def stop() -> None:
        checks.append(1)
        if len(checks) == 7:  # in the second of the five steps with control
            raise InterruptedError

    with pytest.raises(InterruptedError):
        measure(control, stop)
    assert not base.denoiser._forward_pre_hooks
    assert measure(control, lambda: None) == expected


def test_pairs_that_cannot_be_measured_are_refused_before_anything_is_drawn(base: Base) -> None:
    with pytest.raises(DataError, match=r"1 held-out pairs to draw; .*probe.samples to 0"):
        make(base, Canny(), samples=1)
    with pytest.raises(DataError, match=r"pair 0: hint has 3 channels, but canny makes 1: .*probe.samples to 0"):
        Controllability(base, make_pairs(Canny()), Canny(channels=1), HOW, samples=2, steps=1)


def test_edges_that_shrinking_made_grey_are_measured_as_edges(base: Base, control: Control) -> None:
    """And do not end the run at its first probe."""
    pairs = [replace(pair, hint=(0.7 * pair.hint).astype(np.uint8)) for pair in make_pairs(Canny())]
    grey = Controllability(base, pairs, Canny(), HOW, samples=3, steps=STEPS)
    assert grey.name == "f1"
    assert grey(control).without == make(base, Canny())(control).without  # the control itself sees other hints


def test_pictures_that_overflow_do_not_end_a_run(tmp_path: Path) -> None:
    spoilt = tiny.make_base()
    with torch.no_grad():
        spoilt.vae.decoder.conv_out.bias.fill_(torch.nan)
    control = Control.from_base(spoilt.pipeline).eval()
    assert len(make(spoilt, Canny())(control).row()["figures"]) == 3
    how = SampleSettings(steps=STEPS, precision="fp32")
    Previews(spoilt, make_pairs(Canny()), how, tmp_path)(control, 1)
    assert (tmp_path / "step-00000001.png").exists()
    with pytest.raises(SampleError, match="no numbers: set precision"):
        generate(spoilt, None, [], [""], [1], how)
