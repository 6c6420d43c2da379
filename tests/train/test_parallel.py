"""What several processes promise: the same figures as one, one decision, and checkpoints that any number can read.

The processes are forked from one that has imported everything, so that each of them costs little.
"""

import errno
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bridle.control.control import Control
from bridle.control.text import Text
from bridle.errors import ConfigError, TrainError
from bridle.train import pieces
from bridle.train.checkpoint import load, save
from bridle.train.parallel import ALONE, World, any_rank, full, gather, join, leave, mean, reducing, share, wrap

PRELOAD = ["bridle.base.load", "bridle.train.checkpoint", "transformers.models.clip.modeling_clip"]


def run_ranks(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call `work(world, *args)` on so many processes that have joined. Returns: what each gave, in order."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ProcessPoolExecutor(size, context) as pool:
        ranks = [pool.submit(be_rank, rank, size, port, work, args) for rank in range(size)]
        finished, waiting = wait(ranks, timeout=240, return_when=FIRST_EXCEPTION)
        if waiting:  # for one that failed, and for ever
            for process in multiprocessing.active_children():
                process.kill()
        for rank in finished:
            rank.result()
        return [rank.result() for rank in ranks]


def be_rank(rank: int, size: int, port: int, work: Callable[..., Any], args: Sequence[Any]) -> Any:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    world = join()
    try:
        assert world == World(rank, size, torch.device("cpu"), joined=True)
        return work(world, *args)
    finally:
        leave(world)


class Pair(nn.Module):
    """A control and its base, as the trainer holds them; called, it gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: Any = tiny.make_unet()
        self.control = tiny.wake(Control.from_base(self.unet, links="middle"))
        self.control.controlnet_down_blocks.requires_grad_(False)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Tensor, hint: Tensor, wanted: Tensor) -> Tensor:
        return (self.steer(latents, timesteps, text, self.control.encode(hint)) - wanted).square().mean()

    def steer(self, latents: Tensor, timesteps: Tensor, text: Tensor, features: Tensor) -> Tensor:
        residuals = self.control.residuals(self.control.call(latents, timesteps, Text(text)), features)
        down, mid = residuals.down, residuals.mid
        return self.unet(latents, timesteps, text, None, None, None, None, None, down, mid).sample


def train(world: World, kind: Any) -> dict[str, list[float]]:
    """Six steps of eight pairs in two micro-batches: two with the middle link, two with all, two with the decoder."""
    pair = Pair()
    model, optimizer, known = wrap(pair, world, kind), None, set()
    losses, norms, outputs = [], [], [look(pair)]  # a probe before the first step, and after each
    for step in range(6):
        if step == 2:
            pair.control.links = "all"
            pair.control.controlnet_down_blocks.requires_grad_(True)
        if step == 4:
            pair.unet.up_blocks.requires_grad_(True)
        if step in (2, 4):
            model = wrap(pair, world, kind)
        joining = [one for one in pair.parameters() if one.requires_grad and one not in known]
        known |= set(joining)
        optimizer = optimizer or torch.optim.AdamW(joining, lr=1e-3, fused=True)
        if joining and step:
            optimizer.add_param_group({"params": joining})
        losses.append(mean(run_backward(model, step, world), world).item())
        norms.append(full(nn.utils.clip_grad_norm_(known, 1.0)).item())
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(look(pair))
    return {"losses": losses, "norms": norms, "outputs": outputs}


def run_backward(model: nn.Module, step: int, world: World) -> Tensor:
    """Gradients of this rank's rows, half of them at a time. Returns: their mean loss."""
    rows = [value[list(share(range(8), world))] for value in (*tiny.make_inputs(8, seed=step), make_wanted(step))]
    total = torch.zeros(())
    for half in (0, 1):
        with reducing(model, last=half == 1):
            loss = model(*(value.chunk(2)[half] for value in rows)) / 2
            loss.backward()
        total += loss.detach()
    return total


def make_wanted(step: int) -> Tensor:
    return torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(step))


@torch.no_grad()
def look(pair: Pair) -> float:
    """What a probe sees: control and base called by themselves, between two steps."""
    *rest, hint = tiny.make_inputs(2, seed=99)
    return pair.steer(*rest, pair.control.encode(hint)).square().mean().item()


@pytest.fixture(scope="module")
def alone() -> dict[str, list[float]]:
    return train(ALONE, "ddp")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_does_through_every_switch(size: int, kind: str, alone: dict[str, list[float]]) -> None:
    for result in run_ranks(size, train, kind):
        assert result["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert result["outputs"] == pytest.approx(alone["outputs"], abs=1e-5)
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4)


def make_state(world: World) -> dict[str, Tensor]:
    """Shards, as weights and their optimiser state are, and what is not sharded."""
    pair = wrap(Pair(), world, "fsdp")
    weights = {name: parameter.detach() for name, parameter in pair.named_parameters()}
    moments = {f"optimizer.{name}.exp_avg": 2 * weight for name, weight in weights.items()}
    return weights | moments | {"optimizer.step": torch.tensor(3.0), "plain": torch.arange(5, dtype=torch.uint8)}


