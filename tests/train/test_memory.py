"""Checkpointing changes memory and nothing else; running out is told from other errors; a peak is one process's."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bridle.control.control import Control
from bridle.control.text import Text
from bridle.train.memory import is_out_of_memory, set_gradient_checkpointing


class Kept:
    """Within it, storages that autograd keeps for the way back are counted, each once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}
        self.hooks = saved_tensors_hooks(self.keep, lambda tensor: tensor)

    def keep(self, tensor: Tensor) -> Tensor:
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def size_bytes(self, but: nn.Module) -> int:
        """Without the weights of a module, which are there anyway."""
        weights = {parameter.untyped_storage().data_ptr() for parameter in but.parameters()}
        return sum(size for place, size in self.sizes.items() if place not in weights)


def learn(checkpointing: bool, autocast: bool) -> tuple[Tensor, dict[str, Tensor], tuple[int, int]]:
    """One backward pass. Returns: the loss, the gradients, and the bytes kept of the copied encoder and the base."""
    unet = tiny.make_unet()
    control = tiny.wake(Control.from_base(unet)).train()
    if checkpointing:
        set_gradient_checkpointing(control, unet)
    latents, timesteps, text, hint = tiny.make_inputs()
    of_control, of_base = Kept(), Kept()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        features = control.encode(hint)
        with of_control.hooks:
            residuals = control.residuals(control.call(latents, timesteps, Text(text)), features)
        inputs = {"down_block_additional_residuals": residuals.down, "mid_block_additional_residual": residuals.mid}
        with of_base.hooks:
            loss = unet(latents, timesteps, text, **inputs).sample.float().square().mean()
    kept_bytes = (of_control.size_bytes(control), of_base.size_bytes(unet))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in control.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    return loss.detach(), gradients, kept_bytes


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_keeps_far_less_and_changes_no_loss_and_no_gradient(autocast: bool) -> None:
    loss, gradients, kept_bytes = learn(checkpointing=False, autocast=autocast)
    same_loss, same_gradients, fewer_bytes = learn(checkpointing=True, autocast=autocast)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient, same_gradients[name]) for name, gradient in gradients.items())
    assert all(fewer < kept / 2 for fewer, kept in zip(fewer_bytes, kept_bytes, strict=True))


def fill_memory() -> None:
    torch.empty(10**15)


def raise_one(error: BaseException) -> Callable[[], None]:
    def do() -> None:
        raise error

    return do


@pytest.mark.parametrize(
    ("do", "expected"),
    [
        (fill_memory, True),
        (lambda: bytearray(10**15), True),
        (raise_one(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")), True),
        (raise_one(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate")), True),
        (lambda: torch.ones(2) @ torch.ones(3), False),
        (raise_one(ValueError("not enough memory in the lesson")), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(do: Callable[[], object], expected: bool) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        do()
    assert is_out_of_memory(caught.value) is expected


MEASURE = """
import torch
from bridle.train.memory import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
block = torch.ones(2**26)
del block
print(before, peak_memory_bytes(torch.device("cpu")))
"""


def test_the_peak_stays_when_memory_is_freed_and_leaves_out_the_process_that_started_this_one() -> None:
    block = torch.ones(2**28)  # one GiB, more than any imports take
    child = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, after = map(int, child.stdout.split())
    assert before < block.nbytes
    assert after - before == pytest.approx(2**28, rel=0.1)


FREE = """
import re, sys, torch
from bridle.train.memory import keep_freed_memory, return_freed_memory

def resident_mb():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024

if "kept" in sys.argv[1]:
    keep_freed_memory()
if "returned" in sys.argv[1]:
    return_freed_memory()
torch.ones(2**22)
before = resident_mb()
blocks = [(torch.ones(2**20), torch.ones(2**10)) for _ in range(64)]
small = [little for _, little in blocks]
del blocks
print(resident_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the allocator is another")
def test_freed_tensors_are_given_back_even_between_others_that_stay() -> None:
    def kept_mb(how: str) -> int:
        child = subprocess.run([sys.executable, "-c", FREE, how], capture_output=True, text=True, check=True)
        return int(child.stdout)

    assert kept_mb("returned") < 32
    assert kept_mb("kept, then returned") < 32
    assert kept_mb("as ever") > 128  # or there is nothing left to do
