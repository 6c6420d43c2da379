"""Training learns, stops when asked, goes on bit for bit, and refuses to go on with something else."""

import copy
import signal
from typing import Any

import pytest
import torch

from bridle.cache.store import Cache
from bridle.errors import ConfigError, TrainError
from bridle.train import checkpoint, loop, trainer, watch
from bridle.train.log import RunLog, read_rows
from bridle.train.loop import CHECKPOINTS
from bridle.train.settings import MachineSettings, ProbeSettings


def same(left: Any, right: Any) -> bool:
    """Nested states, bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def test_the_loss_falls_on_what_it_overfits_and_the_base_never_moves(new_run: Any) -> None:
    run = new_run("run", steps=40, batch=4, accumulate=1, lr=3e-3, checkpoint_every=40)
    before = copy.deepcopy(run.base.denoiser.state_dict())
    outcome = run.start()
    losses = [row["loss"] for row in read_rows(run.folder / "metrics.jsonl")]
    assert outcome.finished
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert same(dict(run.base.denoiser.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("stops", "where"), [([1], "progress"), ([2, 3, 5], "progress"), ([3], "preview"), ([4], "save")]
)
def test_a_stopped_run_goes_on_bit_for_bit(new_run: Any, whole: Any, stops: list[int], where: str) -> None:
    stopped = new_run("stopped")
    for stop_at in stops:
        outcome = stopped.start(stop_at, where)
        assert not outcome.finished
        assert stopped.facts()["step"] == outcome.step  # what was done is not lost
    assert stopped.start().finished
    assert stopped.digest() == whole.digest()
    assert not same(whole.tensors("control."), whole.tensors("average."))
    steps = [row["step"] for row in read_rows(stopped.folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_handlers_of_signals_are_put_back(new_run: Any) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    new_run("run", steps=2).start(1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_killed_run_repeats_the_steps_after_its_checkpoint_and_reports_none_twice(new_run: Any, whole: Any) -> None:
    killed = new_run("killed")
    killed.start(stop_at=2)
    RunLog(killed.folder, 2).metrics({"step": 3, "loss": 0.5})
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    killed.start()
    assert killed.digest() == whole.digest()
    ours, theirs = (read_rows(run.folder / "metrics.jsonl") for run in (killed, whole))
    assert [(row["step"], row["loss"]) for row in ours] == [(row["step"], row["loss"]) for row in theirs]


def test_what_no_checkpoint_knows_of_is_not_told_twice(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first checkpoint; and at a step whose probe the checkpoint had not seen."""
    run = new_run("run")
    for known in ((), {0}):
        log = RunLog(run.folder, -1 if not known else 0, known)
        log.probe({"step": 0, "advantage": {"mean": 0.0}, "controllability": None})
        log.event(0, "warning", "this")
        assert [row["step"] for row in read_rows(run.folder / "probes.jsonl")] == [0] * (1 + len(known))
    RunLog(run.folder, 2, {0}).probe({"step": 2, "advantage": {"mean": 0.0}, "controllability": None})
    told = RunLog(run.folder, 2, {0})
    assert [row["step"] for row in read_rows(run.folder / "probes.jsonl")] == [0, 0]
    kinds = ("memory", "learned", "switch", "warning")  # the first has nothing to do with a probe
    for probed, left in (({0}, kinds[:1]), ({0, 2}, kinds)):
        (run.folder / "events.jsonl").unlink()
        told.probe({"step": 2, "advantage": {"mean": 0.0}, "controllability": None})
        for kind in kinds:
            told.event(2, kind, "this")
        RunLog(run.folder, 2, probed)
        assert [row["kind"] for row in read_rows(run.folder / "events.jsonl")] == list(left)


def test_a_users_own_files_among_a_runs_are_left_alone(new_run: Any) -> None:
    run = new_run("run")
    run.start(stop_at=3)
    (run.folder / "previews").mkdir(exist_ok=True)
    mine = run.folder / "previews" / "step-00000009 copy.png"
    mine.write_bytes(b"")
    events = run.folder / "events.jsonl"
    events.write_text(events.read_text() + '{"kind": "note"}\n')
    assert run.start().finished
    assert mine.exists()


def test_a_finished_run_does_nothing_more_and_a_longer_one_goes_on(new_run: Any, whole: Any) -> None:
    run = new_run("run", steps=4)
    run.start()
    first = run.digest()
    assert run.start().finished
    assert run.digest() == first
    assert run.saved == [2, 4]
    outcome = run.start(steps=2)
    assert (outcome.step, outcome.finished, outcome.reason) == (4, True, "train.steps is 2, and more are done")
    run.start(steps=6)
    assert same(run.tensors(), whole.tensors())