def holds(state: dict[str, Tensor], whole: dict[str, Tensor]) -> bool:
    """Whether every shard, or tensor, is bit for bit what lies in its place of the whole one."""
    mine = {name: pieces.own_piece(tensor) for name, tensor in state.items()}
    return state.keys() == whole.keys() and all(
        torch.equal(piece.values, whole[name][tuple(map(slice, piece.start, piece.end))])
        for name, piece in mine.items()
    )


def save_sharded(world: World, folder: Path) -> None:
    """Then once more, with a disk that is full on another rank than the one that cleans up."""
    state = make_state(world)
    assert isinstance(state["unet.conv_out.bias"], DTensor)
    path = save(folder, 1, state, {}, 1, world)
    whole = load(path)
    assert holds(state, whole)
    for name in list(state)[::50]:
        assert torch.equal(full(state[name]), whole[name])

    def full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "save_file", pieces.save_file if world.main else full_disk)
        with pytest.raises(TrainError, match=r"step 2 .* the disk is full"):
            save(folder, 2, state, {}, 1, world)


def load_sharded(world: World, *paths: Path) -> None:
    state = make_state(world)
    for path in paths:
        for tensor in state.values():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).zero_()
        load(path, into=state)
        assert holds(state, load(path))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # PyTorch says so even where it is asked for
def test_shards_are_read_by_any_number_of_ranks_and_by_pytorch(tmp_path: Path) -> None:
    run_ranks(2, save_sharded, tmp_path / "sharded")
    (sharded,) = (tmp_path / "sharded").iterdir()
    assert sorted(path.name for path in sharded.glob("rank*")) == ["rank-00000.safetensors", "rank-00001.safetensors"]

    state = load(sharded)
    pytorchs = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(pytorchs, storage_reader=dcp.HuggingFaceStorageReader(str(sharded)), no_dist=True)
    assert all(torch.equal(pytorchs[name], tensor) for name, tensor in state.items())

    run_ranks(4, load_sharded, sharded, save(tmp_path / "whole", 1, state, {}, 1))


def agree(world: World) -> tuple[Any, ...]:
    first, nobody = any_rank(world.rank == 1, world), any_rank(False, world)
    return first, nobody, mean(torch.tensor([world.rank, 1.0]), world).tolist(), gather(f"rank {world.rank}", world)


def test_ranks_agree() -> None:
    assert run_ranks(2, agree) == [(True, False, [0.5, 1.0], ["rank 0", "rank 1"])] * 2
    assert (any_rank(True, ALONE), any_rank(False, ALONE)) == (True, False)
    assert gather("me", ALONE) == ["me"]


def test_shares_are_equal_and_in_order_the_whole() -> None:
    worlds = [World(rank, 3) for rank in range(3)]
    assert [list(share("abcdef", world)) for world in worlds] == [["a", "b"], ["c", "d"], ["e", "f"]]
    with pytest.raises(ConfigError, match=r"4 pairs a step cannot be shared equally by 3 processes: set train.batch"):
        share(range(4), worlds[0])


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == ALONE
    assert ALONE.main
    assert not dist.is_initialized()
    module = nn.Linear(1, 1)
    assert wrap(module, ALONE, "ddp") is wrap(module, ALONE, "fsdp") is module


def test_a_group_that_is_there_already_is_used_and_left_alone() -> None:
    """Ray's TorchTrainer makes it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        world = join()
        assert world == World(0, 1, joined=False)
        leave(world)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"WORLD_SIZE": "2"},
            "environment variable RANK is None; expected a number: start the processes with torchrun",
        ),
        ({"WORLD_SIZE": "two"}, "environment variable WORLD_SIZE is 'two'; expected a number"),
        (
            {"WORLD_SIZE": "2", "RANK": "1"},
            "process 1 of 2 cannot join the others at None:None .*; start it with torchrun",
        ),
    ],
)
def test_an_environment_that_does_not_add_up_is_named(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainError, match=message):
        join()


def test_gradients_laid_out_otherwise_than_their_weights_are_no_reason_to_warn(tmp_path: Path) -> None:
    script = """
import sys
import torch
import torch.distributed as dist
from bridle.train.parallel import World, wrap
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
conv = torch.nn.Conv2d(8, 8, 1)
conv.weight.register_hook(lambda gradient: gradient.as_strided((8, 8, 1, 1), (8, 1, 8, 8)).clone())
net = wrap(conv, World(size=2), "ddp") if sys.argv[2] == "wrap" else torch.nn.parallel.DistributedDataParallel(conv)

net(torch.randn(2, 8, 9, 9)).sum().backward()
dist.destroy_process_group()
"""
    said = {
        how: subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / how), how], capture_output=True, text=True, check=True
        ).stderr
        for how in ("plain", "wrap")
    }
    assert "Grad strides do not match" in said["plain"]
    assert "Grad strides do not match" not in said["wrap"]
