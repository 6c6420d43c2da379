"""Training learns, stops when asked, goes on bit for bit, and refuses to go on with something else."""

import copy
import signal
from typing import Any

import pytest
import torch

from bridle.cache.store import Cache
from bridle.errors import ConfigError, TrainError
from bridle.train import loop
from bridle.train.checkpoint import list_checkpoints
from bridle.train.loop import Trainer
from bridle.train.metrics import Metrics, read_metrics
from bridle.train.settings import TrainSettings


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
    before = copy.deepcopy(run.base.unet.state_dict())
    outcome = run.start()
    losses = [row["loss"] for row in read_metrics(run.folder / "metrics.jsonl")]
    assert outcome.finished
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert same(dict(run.base.unet.state_dict()), dict(before))


@pytest.mark.parametrize(
    ("stops", "where"), [([1], "progress"), ([2, 3, 5], "progress"), ([3], "preview"), ([4], "save")]
)
def test_a_stopped_run_goes_on_bit_for_bit(new_run: Any, whole: Any, stops: list[int], where: str) -> None:
    stopped = new_run("stopped")
    for stop_at in stops:
        outcome = stopped.start(stop_at, where)
        assert not outcome.finished
        assert stopped.state()["step"] == outcome.step  # what was done is not lost
    assert stopped.start().finished
    assert same(stopped.state(), whole.state())
    assert not same(whole.state()["control"], whole.state()["average"])
    steps = [row["step"] for row in read_metrics(stopped.folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_the_handlers_of_signals_are_put_back(new_run: Any) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    new_run("run", steps=2).start(1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_killed_run_repeats_the_steps_after_its_checkpoint_and_reports_none_twice(new_run: Any, whole: Any) -> None:
    killed = new_run("killed")
    killed.start(stop_at=2)
    Metrics(killed.folder, 2).add({"step": 3, "loss": 0.5})
    with (killed.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    killed.start()
    assert same(killed.state(), whole.state())
    ours, theirs = (read_metrics(run.folder / "metrics.jsonl") for run in (killed, whole))
    assert [(row["step"], row["loss"]) for row in ours] == [(row["step"], row["loss"]) for row in theirs]


def test_a_finished_run_does_nothing_more_and_a_longer_one_goes_on(new_run: Any, whole: Any) -> None:
    run = new_run("run", steps=4)
    run.start()
    first = run.state()
    assert run.start().finished
    assert same(run.state(), first)
    assert run.saved == [2, 4]
    run.start(steps=6)
    first, second = run.state(), whole.state()
    assert same({**first, "settings": 0}, {**second, "settings": 0})


def test_accumulated_batches_equal_a_large_one(new_run: Any) -> None:
    two, one = new_run("two", steps=2), new_run("one", steps=2, batch=4, accumulate=1)
    two.start()
    one.start()
    ours, theirs = (read_metrics(run.folder / "metrics.jsonl") for run in (two, one))
    for left, right in zip(ours, theirs, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-4}, r"train.lr was 0.001, is 0.0001"),
        ({"accumulate": 1}, r"train.accumulate was 2, is 1"),
        ({"seed": 7}, r"train.seed was 0, is 7"),
        ({"clip_norm": 0.5}, r"train.clip_norm was 1.0, is 0.5"),
        ({"control": {"hint_encoder": "paper"}}, r"the control was made otherwise"),
        ({"control": {"hint_channels": 1}}, r"the control was made otherwise"),
    ],
)
def test_a_run_does_not_go_on_with_something_else(new_run: Any, changes: dict[str, Any], said: str) -> None:
    run = new_run("run")
    run.start(stop_at=1)
    with pytest.raises(
        TrainError, match=f"this run cannot go on: {said}.* Undo that, or start a run in another folder"
    ):
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


@pytest.mark.parametrize("broken", ["weight", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(
    new_run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    run = new_run("run")
    step = Trainer.step

    def break_at_four(self: Trainer, number: int) -> tuple[float, float]:
        if number == 3:
            value = torch.tensor(float("nan"))
            weight = self.control.conv_in.weight
            weight.data[0] = value if broken == "weight" else weight.data[0]
            weight.register_hook(lambda gradient: gradient * (value if broken == "gradient" else 1))
        return step(self, number)

    monkeypatch.setattr(Trainer, "step", break_at_four)
    with pytest.raises(TrainError, match=r"at step 4, samples .*the last checkpoint is intact: lower train.lr"):
        run.start()
    assert run.state()["step"] == 2
    monkeypatch.undo()
    run.start()
    assert same(run.state(), whole.state())


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [2, 3]), (9, [1, 2, 3])])
def test_old_checkpoints_are_removed_only_beyond_what_is_kept(new_run: Any, keep: int, left: list[int]) -> None:
    run = new_run("run", keep=keep, steps=3, accumulate=1, checkpoint_every=1)
    run.start()
    assert run.checkpoints == [f"step-{step:08}.pt" for step in left]


def test_checkpoints_and_previews_come_when_asked_for_and_at_the_end(new_run: Any, whole: Any) -> None:
    assert whole.saved == [2, 4, 6]
    assert whole.previewed == [3, 6]
    odd = new_run("odd", steps=1, accumulate=1)
    odd.start()
    assert (odd.saved, odd.previewed, odd.checkpoints) == ([1], [1], ["step-00000001.pt"])


def test_an_old_checkpoint_stays_until_the_new_one_is_safe(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("run", keep=1, accumulate=1, checkpoint_every=1)
    run.start(stop_at=1)
    monkeypatch.setattr(torch, "save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.start()
    assert run.checkpoints == ["step-00000001.pt"]


def test_the_control_is_saved_before_the_checkpoint_that_says_so(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run killed between the two would be finished without its control."""
    run = new_run("run", steps=1, accumulate=1)
    monkeypatch.setattr(loop, "save_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.start()
    assert run.saved == [1]


def test_a_damaged_checkpoint_is_named_and_runs_no_code(new_run: Any) -> None:
    run = new_run("run", accumulate=1)
    run.start(stop_at=1)
    newest = list_checkpoints(run.folder / "checkpoints")[-1]
    for damage in (newest.read_bytes()[:1000], b""):
        newest.write_bytes(damage)
        with pytest.raises(TrainError, match=rf"{newest} is damaged .*delete it to go on from the one before"):
            run.start()
    torch.save({"step": Trainer}, newest)  # a class of ours is code to a loader that trusts
    with pytest.raises(TrainError, match="is damaged"):
        run.start()


def test_the_average_follows_and_is_what_is_handed_out(new_run: Any) -> None:
    run, plain = new_run("run", steps=2), new_run("plain", steps=2, ema_decay=0.0)
    outcome = run.start()
    assert same(dict(outcome.control.state_dict()), dict(run.state()["average"]))
    assert not any(parameter.requires_grad for parameter in outcome.control.parameters())
    assert same(dict(plain.start().control.state_dict()), dict(plain.control.state_dict()))


def test_bfloat16_keeps_float32_weights(new_run: Any, wide_cache: Cache) -> None:
    run = new_run("run", steps=2, accumulate=1, precision="bf16")
    run.cache = wide_cache
    run.start()
    tensors = run.state()["control"].values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_pictures_too_small_for_bfloat16_on_a_cpu_are_refused(new_run: Any) -> None:
    with pytest.raises(TrainError, match=r"32 px wide, too small for train.precision 'bf16' .*size_px to 64 or more"):
        new_run("run", precision="bf16").start()


def test_only_the_middle_link_can_be_trained_and_the_others_connected_later(new_run: Any) -> None:
    run = new_run("run", steps=2, accumulate=1)
    run.start(stop_at=1, control={"links": "middle"})
    skips = [value for name, value in run.state()["control"].items() if name.startswith("controlnet_down_blocks.")]
    assert not any(value.any() for value in skips)
    run.start(control={"links": "all"})
    skips = [value for name, value in run.state()["control"].items() if name.startswith("controlnet_down_blocks.")]
    assert all(value.any() for value in skips)


def test_the_learning_rate_rises_once_and_then_stays(new_run: Any) -> None:
    run = new_run("run", warmup=2, steps=4, accumulate=1)
    run.start()
    rates = [row["lr"] for row in read_metrics(run.folder / "metrics.jsonl")]
    assert rates == pytest.approx([0.5e-3, 1e-3, 1e-3, 1e-3])


def test_the_learning_rate_falls_over_the_last_steps_where_asked(new_run: Any) -> None:
    run = new_run("run", warmup=1, steps=4, accumulate=1, decay=0.5)
    run.start()
    rates = [row["lr"] for row in read_metrics(run.folder / "metrics.jsonl")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 0.5e-3])


def test_a_dropped_prompt_is_the_empty_caption(new_run: Any) -> None:
    run = new_run("run")
    seen: list[torch.Tensor] = []
    hook = run.base.unet.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    run.start(steps=1, prompt_dropout=1.0)
    hook.remove()
    assert all(torch.equal(text, run.cache.empty_text.expand_as(text)) for text in seen)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "train.steps is 0; expected 1 or more"),
        ({"keep": 0}, "train.keep is 0; expected 1 or more"),
        ({"lr": 0.0}, "train.lr is 0.0; expected more than 0"),
        ({"lr": float("nan")}, "train.lr is nan"),
        ({"weight_decay": -0.1}, "train.weight_decay is -0.1; expected 0 or more"),
        ({"prompt_dropout": 1.5}, "train.prompt_dropout is 1.5; expected a share from 0 to 1"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0; expected from 0 to below 1"),
        ({"decay": 1.5}, "train.decay is 1.5; expected a share from 0 to 1"),
        ({"weighting": "snr"}, "train.weighting is 'snr'; expected 'uniform' or 'balanced'"),
        ({"precision": "fp16"}, "train.precision is 'fp16'; expected 'bf16' or 'fp32'"),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrainSettings(**values)