def test_accumulated_batches_equal_a_large_one(new_run: Any) -> None:
    two, one = new_run("two", steps=2), new_run("one", steps=2, batch=4, accumulate=1)
    two.start()
    one.start()
    ours, theirs = (read_rows(run.folder / "metrics.jsonl") for run in (two, one))
    for left, right in zip(ours, theirs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-4}, r"train.lr was 0.001, is 0.0001"),
        ({"accumulate": 1}, r"train.batch × train.accumulate was 4, is 2"),
        ({"seed": 7}, r"train.seed was 0, is 7"),
        ({"clip_norm": 0.5}, r"train.clip_norm was 1.0, is 0.5"),
        ({"control": {"hint_encoder": "paper"}}, r"the control was made otherwise"),
        ({"control": {"hint_channels": 1}}, r"the control was made otherwise"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(new_run: Any, changes: dict[str, Any], said: str) -> None:
    run = new_run("run")
    run.start(stop_at=1)
    with pytest.raises(TrainError, match=f"this run cannot go on: {said}.* Undo that"):
        run.start(**changes)


def test_a_run_does_not_go_on_with_other_data(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("run")
    run.start(stop_at=1)
    monkeypatch.setattr(type(run.cache), "fingerprint", "another")
    with pytest.raises(TrainError, match="cannot go on: the data, its settings or the base changed"):
        run.start()


def test_how_long_and_how_often_may_change(new_run: Any) -> None:
    run = new_run("run")
    run.start(stop_at=1)
    free = {"steps": 2, "checkpoint_every": 1, "preview_every": 1, "log_every": 2, "keep": 1}
    assert free.keys() <= loop.FREE
    assert run.start(**free).finished


def test_force_goes_on_and_says_what_changed(new_run: Any) -> None:
    run = new_run("run")
    run.start(stop_at=1)
    assert run.start(force=True, lr=1e-4, seed=7).finished
    assert "going on although train.lr was 0.001, is 0.0001; train.seed was 0, is 7" in run.said
    kinds = [row["kind"] for row in read_rows(run.folder / "events.jsonl")]
    assert kinds.count("forced") == 1


def test_pairs_per_forward_pass_may_change_as_long_as_those_per_step_do_not(new_run: Any, whole: Any) -> None:
    run = new_run("run")
    run.start(stop_at=3)
    assert run.start(batch=4, accumulate=1).finished
    ours, theirs = (read_rows(folder / "metrics.jsonl") for folder in (run.folder, whole.folder))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)


def test_patience_ends_a_run_that_no_longer_improves(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "learned", lambda rows: len(rows) > 1)
    monkeypatch.setattr(watch, "score", lambda row: -abs(row["step"] - 3))
    run = new_run("run", steps=20, patience=2)
    outcome = run.start(probing=ProbeSettings(every=1, pairs=2))
    assert (outcome.step, outcome.finished, outcome.reason) == (5, True, "no better control in 2 probes")
    assert run.best == [1, 2, 3]
    assert run.start(probing=ProbeSettings(every=1, pairs=2)).step == 5


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_old_checkpoints_are_removed_only_beyond_what_is_kept(new_run: Any, keep: int, left: list[int]) -> None:
    run = new_run("run", keep=keep, steps=3, accumulate=1, checkpoint_every=1)
    run.start()
    assert run.checkpoints == [f"step-{step:08}" for step in left]


def test_checkpoints_and_previews_come_when_asked_for_and_at_the_end(new_run: Any, whole: Any) -> None:
    assert whole.saved == [2, 4, 6]
    assert whole.previewed == [3, 6]
    odd = new_run("odd", steps=1, accumulate=1)
    odd.start()
    assert (odd.saved, odd.previewed, odd.checkpoints) == ([1], [1], ["step-00000001"])


def test_the_control_is_saved_before_the_checkpoint_that_says_so(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run killed between the two would be finished without its control."""
    run = new_run("run", steps=1, accumulate=1)
    monkeypatch.setattr(loop.checkpoint, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.start()
    assert run.saved == [1]


def test_the_average_follows_and_is_what_is_handed_out(new_run: Any) -> None:
    run, plain = new_run("run", steps=2), new_run("plain", steps=2, ema_decay=0.0)
    outcome = run.start()
    assert same(dict(outcome.control.state_dict()), run.tensors("average."))
    assert not any(parameter.requires_grad for parameter in outcome.control.parameters())
    assert same(dict(plain.start().control.state_dict()), dict(plain.control.state_dict()))


def test_bfloat16_keeps_float32_weights(new_run: Any, wide_cache: Cache) -> None:
    run = new_run("run", steps=2, accumulate=1, precision="bf16")
    run.cache = wide_cache
    run.start()
    tensors = run.tensors("control.").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_pictures_too_small_for_bfloat16_on_a_cpu_are_refused(new_run: Any) -> None:
    with pytest.raises(TrainError, match=r"32 px wide, too small for train.precision 'bf16' .*size_px to 64 or more"):
        new_run("run", precision="bf16").start()


def test_the_learning_rate_rises_once_and_then_stays(new_run: Any) -> None:
    run = new_run("run", warmup=2, steps=4, accumulate=1)
    run.start()
    rates = [row["lr"] for row in read_rows(run.folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_is_left_as_it_was_found(new_run: Any, wide_cache: Cache, precision: str, checkpointing: bool) -> None:
    run = new_run("run", precision=precision, steps=1)
    run.cache = wide_cache
    before = ways(run.base)
    run.start(machine=MachineSettings(gradient_checkpointing=checkpointing))
    assert ways(run.base) == before


@pytest.mark.usefixtures("new_machine")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_what_is_fastest_is_found_out_also_where_activations_are_computed_again(
    new_run: Any, wide_cache: Cache, precision: str
) -> None:
    """What was measured in the first pass was once taken for what its blocks keep, and the run ended there."""
    run = new_run("run", precision=precision, steps=2)
    run.cache = wide_cache
    run.start(machine=MachineSettings(gradient_checkpointing=True))
    assert len(read_rows(run.folder / "metrics.jsonl")) == 2


def test_a_run_that_is_refused_leaves_the_base_as_it_found_it(
    new_run: Any, wide_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **how: Any) -> Any:
        raise ConfigError("no such optimiser here")

    run = new_run("run", precision="bf16", steps=1)
    run.cache = wide_cache
    before = ways(run.base)
    monkeypatch.setattr(trainer, "make_optimizer", refuse)
    with pytest.raises(ConfigError):
        run.start()
    assert ways(run.base) == before


def ways(base: Any) -> list[Any]:
    """Of each module all but its weights' values: where another run on the same base would compute otherwise."""
    entries = ("forward", "processor", "gradient_checkpointing", "_forward_pre_hooks")
    modules = list(base.denoiser.modules())
    placed = [[repr(vars(module).get(entry)) for entry in entries] for module in modules]
    return [placed, [weight.stride() for weight in base.denoiser.parameters()]]


def test_the_learning_rate_falls_over_the_last_steps_where_asked(new_run: Any) -> None:
    run = new_run("run", warmup=1, steps=4, accumulate=1, decay=0.5)
    run.start()
    rates = [row["lr"] for row in read_rows(run.folder / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])


def test_a_dropped_prompt_is_the_empty_caption(new_run: Any) -> None:
    run = new_run("run")
    seen: list[torch.Tensor] = []
    hook = run.base.denoiser.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["encoder_hidden_states"]) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    run.start(steps=1, prompt_dropout=1.0)
    hook.remove()
    assert all(torch.equal(text, run.cache.empty_text.states.expand_as(text)) for text in seen)


def test_a_checkpoint_of_an_older_version_is_named_not_passed_over(new_run: Any) -> None:
    run = new_run("run")
    (run.folder / "checkpoints").mkdir(parents=True)
    (run.folder / "checkpoints" / "step-00000200.pt").touch()
    with pytest.raises(TrainError, match=r"step-00000200.pt was written by Bridle 0.1.0: .*--out"):
        run.start()


def decide(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """What this machine is faster in."""
    choose = lambda wanted, *_: precision if wanted == "auto" else wanted  # noqa: E731
    monkeypatch.setattr(loop, "choose_precision", choose)


@pytest.mark.parametrize(("faster", "said"), [("fp32", 1), ("bf16", 0)])
def test_what_is_computed_in_is_decided_once_and_kept(
    new_run: Any, wide_cache: Cache, monkeypatch: pytest.MonkeyPatch, faster: str, said: int
) -> None:
    """A run that goes on elsewhere, or after something else was found faster, is the same run."""
    auto, plain = new_run("auto", precision="auto", steps=2), new_run("plain", precision=faster, steps=4)
    auto.cache = plain.cache = wide_cache
    decide(monkeypatch, faster)
    auto.start()
    messages = [row["message"] for row in read_rows(auto.folder / "events.jsonl") if row["kind"] == "kernels"]
    assert sum("float32" in message for message in messages) == said
    assert checkpoint.newest_precision(auto.folder / CHECKPOINTS) == faster

    decide(monkeypatch, "fp32" if faster == "bf16" else "bf16")
    auto.start(steps=4)
    plain.start()
    assert same(auto.tensors("control."), plain.tensors("control."))
