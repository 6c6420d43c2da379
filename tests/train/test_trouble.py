"""When things go wrong: what cannot be trained on is skipped and named, memory is made to last, and nothing is lost."""

from typing import Any

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from bridle.errors import TrainError
from bridle.train.log import read_rows
from bridle.train.optim import DenseAdamW
from bridle.train.probe import Probe
from bridle.train.trainer import Trainer


def break_at(monkeypatch: pytest.MonkeyPatch, steps: set[int], how: str) -> None:
    """Make loss or gradient of these steps (counted from 0) infinite."""
    step, losses, broken = Trainer.step, Trainer.losses, {"now": False}

    def watched(self: Trainer, number: int, *rest: Any) -> Any:
        broken["now"] = number in steps
        return step(self, number, *rest)

    def spoilt(self: Trainer, batch: Any, draws: Any) -> torch.Tensor:
        loss = losses(self, batch, draws)
        if not broken["now"]:
            return loss
        if how == "loss":
            return loss * torch.tensor([float("nan"), *[1.0] * (len(loss) - 1)])
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(Trainer, "losses", spoilt)


@pytest.mark.parametrize(("how", "named"), [("loss", 2), ("gradient", 4)])
def test_a_step_without_a_finite_loss_or_gradient_is_skipped_counted_and_its_samples_are_named(
    new_run: Any, monkeypatch: pytest.MonkeyPatch, how: str, named: int
) -> None:
    break_at(monkeypatch, {2}, how)
    run = new_run("run")
    assert run.start().finished
    assert all(tensor.isfinite().all() for tensor in run.tensors().values())
    rows = read_rows(run.folder / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert [row["grad_norm"] is None for row in rows] == [False, False, True, False, False, False]  # JSON has no NaN
    events = [row for row in read_rows(run.folder / "events.jsonl") if row["kind"] == "skipped"]
    assert [event["step"] for event in events] == [3]
    assert len(events[0]["samples"]) == named
    assert set(events[0]["samples"]) <= set(run.cache.train_ids)


def test_a_skipped_step_leaves_no_trace_in_weights_average_and_optimiser(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("run", steps=3, checkpoint_every=2, keep=5)
    break_at(monkeypatch, {2}, "loss")
    run.start()
    after = run.tensors()
    monkeypatch.undo()
    before = new_run("before", steps=2)
    before.start()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.tensors().items())


def test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(
    new_run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("run", skips=2)
    break_at(monkeypatch, {3, 4}, "loss")
    with pytest.raises(TrainError, match=r"2 steps in a row up to 5 had no finite .*the last checkpoint is intact"):
        run.start()
    assert run.facts()["step"] == 4
    monkeypatch.undo()
    other = new_run("other", skips=2)
    break_at(monkeypatch, {1, 3}, "loss")  # two, but not in a row
    assert other.start().finished


def forget_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let a forward pass of more pairs than `most` run out of memory. Returns: the sizes that were tried."""
    losses, tried = Trainer.losses, []

    def limited(self: Trainer, batch: Any, draws: Any) -> torch.Tensor:
        tried.append(len(batch.mean))
        if len(batch.mean) > most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
        return losses(self, batch, draws)

    monkeypatch.setattr(Trainer, "losses", limited)
    return tried


def test_out_of_memory_halves_the_forward_pass_and_changes_nothing_else(
    new_run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("run", batch=4, accumulate=1)
    tried = forget_memory(monkeypatch, most=1)
    assert run.start().finished
    assert tried[:5] == [4, 2, 1, 1, 1]
    assert set(tried[3:]) == {1}
    assert sum("out of memory" in said for said in run.said) == 2  # 4 to 2, 2 to 1; never again
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (run.folder, whole.folder))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


def test_what_memory_allowed_is_remembered(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("run", batch=4, accumulate=1)
    tried = forget_memory(monkeypatch, most=2)
    run.start(stop_at=2)
    tried.clear()
    run.start()
    assert set(tried) == {2}


def test_probes_have_no_more_pairs_in_a_pass_than_memory_holds(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_memory(monkeypatch, most=2)
    read, batches = Probe.read, []
    monkeypatch.setattr(Probe, "read", lambda self, *rest: batches.append(self.batch) or read(self, *rest))
    new_run("run", batch=4, accumulate=1).start()
    assert batches == [4, 2, 2, 2]  # the first one before any step


def test_one_pair_that_does_not_fit_is_an_error_with_a_remedy(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_memory(monkeypatch, most=0)
    with pytest.raises(TrainError, match=r"out of memory with one pair per forward pass; .*gradient_checkpointing"):
        new_run("run").start()


def test_out_of_memory_in_the_optimiser_says_what_to_do_and_what_is_left(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(DenseAdamW, "step", fail)
    said = r"out of memory after step 0, .*the last checkpoint is intact; .*adamw8bit"
    with pytest.raises(TrainError, match=said):
        new_run("run").start()


def test_nothing_of_training_stays_in_base_and_control(new_run: Any, wide_cache: Any) -> None:
    base = tiny.make_base()
    before = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
    how = {"regime": "large", "unlock": "decoder", "unlock_after": 2, "unlock_lr": 1e-2}
    run = new_run("run", precision="bf16", accumulate=1, **how)
    run.cache = wide_cache
    control = run.start(base=base).control
    assert any(delta.any() for delta in control.base_delta.values())
    assert all(torch.equal(weight, before[name]) for name, weight in base.denoiser.state_dict().items())
    assert not any(weight.requires_grad for weight in base.denoiser.parameters())
    for trained in (run.control, control):
        assert {getattr(weight, "grad_dtype", weight.dtype) for weight in trained.parameters()} == {torch.float32}
        assert {type(processor) for processor in processors(trained)} == {AttnProcessor2_0}


def processors(model: Any) -> list[Any]:
    return [module.processor for module in model.modules() if hasattr(module, "processor")]


def test_out_of_memory_while_the_base_is_unlocked_is_an_error_and_leaves_it_as_it_was(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone, switch = torch.Tensor.clone, Trainer.switch
    copied: list[int] = []

    def fail_half_way(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        if len(copied) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return clone(tensor)

    def unlock(self: Trainer, *args: Any) -> None:
        monkeypatch.setattr(torch.Tensor, "clone", fail_half_way)
        try:
            switch(self, *args)
        finally:
            monkeypatch.setattr(torch.Tensor, "clone", clone)

    monkeypatch.setattr(Trainer, "switch", unlock)
    base = tiny.make_base()
    before = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
    with pytest.raises(TrainError, match=r"out of memory after step 1, .*the last checkpoint is intact"):
        new_run("run", regime="large", unlock_after=1).start(base=base)
    assert len(copied) == 6
    assert all(torch.equal(weight, before[name]) for name, weight in base.denoiser.state_dict().items())
    assert not any(weight.requires_grad for weight in base.denoiser.parameters())


def test_what_breaks_a_run_off_leaves_the_base_as_it_was(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make_base()
    before = {name: weight.clone() for name, weight in base.denoiser.state_dict().items()}
    break_at(monkeypatch, {4, 5}, "loss")
    run = new_run("run", regime="large", unlock="all", unlock_after=1, unlock_lr=1e-2, skips=2)
    with pytest.raises(TrainError, match="2 steps in a row"):
        run.start(base=base)
    assert all(torch.equal(weight, before[name]) for name, weight in base.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("began", "changes"),
    [
        ("decoder", {"unlock": "all"}),
        ("all", {"unlock": "decoder"}),
        ("all", {"regime": "standard", "unlock": None}),
        ("decoder", {"regime": "standard", "unlock": None}),  # whose phases would train the same weights
        ("decoder", {"regime": "auto", "unlock": None}),
    ],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_base_that_was_unlocked_stays_so_in_a_continuation(
    new_run: Any, began: str, changes: dict[str, Any], force: bool
) -> None:
    run = new_run("run", steps=3, accumulate=1, regime="large", unlock=began, unlock_after=1)
    run.start(stop_at=2, base=tiny.make_base())
    said = rf"has trained \d+ of the base's weights, .* train.regime back to 'large' and train.unlock back to '{began}'"
    with pytest.raises(TrainError, match=said):
        run.start(base=tiny.make_base(), force=force, **changes)


def test_averages_that_are_asked_for_later_begin_as_the_weights(new_run: Any) -> None:
    run = new_run("run", ema_decay=0.0)
    run.start(stop_at=3)
    assert run.start(force=True, ema_decay=0.5).finished
    assert run.tensors("average.")


def test_a_base_that_would_never_be_unlocked_is_spoken_of(new_run: Any) -> None:
    run = new_run("run", regime="large", unlock_after=50)
    run.start(stop_at=2)
    assert any("the base stays locked" in said for said in run.said)
