"""An optimiser's state as named tensors: going on with it is bit for bit going on, and what joins starts fresh."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bridle.errors import ConfigError, TrainError
from bridle.kernels import native
from bridle.train import adamw, optim
from bridle.train.optim import OptimizerKind, clip, make_optimizer, optimizer_state, restore_optimizer

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


@pytest.fixture(params=["adamw", "adamw8bit", "bitsandbytes"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OptimizerKind:
    """Of those with 8 bits our own loop, and what stands in where there is none."""
    if request.param == "bitsandbytes":
        without_loops(monkeypatch)
    if request.param == "bitsandbytes" or (request.param == "adamw8bit" and native.library() is None):
        pytest.importorskip("bitsandbytes")
    return "adamw" if request.param == "adamw" else "adamw8bit"


def without_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "compiles", lambda parameters: False)


def make_model() -> nn.Sequential:
    """One weight that 8 bits quantise, in an order of its own in memory, and tensors too small for that."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3), nn.Conv2d(32, 4, 1))
    return model.to(memory_format=torch.channels_last)


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: f"control.{name}" for name, parameter in model.named_parameters()}


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def both(kind: OptimizerKind, model: nn.Module) -> torch.optim.Optimizer:
    """In two groups, as a control and an unlocked base are."""
    first, second = (list(layer.parameters()) for layer in model.children())
    return make_optimizer(kind, [{"params": first, "lr": 1e-2}, {"params": second, "lr": 1e-3}], weight_decay=0.01)


