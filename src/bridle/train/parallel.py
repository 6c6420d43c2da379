"""Several processes as one: who is who, what each takes, and what they agree on. One process alone needs none of it.

In: the environment that torchrun sets, or the process group that Ray's `TorchTrainer` has already made. Out: a `World`.
The rest is plain PyTorch: DistributedDataParallel ("ddp"), or FSDP2's `fully_shard` ("fsdp"), after which parameters,
gradients and optimiser state are DTensors.
"""

import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from bridle.errors import ConfigError, TrainError

T = TypeVar("T")
Kind = Literal["ddp", "fsdp"]
CPU = torch.device("cpu")
CALLED = ("encode", "residuals")  # what others call on a control without going through `forward`


@dataclass(frozen=True)
class World:
    """The processes that train together, as one of them sees it.

    Attributes:
        rank, size: this process is number `rank` of `size`, from 0.
        device: what it computes on; with several GPUs, its own.
        joined: whether `join` made the process group, so that `leave` has to end it.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    joined: bool = False

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0


ALONE = World()


def join(device: str = "cpu") -> World:
    """Find the others; alone where nothing says that there are any.

    Args:
        device: "cpu", whose processes talk through gloo, or "cuda", through nccl with one GPU each.

    Raises: TrainError: the environment names other processes but not how to reach them, or they cannot be reached.
    """
    if dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), own_device(device))
    if read_number("WORLD_SIZE", 1) == 1:
        return World(device=torch.device(device))
    rank, size = read_number("RANK"), read_number("WORLD_SIZE")
    own = own_device(device)
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo", **fresh_store())
    except (ValueError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        message = f"process {rank} of {size} cannot join the others at {where} ({error})"
        raise TrainError(f"{message}; start it with torchrun, which sets RANK, WORLD_SIZE and MASTER_ADDR") from None
    return World(rank, size, own, joined=True)


def fresh_store() -> dict[str, Any]:
    """Where torchrun starts processes again it hands them the store of those that died, whose addresses are in it."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}
    store, rank, size = next(dist.rendezvous("env://"))
    return {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}


def leave(world: World) -> None:
    """End what `join` began."""
    if world.joined:
        dist.destroy_process_group()


def read_number(name: str, default: int | None = None) -> int:
    """Raises: TrainError: the variable of the environment is missing, or no number."""
    text = os.environ.get(name, default)
    try:
        return int(text)  # ty: ignore[invalid-argument-type] - None is what the error is about
    except (TypeError, ValueError):
        remedy = "start the processes with torchrun, or unset WORLD_SIZE to train with one"
        raise TrainError(f"environment variable {name} is {text!r}; expected a number: {remedy}") from None


def own_device(device: str) -> torch.device:
    """Of the machine's GPUs the one that belongs to this process, made the current one."""
    if torch.device(device).type != "cuda":
        return torch.device(device)
    own = torch.device("cuda", read_number("LOCAL_RANK", 0))
    torch.cuda.set_device(own)
    return own


def share(rows: Sequence[T], world: World) -> Sequence[T]:
    """This rank's part of the rows of an optimiser step; the parts of all ranks, in order, are the whole.

    Raises: ConfigError: the parts would not be equal.
    """
    if len(rows) % world.size:
        remedy = f"set train.batch and train.accumulate so that their product is a multiple of {world.size}"
        raise ConfigError(f"{len(rows)} pairs a step cannot be shared equally by {world.size} processes: {remedy}")
    count = len(rows) // world.size
    return rows[world.rank * count : (world.rank + 1) * count]


def wrap(module: nn.Module, world: World, kind: Kind) -> nn.Module:
    """Let the ranks train one module together: gradients become the mean over ranks.

    Call it again after `requires_grad` of a parameter changed: "ddp" takes note only here of what is trained, and would
    silently leave the rest to each rank. "fsdp" shards every child in place, once.

    Args:
        module: what is called to get a loss; its children are the networks. With "fsdp" all ranks must have made it
            alike, and must from now on call it, or a child of it, together.

    Returns: what to call in its place. Its parameters are the module's.
    """
    if world.size == 1:
        return module
    if kind == "ddp":
        # Of 1x1 convolutions, whose gradients may differ along sides of one: they are copied to the bucket anyway.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(module)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for net in module.children():
        if not isinstance(net, FSDPModule):
            shard(net, mesh)
    return module


def shard(net: Any, mesh: DeviceMesh) -> None:
    """Share out a control or a denoiser: its blocks are gathered one at a time.

    Each is a root of its own, so that probes and previews can call it alone, and gathers its parameters only for as
    long as it runs, so that they are the sharded ones whenever someone else looks.
    """
    for block in blocks_of(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh, reshard_after_forward=True)
    for name in CALLED:
        if hasattr(net, name):
            register_fsdp_forward_method(net, name)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """What is called as a whole: the members of its lists of blocks, and a middle block."""
    listed = [block for child in net.children() if isinstance(child, nn.ModuleList) for block in child]
    return [block for block in (*listed, getattr(net, "mid_block", None)) if block is not None]


def reducing(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Around a micro-batch, forward and backward: "ddp" sends gradients only at the `last` one of a step.

    "fsdp" sends them every time: what is not sent would have to be kept whole, and memory is why it was chosen.
    """
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()


def same_on_all(module: nn.Module, world: World) -> None:
    """Give all ranks the first one's weights."""
    if world.size > 1:
        for weight in module.state_dict().values():
            dist.broadcast(weight, src=0)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor whole, on every rank, all of which must ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mean(value: Tensor, world: World) -> Tensor:
    """Over ranks. Args: value: any shape, the same on each, detached."""
    if world.size == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world.size


def any_rank(flag: bool, world: World) -> bool:
    """Whether it is true on at least one rank: a signal that reached one has to stop all, and at the same step."""
    if world.size == 1:
        return flag  # without a tensor: on a GPU, reading it would wait for all that is under way there
    return bool(mean(torch.tensor(float(flag), device=world.device), world))


def gather(value: T, world: World) -> list[T]:
    """What each rank has, in the order of ranks, on every rank."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
