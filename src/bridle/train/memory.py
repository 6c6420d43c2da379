"""Memory: saving it by computing activations again, recognising its end, and measuring its peak."""

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

PEAK = re.compile(r"VmHWM:\s+(\d+) kB")
AVAILABLE = re.compile(r"MemAvailable:\s+(\d+) kB")
MEMORY, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of <malloc.h>
LARGE_BYTES = 2**20
MMAP_MAX, TRIM_BYTES = 2**16, 2**17  # what the C library begins with
SAVE_MEMORY = "lower data.size_px, or set machine.gradient_checkpointing, train.optimizer 'adamw8bit' or --memory"
# PyTorch's allocator for the CPU raises a plain RuntimeError; these are its words on Linux and macOS, and on Windows.
# So do CUDA and its libraries, which take memory of their own beside the allocator's.
OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate memory|not enough memory)"
    r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_\w*ALLOC\w*_FAILED"
)


def set_gradient_checkpointing(*models: nn.Module, on: bool = True) -> None:
    """Keep only the inputs of the blocks of all and compute the rest again on the way back: same gradients, more time.

    diffusers' blocks do it wherever gradients are recorded, so the locked encoder and sampling are not slowed down.
    """
    modules: list[Any] = [module for model in models for module in model.modules()]
    for module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = recompute
            module.gradient_checkpointing = on


def recompute(module: nn.Module, *inputs: Any) -> Any:
    """Call a block so that the backward pass computes its activations again."""
    return checkpoint(module, *inputs, use_reentrant=False)


def settle_freed_memory(device: torch.device, *, saving: bool) -> None:
    """Say what is to become of freed memory, before much is freed. Args: saving: whether the peak matters most."""
    if saving:
        return_freed_memory()
    elif device.type == "cpu":
        keep_freed_memory()


def return_freed_memory() -> None:
    """Have this process give large tensors' memory back as soon as they are freed, where the C library is GNU's.

    It raises the size from which it does so to that of whatever was freed, up to 32 MiB, and keeps the rest for later:
    0.3 GiB of the peak when a control of Stable Diffusion 1.5 is trained with all that saves memory. Giving it back
    costs page faults.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, MMAP_MAX)  # an earlier run of this process may have kept all
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def keep_freed_memory() -> None:
    """Have this process keep what it frees for later, where the C library is GNU's.

    Left alone, every large tensor is mapped anew and given back: a page fault per 4 KiB of it, each time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less memory would have helped: on a GPU, on the CPU, or in Python itself."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far.

    On a GPU: what PyTorch reserved there. On the CPU: resident memory, of which about 0.6 GB are the imports.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    peak = peak_resident_bytes("self")
    if peak is not None:
        return peak
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_resident_bytes(process: int | str) -> int | None:
    """The most that a process has held, by its id; None where the system does not say, or it has ended.

    Not getrusage, which on Linux begins with the peak of the process that started this one.
    """
    try:
        found = PEAK.search(Path(f"/proc/{process}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def free_memory_bytes(device: torch.device) -> int:
    """What may be taken now: on the device, or of the machine's memory and of what its container is allowed."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = AVAILABLE.search(MEMORY.read_text()) if MEMORY.exists() else None
    free = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = CONTAINER.read_text().strip() if CONTAINER.exists() else "max"
    return free if allowed == "max" else min(free, int(allowed))
