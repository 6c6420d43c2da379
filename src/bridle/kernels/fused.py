"""`attention.c` as functions of tensors: attention in one kernel a pass, on processors for it.

Tensors are bfloat16, on the CPU, [B, heads, L or S, D], D even; elements of a row lie together, rows anywhere. What is
returned lies as [B, L or S, heads, D], as the projections around attention want it.
"""

from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bridle.kernels.compiler import load

SIZES = [c_int64] * 5  # batch, heads, queries, keys, depth
HOW = [*SIZES, c_float, c_int]
FURTHEST = 2**27  # elements between rows: sixteen of them are counted in 32 bits


@cache
def library() -> Any:
    """The compiled functions; None where there is no compiler, or no AVX-512 with bfloat16."""
    found = load("attention.c")
    if found is not None and not found.attends():  # there may be tiles that the system keeps from this process
        found = load("attention.c", "NO_TILES")
    if found is None or not found.attends():
        return None
    found.attend.argtypes = [c_void_p] * 7 + HOW
    found.attend_backward.argtypes = [c_void_p] * 11 + HOW
    found.attend_room.argtypes, found.attend_room.restype = SIZES[2:], c_int64
    return found


def fits(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether these can be attended with here."""
    parts = query, key, value
    agree = query.shape[:2] == key.shape[:2] and key.shape == value.shape and query.shape[3] == key.shape[3]
    known = all(p.dtype is torch.bfloat16 and p.device.type == "cpu" and p.numel() > 0 for p in parts)
    lie = all(p.shape[3] % 2 == 0 and p.stride(3) == 1 and p.stride(2) < FURTHEST for p in parts)
    return agree and known and lie and library() is not None


def attend(query: Tensor, key: Tensor, value: Tensor, *, learns: bool) -> tuple[Tensor, Tensor | None]:
    """softmax(q k / sqrt(D)) v, and for the backward pass each query's level, [B, heads, L], float32."""
    output = rows_like(query)
    level = torch.empty(query.shape[:3], dtype=torch.float32) if learns else None
    given = query, key, value
    room, how = make_room(query, key)
    library().attend(*addresses(*given), lies(*given), *addresses(output, level, room), *how)
    return output, level


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, level: Tensor, *, all_three: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of query, key and value; of the query alone unless `all_three` are wanted."""
    given = query, key, value, output, gradient
    found = rows_like(query), *((rows_like(key), rows_like(value)) if all_three else (None, None))
    room, how = make_room(query, key)
    library().attend_backward(*addresses(*given), lies(*given), *addresses(level, *found, room), *how)
    return found


def rows_like(part: Tensor) -> Tensor:
    """Room for as many numbers, [B, heads, L, D], lying as [B, L, heads, D]."""
    return torch.empty_like(part.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def make_room(query: Tensor, key: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
    """What the threads work in, and the last arguments of both functions."""
    batch, heads, queries, depth = query.shape
    threads = min(torch.get_num_threads(), batch * heads)
    bytes_each = library().attend_room(queries, key.shape[2], depth)
    how = batch, heads, queries, key.shape[2], depth, depth**-0.5, threads
    return torch.empty(threads * bytes_each, dtype=torch.uint8), how


def addresses(*parts: Tensor | None) -> list[int | None]:
    return [None if part is None else part.data_ptr() for part in parts]


def lies(*parts: Tensor) -> Any:
    """Elements between samples, heads and rows of each."""
    strides = [stride for part in parts for stride in part.stride()[:3]]
    return (c_int64 * len(strides))(*strides)
