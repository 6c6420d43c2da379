"""Gradients of bfloat16 products stay bfloat16 where a step is one pass; sums of several passes are float32."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from bridle.cache.store import Cache
from bridle.control.control import Control
from bridle.kernels import native
from bridle.train.feed import Steps
from bridle.train.settings import MachineSettings, TrainSettings
from bridle.train.trainer import Trainer

BF16 = torch.bfloat16


@pytest.fixture
def wide_run(new_run: Any, wide_cache: Cache) -> Any:
    run = new_run("run")
    run.cache = wide_cache
    return run


def make_trainer(run: Any, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    base = tiny.make_base()
    control = Control.from_base(base.pipeline)
    settings = TrainSettings(**(run.values | {"precision": "bf16", "ema_decay": 0.0} | changes))
    return Trainer(control, base.denoiser, base.schedule, run.cache, settings)


def kinds_at_each_step(trainer: Trainer, count: int) -> list[set[torch.dtype]]:
    """The types of the gradients of convolutions' weights that the optimiser is given."""
    seen: list[set[torch.dtype]] = []
    step = trainer.optimizer.step

    def look(*args: Any) -> Any:
        grads = [w.grad for n, w in trainer.trained.items() if w.ndim == 4 and w.grad is not None]
        seen.append({gradient.dtype for gradient in grads})
        assert all(w.grad is None or w.grad.dtype is torch.float32 for w in trainer.trained.values() if w.ndim == 1)
        return step(*args)

    trainer.optimizer.step = look
    rows = Steps(trainer.cache, trainer.settings, len(trainer.schedule))
    for number in range(count):
        trainer.step(number, rows[number])
    return seen


def test_it_is_said_where_no_compiler_is(wide_run: Any, no_compiler: None) -> None:
    assert wide_run.start(precision="bf16", steps=1, machine=MachineSettings()).finished
    assert any("no C compiler" in message for message in wide_run.said)


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_sums_of_several_passes_are_float32(wide_run: Any) -> None:
    whole = make_trainer(wide_run, batch=4, accumulate=1)
    assert kinds_at_each_step(whole, 2) == [{BF16}] * 2
    whole.fits = 2  # as once memory was found to hold no more
    assert kinds_at_each_step(whole, 1) == [{torch.float32}]
    split = make_trainer(wide_run, batch=2, accumulate=2)
    assert kinds_at_each_step(split, 2) == [{torch.float32}] * 2


@pytest.mark.skipif(native.library() is None, reason="no C compiler here")
def test_the_compiled_step_is_pytorchs(wide_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in bfloat16, our own clipping, AdamW, and casts written with it: the weights of the plain optimiser."""

    def train(halved: bool, count: int) -> Tensor:
        trainer = make_trainer(wide_run, batch=4, accumulate=1)
        if not halved:
            monkeypatch.setattr("bridle.train.optim.compiles", lambda parameters: False)
        rows = Steps(trainer.cache, trainer.settings, len(trainer.schedule))
        for number in range(count):
            trainer.step(number, rows[number])
        monkeypatch.undo()
        for weight, forms in trainer.optimizer.products.items() if halved and count else ():
            assert torch.equal(forms.made["cast"], weight.detach().to(BF16))
        return torch.cat([weight.detach().flatten() for weight in trainer.trained.values()])

    start = train(True, 0)
    for count, within in ((1, 1e-4), (4, 0.05)):  # where gradients are near zero, roundings add up
        plain, ours = train(False, count), train(True, count)
        assert ((ours - plain).norm() / (plain - start).norm()).item() < within
