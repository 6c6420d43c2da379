"""Training in float16: the same as in float32 but for rounding, whatever overflows on the way."""

from typing import Any

import pytest
import torch
from test_trouble import break_at

from bridle.train import loss_scale
from bridle.train.log import read_rows
from bridle.train.loss_scale import FIRST, LossScale

CPU = torch.device("cpu")


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in read_rows(run.folder / "metrics.jsonl")]


def weights(run: Any) -> torch.Tensor:
    return torch.cat([part.flatten() for part in run.tensors("control.").values()])


def begun(new_run: Any) -> torch.Tensor:
    """The weights that all runs begin with."""
    run = new_run("begun", steps=1, lr=1e-30, weight_decay=0.0, checkpoint_every=1)
    run.start()
    return weights(run)


def test_it_learns_what_float32_does(new_run: Any) -> None:
    half, full, start = new_run("half", precision="fp16"), new_run("full"), begun(new_run)
    for run in (half, full):
        run.start()
    assert losses(half) == pytest.approx(losses(full), rel=5e-3)
    assert half.facts()["skipped"] == 0
    assert torch.cosine_similarity(weights(half) - start, weights(full) - start, dim=0) > 0.97


def test_a_step_that_overflows_is_taken_again_with_less(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other, start = new_run("run", precision="fp16"), new_run("other", precision="fp16"), begun(new_run)
    monkeypatch.setattr(loss_scale, "FIRST", 2.0**60)
    run.start()
    settled = run.facts()["loss_scale"]["value"]
    assert 1 < settled < 2.0**40
    assert run.facts()["skipped"] == 0
    monkeypatch.setattr(loss_scale, "FIRST", settled)
    other.start()
    assert losses(run) == pytest.approx(losses(other), rel=1e-3)
    assert torch.cosine_similarity(weights(run) - start, weights(other) - start, dim=0) > 0.99


def test_where_the_scale_is_not_to_blame_the_step_is_skipped_and_the_scale_stays(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, {2}, "gradient")
    run = new_run("run", precision="fp16")
    assert run.start().finished
    assert run.facts()["skipped"] == 1
    assert run.facts()["loss_scale"] == {"value": FIRST, "steps": 3}


def test_a_stopped_run_goes_on_with_its_scale(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "PATIENCE", 4)
    whole, parted = new_run("whole", precision="fp16"), new_run("parted", precision="fp16")
    whole.start()
    assert whole.facts()["loss_scale"]["value"] == 2 * FIRST
    parted.start(stop_at=3)
    parted.start()
    assert parted.digest() == whole.digest()


def test_nothing_else_is_scaled(new_run: Any) -> None:
    run = new_run("run", precision="fp32")
    run.start()
    assert run.facts()["loss_scale"] == {"value": 1.0, "steps": 0}


def test_it_ends_at_one_and_below_what_float32_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = LossScale(CPU, on=True)
    while scale.lower():
        assert scale.factor.item() == scale.value
    assert scale.value == 1
    monkeypatch.setattr(loss_scale, "PATIENCE", 1)
    for _ in range(200):
        scale.settle(scale.value, good=True)
    assert scale.factor.isfinite()
    assert not LossScale(CPU, on=False).lower()