def test_five_steps_are_three_steps_a_file_and_two_steps(kind: OptimizerKind, tmp_path: Path) -> None:
    straight = make_model()
    take_steps(straight, both(kind, straight), range(5))

    stopped = make_model()
    optimizer = both(kind, stopped)
    take_steps(stopped, optimizer, range(3))
    state = optimizer_state(optimizer, names_of(stopped))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "state.safetensors")

    resumed = make_model()
    resumed.load_state_dict(stopped.state_dict())
    optimizer = both(kind, resumed)
    restore_optimizer(optimizer, names_of(resumed), load_file(tmp_path / "state.safetensors"))
    take_steps(resumed, optimizer, range(3, 5))
    ends = zip(straight.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(expected, found) for expected, found in ends)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(7, 5).t(),
        torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last),  # of the same shape, however it is turned
        torch.randn(4, 3, 2, 3, 3).to(memory_format=torch.channels_last_3d),
        torch.randn(8, 4, 1, 1).to(memory_format=torch.channels_last),
    ],
)
@pytest.mark.parametrize("loop", [True, False])
def test_a_gradient_may_lie_in_another_order_than_its_weight(
    weight: torch.Tensor, loop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not loop:
        monkeypatch.setattr(adamw, "compiles", lambda parameters: False)
    ours, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    optimizer = make_optimizer("adamw", [{"params": [ours], "lr": 1e-2}], weight_decay=0.01)
    reference = torch.optim.AdamW([plain], lr=1e-2, weight_decay=0.01)
    for _ in range(3):
        plain.grad = torch.randn(weight.shape)
        ours.grad = plain.grad.clone()
        clip(optimizer, [ours], most=1e9)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_what_joins_starts_fresh_and_what_stays_keeps_its_state_in_whatever_group(kind: OptimizerKind) -> None:
    model = make_model()
    first, second = (list(layer.parameters()) for layer in model.children())
    model[0].requires_grad_(False)
    before = make_optimizer(kind, [{"params": second, "lr": 1e-3}], weight_decay=0.0)
    take_steps(model, before, range(2))
    kept = {name: tensor.clone() for name, tensor in optimizer_state(before, names_of(model)).items()}
    assert {name.split(".")[1] for name in kept} == {"1"}

    model[0].requires_grad_(True)
    after = make_optimizer(kind, [{"params": first, "lr": 1e-3}, {"params": second, "lr": 1e-3}], weight_decay=0.0)
    take_steps(model, after, range(1))  # what it holds of its own gives way
    restore_optimizer(after, names_of(model), kept)
    restored = optimizer_state(after, names_of(model))
    assert restored.keys() == kept.keys()
    assert all(torch.equal(restored[name], kept[name]) for name in kept)


def test_eight_bits_keep_a_byte_per_moment(kind: OptimizerKind) -> None:
    model = make_model()
    optimizer = both(kind, model)
    take_steps(model, optimizer, range(1))
    state = optimizer_state(optimizer, names_of(model))
    size_bytes = sum(tensor.nbytes for name, tensor in state.items() if name.startswith("control.0.weight"))
    per_element = size_bytes / model[0].weight.numel()
    assert per_element == pytest.approx(8 if kind == "adamw" else 2, rel=0.02)


def test_the_state_of_another_kind_or_model_is_refused() -> None:
    model = make_model()
    optimizer = both("adamw", model)
    take_steps(model, optimizer, range(1))
    state = optimizer_state(optimizer, names_of(model))
    without = {name: tensor for name, tensor in state.items() if name != "control.0.bias.exp_avg"}
    with pytest.raises(TrainError, match=r"control\.0\.bias has \['exp_avg_sq', 'step'\]; expected \['exp_avg', "):
        restore_optimizer(both("adamw", model), names_of(model), without)
    one_value = state | {"control.0.bias.exp_avg": torch.zeros(1)}  # would be spread over all 32
    with pytest.raises(TrainError, match=r"control\.0\.bias\.exp_avg has shape \[1\]; expected \[32\]"):
        restore_optimizer(both("adamw", model), names_of(model), one_value)


def test_eight_bits_without_bitsandbytes_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    without_loops(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        both("adamw8bit", make_model())


@needs_compiler
def test_eight_bits_learn_as_float32_does() -> None:
    ends = []
    for kind in ("adamw", "adamw8bit"):
        model = make_model()
        before = model[0].weight.detach().clone()
        take_steps(model, both(kind, model), range(20))
        ends.append(model[0].weight.detach() - before)
    exact, rounded = ends
    assert ((rounded - exact).norm() / exact.norm()).item() < 0.05


@needs_compiler
@pytest.mark.parametrize("turns", [("contiguous", "last"), ("last", "contiguous"), ("last", "last")])
def test_eight_bits_go_on_with_blocks_of_another_order(turns: tuple[str, str]) -> None:
    """As when a run goes on where there is no compiler, or with what bitsandbytes left."""
    orders = {"last": torch.channels_last, "contiguous": torch.contiguous_format}
    model = make_model().to(memory_format=orders[turns[0]])
    optimizer = both("adamw8bit", model)
    take_steps(model, optimizer, range(3))
    state = optimizer_state(optimizer, names_of(model))
    assert f"control.0.weight.absmax1{'_last' * (turns[0] == 'last')}" in state
    other = make_model().to(memory_format=orders[turns[1]])
    other.load_state_dict(model.state_dict())
    going_on = both("adamw8bit", other)
    restore_optimizer(going_on, names_of(other), {name: tensor.contiguous() for name, tensor in state.items()})
    assert other[0].weight.is_contiguous(memory_format=orders[turns[1]])
    before = other[0].weight.detach().clone()
    for each, its in ((model, optimizer), (other, going_on)):
        take_steps(each, its, range(3, 4))
    moved = (model[0].weight - before).norm()
    assert ((other[0].weight - model[0].weight).norm() / moved).item() < (0.03 if len(set(turns)) > 1 else 1e-9)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_the_state_of_sharded_parameters_is_sharded_and_restored() -> None:
    mesh = init_device_mesh("cpu", (1,))
    ends = []
    for stop in (False, True):
        weight = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
        optimizer = make_optimizer("adamw", [{"params": [weight], "lr": 0.1}], weight_decay=0.0)
        for step in range(3):
            if stop and step == 2:
                state = optimizer_state(optimizer, {weight: "w"})
                assert isinstance(state["w.exp_avg"], DTensor)
                optimizer = make_optimizer("adamw", [{"params": [weight], "lr": 0.1}], weight_decay=0.0)
                restore_optimizer(optimizer, {weight: "w"}, state)
            (weight * (step + 1)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(weight.detach().full_tensor())
    assert torch.equal(ends[0], ends[1])
