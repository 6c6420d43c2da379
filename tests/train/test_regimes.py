"""The paper's regimes: what is trained when, what a switch keeps, and what a user has in the end."""

import copy
from typing import Any
from typing import cast as typed

import pytest
import tiny
import torch

from bridle.control.attach import attach
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.errors import ConfigError, TrainError
from bridle.kernels import attention, conv, norm, outer
from bridle.kernels.quicken import speeds_up, turn_weights
from bridle.kernels.record import Recorded
from bridle.train import trainer as trainer_module
from bridle.train import watch
from bridle.train.log import read_rows
from bridle.train.parallel import ALONE, World
from bridle.train.regime import Verdict, first_phase, next_switch
from bridle.train.settings import ProbeSettings, TrainSettings
from bridle.train.trainer import Trainer

SKIPS = "control.controlnet_down_blocks."


def make_trainer(run: Any, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    base = tiny.make_base()
    control = Control.from_base(base.pipeline)
    return Trainer(control, base.denoiser, base.schedule, run.cache, TrainSettings(**(run.values | changes)))


def steps(trainer: Trainer, first: int, last: int) -> None:
    from bridle.train.feed import Steps

    rows = Steps(trainer.cache, trainer.settings, len(trainer.schedule))
    for step in range(first, last):
        trainer.step(step, rows[step])


def predict(trainer: Trainer) -> torch.Tensor:
    with torch.no_grad():
        latents, timesteps, text, hint = tiny.make_inputs()
        prediction: torch.Tensor = trainer.model(latents, timesteps, Text(text), hint)
    return prediction


def test_the_middle_link_alone_trains_no_other_and_keeps_nothing_for_it(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"), regime="small")
    steps(trainer, 0, 2)
    skips = list(trainer.control.controlnet_down_blocks.parameters())
    assert not any(p.any() or p.requires_grad or p.grad is not None for p in skips)
    assert trainer.control.controlnet_mid_block.weight.any()
    assert not any(name.startswith(SKIPS) for name in trainer.trained)
    residuals = trainer.control(*tiny.make_inputs())
    assert all(link.numel() == 1 and not link.requires_grad for link in residuals.down)


@pytest.mark.parametrize("regime", ["standard", "small", "large"])
def test_a_step_as_one_function_of_tensors_is_the_same_step(new_run: Any, regime: str) -> None:
    """A CUDA graph records that function; here it is called."""

    def train(whole: bool) -> dict[str, torch.Tensor]:
        trainer = make_trainer(new_run("run"), regime=regime, batch=4, accumulate=1)
        for first, phase in ((0, first_phase(trainer.settings)), (2, "unlocked" if regime == "large" else "connected")):
            if phase != trainer.phase:
                trainer.switch(phase, first)
            calls = []

            def step(*inputs: torch.Tensor, at: Trainer = trainer, calls: list[int] = calls) -> Any:
                calls.append(1)
                return at._whole_step(*inputs)

            trainer.recorded = Recorded(step) if whole else None
            steps(trainer, first, first + 2)
            assert len(calls) == (2 if whole else 0)
        return {name: weight.detach().clone() for name, weight in trainer.trained.items()}

    plain = train(False)
    for name, weight in train(True).items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-7)


def test_a_compiled_step_is_the_same_step(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def trace(module: Any, **how: Any) -> Any:  # all that the compiler would compile, as one graph
        asked.append(how)
        return compile(module, backend="eager", fullgraph=True, **how)

    def train() -> dict[str, torch.Tensor]:
        trainer = make_trainer(new_run("run"), regime="small", accumulate=1)
        steps(trainer, 0, 2)
        trainer.switch("connected", 2)
        steps(trainer, 2, 4)
        return {name: weight.detach().clone() for name, weight in trainer.trained.items()}

    compile = torch.compile
    monkeypatch.setattr(Trainer, "_compiles", lambda self: True)
    monkeypatch.setattr(torch, "compile", lambda module, **how: module)
    plain = train()
    monkeypatch.setattr(torch, "compile", trace)
    same = train()
    assert asked == [{"dynamic": False}] * 2  # once for each phase
    for name, weight in same.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-7)


def test_channels_are_passed_on_last_in_a_step_and_not_while_something_else_computes(
    new_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU where that pays; here the norms' stand-ins let them answer themselves."""
    asked: list[bool] = []
    monkeypatch.setattr(trainer_module, "pays", lambda device, recorded: asked.append(recorded) or True)
    monkeypatch.setattr(trainer_module, "speeds_up", lambda kind: False)
    monkeypatch.setattr(trainer_module, "check_width", lambda *_: None)  # which is for CPUs
    base = tiny.make_base()
    before = {name: weight.stride() for name, weight in base.denoiser.named_parameters()}
    control = Control.from_base(base.pipeline)
    run = new_run("run", precision="bf16", batch=4, accumulate=1)
    trainer = Trainer(control, base.denoiser, base.schedule, run.cache, TrainSettings(**run.values))
    seen: list[int] = []

    def replaced(model: Any) -> int:
        return sum(type(module) is torch.nn.GroupNorm and "forward" in vars(module) for module in model.modules())

    control.conv_in.register_forward_hook(lambda *_: seen.append(replaced(trainer.inner)))
    steps(trainer, 0, 1)
    assert seen == [sum(type(module) is torch.nn.GroupNorm for module in trainer.inner.modules())]
    assert asked == [False]  # there is no graph on a CPU
    with trainer.averaged() as average:
        assert replaced(trainer.inner) == replaced(average) == 0
    trainer.close()
    assert {name: weight.stride() for name, weight in base.denoiser.named_parameters()} == before
    assert trainer._lies_last()
    trainer.world = World(size=2)  # each might find something else
    assert not trainer._lies_last()
    trainer.world, trainer.precision = ALONE, "fp32"
    assert not trainer._lies_last()


def test_a_recording_is_forgotten_while_pictures_are_drawn_but_not_that_there_can_be_none(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"))
    trainer.recorded = recorded = Recorded(trainer._whole_step)
    recorded.graph, recorded.inputs, recorded.outputs = typed(Any, object()), [torch.ones(1)], [torch.ones(1)]
    recorded.calls, recorded.refused = 7, True
    with trainer.averaged():
        assert (recorded.graph, recorded.inputs, recorded.outputs, recorded.calls) == (None, [], (), 0)
    assert trainer.recorded is recorded
    assert recorded.refused


def test_once_memory_does_not_hold_a_whole_step_no_recording_of_one_is_kept(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"), batch=4, accumulate=1)
    trainer.recorded = Recorded(trainer._whole_step)
    trainer._halve()
    assert trainer.micro == 2
    assert trainer.recorded is None


def test_connecting_all_links_changes_no_output_at_that_moment(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"), regime="small")
    steps(trainer, 0, 3)
    before = predict(trainer)
    trainer.switch("connected", 3)
    assert trainer.control.links == "all"
    assert torch.equal(predict(trainer), before)
    steps(trainer, 3, 4)
    assert all(conv.weight.any() for conv in trainer.control.controlnet_down_blocks)


def test_unlocking_changes_no_output_at_that_moment(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was measured on this machine, which decides how much the kernels of trained weights round otherwise."""
    for module in (attention, conv, norm, outer):
        monkeypatch.setattr(module, "pick", lambda shape, make_ways: next(iter(make_ways())))
    trainer = make_trainer(new_run("run"), regime="large")
    steps(trainer, 0, 2)
    before = predict(trainer)
    trainer.switch("unlocked", 2)
    torch.testing.assert_close(predict(trainer), before, rtol=1e-5, atol=1e-6)  # trained weights take other kernels


def test_a_switch_keeps_the_optimisers_state_of_what_stays_and_starts_the_rest_afresh(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"), regime="auto", unlock="decoder")
    steps(trainer, 0, 2)
    before = {name: tensor.clone() for name, tensor in trainer.tensors().items() if name.startswith("optimizer.")}
    trainer.switch("connected", 2)
    after = trainer.tensors()
    assert before
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(name.startswith(f"optimizer.{SKIPS}") for name in after)
    steps(trainer, 2, 3)
    after = trainer.tensors()
    assert after["optimizer.control.conv_in.weight.step"] == 3
    assert after[f"optimizer.{SKIPS}0.weight.step"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_without_averaging_what_is_saved_is_what_was_trained(new_run: Any, optimizer: str) -> None:
    """Also once weights have come to lie elsewhere, as 8-bit optimisers and drawing have them."""
    if optimizer == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    trainer = make_trainer(new_run("run"), regime="large", ema_decay=0.0, optimizer=optimizer, warmup=0, clip_norm=1.0)
    steps(trainer, 0, 2)
    trainer.switch("unlocked", 2)
    turn_weights(trainer.denoiser)()
    weights = [module.weight for module in trainer.denoiser.modules() if type(module) is torch.nn.Conv2d]
    for weight in weights:
        weight.data = weight.data.clone()
    steps(trainer, 2, 4)
    with trainer.averaged() as control:
        for name, weight in trainer.control.named_parameters():
            assert torch.equal(control.get_parameter(name), weight), name
        delta = control.base_delta
    expected = {name: trainer.original[f"base.{name}"] + change for name, change in delta.items()}
    assert expected
    for name, weight in expected.items():
        torch.testing.assert_close(trainer.denoiser.get_parameter(name).detach(), weight)


def test_a_step_in_float32_is_computed_by_the_kernels(new_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not speeds_up(torch.float32):
        pytest.skip("no C compiler here")
    computed = []
    compute = conv.forward
    monkeypatch.setattr(conv, "forward", lambda hidden, spec: computed.append(hidden.dtype) or compute(hidden, spec))
    trainer = make_trainer(new_run("run"), precision="fp32")
    steps(trainer, 0, 1)
    assert set(computed) == {torch.float32}
    assert trainer.control.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    trainer.close()
    assert trainer.denoiser.conv_in.weight.is_contiguous()


@pytest.mark.parametrize(("unlock", "part"), [("decoder", 0.5), ("all", 0.9)])
def test_an_unlocked_base_learns_with_its_own_learning_rate(new_run: Any, unlock: str, part: float) -> None:
    trainer = make_trainer(new_run("run"), regime="large", unlock=unlock, unlock_lr=1e-4, warmup=0)
    before = copy.deepcopy(trainer.denoiser.state_dict())
    steps(trainer, 0, 1)
    assert all(torch.equal(value, before[name]) for name, value in trainer.denoiser.state_dict().items())
    trainer.switch("unlocked", 1)
    steps(trainer, 1, 2)
    moved = {name for name, value in trainer.denoiser.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) > part * sum(unlock == "all" or n.startswith(("up_blocks", "conv_", "conv_norm")) for n in before)
    if unlock == "decoder":
        assert all(name.startswith(("up_blocks.", "conv_norm_out.", "conv_out.")) for name in moved)
    change = (trainer.denoiser.conv_out.bias - before["conv_out.bias"]).abs().max()
    assert 0 < change <= 1.1e-4  # a first step of AdamW is as long as the learning rate


@pytest.mark.parametrize("ema_decay", [0.0, 0.01])
def test_what_is_handed_out_draws_with_the_base_as_it_was_as_training_would(new_run: Any, ema_decay: float) -> None:
    trainer = make_trainer(new_run("run"), regime="large", unlock_lr=1e-2, ema_decay=ema_decay)
    original = copy.deepcopy(trainer.denoiser.state_dict())
    steps(trainer, 0, 2)
    trainer.switch("unlocked", 2)
    steps(trainer, 2, 5)
    wanted = predict(trainer)
    trained = copy.deepcopy(trainer.denoiser.state_dict())
    with trainer.averaged() as control:
        assert all(torch.equal(value, original[name]) for name, value in trainer.denoiser.state_dict().items())
        base = tiny.make_base()
        latents, timesteps, text, hint = tiny.make_inputs()
        with attach(base.pipeline, edge=control) as rig, torch.no_grad():
            rig["edge"].set(hint=hint)
            drawn = base.denoiser(latents, timesteps, text).sample
        assert torch.allclose(drawn, wanted, atol=1e-5 if ema_decay == 0 else 0.05)
        assert not torch.allclose(base.denoiser(latents, timesteps, text).sample, wanted, atol=1e-2)
    assert all(torch.equal(value, trained[name]) for name, value in trainer.denoiser.state_dict().items())


def test_a_run_goes_through_its_phases_and_says_why(new_run: Any) -> None:
    run = new_run("run", regime="small", reconnect=2)
    run.start()
    events = [row["message"] for row in read_rows(run.folder / "events.jsonl") if row["kind"] == "switch"]
    assert events == ["step 2: all links connected, because train.reconnect is 2"]
    assert [row["phase"] for row in read_rows(run.folder / "probes.jsonl")] == ["middle", "middle", *["connected"] * 2]
    run = new_run("large", regime="large", unlock_after=3)
    run.start(base=tiny.make_base())
    assert any("the base is being trained on 5 pairs and will overfit" in said for said in run.said)
    assert any(name.startswith("base.up_blocks.") for name in run.tensors())


def test_without_held_out_pairs_a_regime_that_asks_the_probe_is_refused(new_run: Any, monkeypatch: Any) -> None:
    run = new_run("run", regime="auto")
    monkeypatch.setattr(type(run.cache), "held_out_ids", ())
    with pytest.raises(ConfigError, match=r"train.regime is 'auto'.*held_out"):
        run.start()
    assert new_run("plain").start().finished


TABLE = [
    # settings, phase, step, verdict, what comes
    ({"regime": "standard"}, "connected", 10**6, {"learned": True, "settled": True}, None),
    ({"regime": "small", "reconnect": 5}, "middle", 4, {"associated": True}, None),
    ({"regime": "small", "reconnect": 5}, "middle", 5, {}, "connected"),
    ({"regime": "small"}, "middle", 49, {}, None),
    ({"regime": "small"}, "middle", 20, {"associated": True}, "connected"),
    ({"regime": "small"}, "middle", 50, {}, "connected"),
    ({"regime": "small"}, "connected", 999, {"learned": True, "settled": True}, None),
    ({"regime": "large"}, "connected", 49_999, {"learned": True, "settled": True}, None),
    ({"regime": "large"}, "connected", 50_000, {}, "unlocked"),
    ({"regime": "large", "unlock_after": "auto"}, "connected", 60_000, {"associated": True}, None),
    ({"regime": "large", "unlock_after": "auto"}, "connected", 10, {"learned": True}, "unlocked"),
    ({"regime": "auto"}, "middle", 10, {"associated": True}, "connected"),
    ({"regime": "auto"}, "connected", 10, {"learned": True, "settled": True}, None),
    ({"regime": "auto", "unlock": "all"}, "connected", 10, {"learned": True}, None),
    ({"regime": "auto", "unlock": "all"}, "connected", 10, {"learned": True, "settled": True}, "unlocked"),
    ({"regime": "auto", "unlock": "all"}, "unlocked", 10, {"learned": True, "settled": True}, None),
    ({"regime": "standard"}, "middle", 10, {}, "connected"),  # a run that was begun in another regime
]


@pytest.mark.parametrize(("values", "phase", "step", "verdict", "expected"), TABLE)
def test_when_to_switch(values: Any, phase: Any, step: int, verdict: Any, expected: str | None) -> None:
    switch = next_switch(TrainSettings(**values), phase, step, Verdict(**verdict))
    assert (switch and switch.phase) == expected
    assert switch is None or switch.reason


def test_where_each_regime_begins() -> None:
    begins = {regime: first_phase(TrainSettings(regime=regime)) for regime in ("standard", "small", "large", "auto")}
    assert begins == {"standard": "connected", "small": "middle", "large": "connected", "auto": "middle"}


def row(step: int, advantage: float, error: float = 0.01, learned: bool = False) -> dict[str, Any]:
    figures = {"mean": advantage, "error": error}
    return {"step": step, "advantage": figures, "controllability": None, "learned": learned}


def test_association_is_two_clear_probes_in_a_row_since_the_switch() -> None:
    weak, strong = row(1, 0.02), row(2, 0.04)
    assert not watch.associated([strong])
    assert not watch.associated([strong, weak])
    assert watch.associated([weak, strong, strong])
    seen = watch.Watch([row(1, 0.04), row(2, 0.04)])
    assert seen.verdict(0).associated
    assert not seen.verdict(1).associated


def test_the_best_control_is_one_that_was_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "learned", lambda rows: rows[-1]["advantage"]["mean"] > 0.2)
    seen = watch.Watch()
    best = [seen.add(row(step, advantage)).best for step, advantage in enumerate((0.1, 0.25, 0.15, 0.3, 0.3))]
    assert best == [False, True, False, True, False]
    assert (seen.best, seen.without_better) == (3, 1)
    assert watch.Watch([row(0, 0.3)]).without_better == 0


def test_the_best_control_draws_with_the_least_error_where_lower_figures_are_better() -> None:
    def drawn(step: int, mean: float) -> dict[str, Any]:
        figures = {"measure": "depth_rmse", "lower_is_better": True, "mean": mean}
        return row(step, 0.1, learned=True) | {"controllability": figures}

    assert watch.Watch([drawn(0, 40.0), drawn(1, 22.0), drawn(2, 30.0)]).best == 1


def test_learned_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "learned", lambda rows: len(rows) == 2)
    seen = watch.Watch()
    said = [seen.add(row(step, 0.31, 0.02)).messages for step in (0, 40, 80)]
    assert said == [(), (("learned", "control learned at step 40 (advantage 0.31 ± 0.02)"),), ()]


def test_probing_changes_no_weight(new_run: Any, whole: Any) -> None:
    run = new_run("run")
    run.start(probing=ProbeSettings(every=1, pairs=2))
    ours, theirs = run.tensors(), whole.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_an_average_of_one_takes_no_memory(new_run: Any) -> None:
    trainer = make_trainer(new_run("run"), ema_decay=0.0)
    steps(trainer, 0, 2)
    with trainer.averaged() as control:
        ours, theirs = dict(control.named_parameters()), dict(trainer.control.named_parameters())
        assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
        assert not any(parameter.requires_grad for parameter in ours.values())
    assert not any(name.startswith("average.") for name in trainer.tensors())


def test_a_base_in_float64_is_not_trained_with(new_run: Any) -> None:
    base, run = tiny.make_base(), new_run("run")
    control = Control.from_base(base.pipeline)
    base.denoiser.double()
    with pytest.raises(TrainError, match=r"torch\.float64.*expected float32, bfloat16 or float16"):
        Trainer(control, base.denoiser, base.schedule, run.cache, TrainSettings(**run.values | {"precision": "auto"}))
