"""Attention in one kernel is attention, for every shape, and leaves everything else alone."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bridle.kernels import attention, fused

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(fused.library() is None, reason="no C compiler, or no AVX-512 with bfloat16 here")


def make(batch: int, heads: int, rows: int, depth: int) -> Tensor:
    """[B, heads, L, D], lying as a projection leaves it."""
    return torch.randn(batch, rows, heads * depth).to(BF16).unflatten(-1, (heads, depth)).transpose(1, 2)


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact).norm() / exact.norm())


SHAPES = [
    (1, 8, 256, 256, 40),
    (2, 3, 129, 130, 22),  # beyond blocks by one and two
    (3, 2, 17, 77, 64),  # captions
    (1, 1, 1, 1, 2),
    (2, 2, 33, 31, 160),
    (1, 2, 300, 5, 272),  # deeper than a block is wide
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_attention_forward_and_backward(shape: tuple[int, ...], threads: int) -> None:
    batch, heads, queries, keys, depth = shape
    torch.manual_seed(0)
    given = [make(batch, heads, rows, depth) for rows in (queries, keys, keys)]
    pull = make(batch, heads, queries, depth)
    exact = [part.double().requires_grad_() for part in given]
    expected = F.scaled_dot_product_attention(*exact)
    slopes = torch.autograd.grad(expected, exact, pull.double())
    for part in given:
        part.requires_grad_()
    output = attention.fuse(*given)
    found = torch.autograd.grad(output, given, pull)
    assert distance(output, expected.detach()) < 4e-3
    for mine, slope in zip(found, slopes, strict=True):
        # Of one key, scores have no gradient, and what is left is the rounding of its terms.
        assert float((mine.double() - slope).norm()) < 5e-3 * float(slope.norm()) + (0.02 if keys == 1 else 0)
    with torch.no_grad():
        assert torch.equal(attention.fuse(*given), output)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    torch.manual_seed(0)
    given = [40 * make(1, 2, 300, 32), 40 * make(1, 2, 300, 32), make(1, 2, 300, 32)]
    exact = F.scaled_dot_product_attention(*(part.double() for part in given))
    assert distance(attention.fuse(*given), exact) < 4e-3


@pytest.mark.parametrize("score", [-300.0, 300.0])
def test_scores_far_from_zero_change_no_gradient(score: float) -> None:
    """Zeros that keys and queries are made up with to whole tiles would be the highest scores, or the lowest."""
    torch.manual_seed(0)
    query, key, value, pull = (make(1, 2, rows, 32) for rows in (50, 77, 77, 50))
    query[..., 0], key[..., 0] = 1, score * 32**0.5
    exact = [part.double().requires_grad_() for part in (query, key, value)]
    slopes = torch.autograd.grad(F.scaled_dot_product_attention(*exact), exact, pull.double())
    given = [part.requires_grad_() for part in (query, key, value)]
    found = torch.autograd.grad(attention.fuse(*given), given, pull)
    assert distance(found[2], slopes[2]) < 5e-3
    for mine, slope in zip(found, slopes, strict=True):  # all but the entry that the scores' rounding decides
        assert distance(mine[..., 1:], slope[..., 1:]) < 5e-3


@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("place", range(3))
def test_what_is_no_number_is_not_made_one(place: int, number: float) -> None:
    """Or a step would be taken that has to be skipped."""
    torch.manual_seed(0)
    given = [make(1, 2, 40, 32) for _ in range(3)]
    given[place][0, 1, 7, 5] = number
    output = attention.fuse(*given)
    assert not output[0, 1].isfinite().all()
    assert output[0, 0].isfinite().all(), "the other head has not seen it"


def test_a_query_alone_gets_its_gradient() -> None:
    """As in a locked decoder's attention to captions."""
    torch.manual_seed(0)
    query, key, value = make(2, 4, 50, 32).requires_grad_(), make(2, 4, 77, 32), make(2, 4, 77, 32)
    pull = make(2, 4, 50, 32)
    (alone,) = torch.autograd.grad(attention.fuse(query, key, value), query, pull)
    given = [query, key.requires_grad_(), value.requires_grad_()]
    assert torch.equal(alone, torch.autograd.grad(attention.fuse(*given), given, pull)[0])


def test_rows_may_lie_anywhere(threads: int) -> None:
    """Parts of one projection, turned around, repeated: what is between them is neither read nor written."""
    torch.manual_seed(0)
    whole = torch.randn(2, 50, 3, 4, 24).to(BF16)
    whole[:, :, :, :, 20:] = math.nan
    given = [whole[:, :, part, :, :20].transpose(1, 2) for part in range(3)]
    pull = torch.randn(20).to(BF16).expand(2, 4, 50, 20)
    kept = whole.clone()
    outputs = []
    for parts in (given, [part.contiguous() for part in given]):
        parts = [part.detach().requires_grad_() for part in parts]
        output = attention.fuse(*parts)
        outputs.append([output, *torch.autograd.grad(output, parts, pull)])
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert torch.equal(whole.view(torch.int16), kept.view(torch.int16))


def fitting() -> list[Tensor]:
    return [make(2, 3, rows, 8) for rows in (4, 5, 5)]


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: [q.float(), k.float(), v.float()],
        lambda q, k, v: [q[..., :7], k[..., :7], v[..., :7]],
        lambda q, k, v: [part.transpose(2, 3).contiguous().transpose(2, 3) for part in (q, k, v)],
        lambda q, k, v: [q, k[:1], v[:1]],
        lambda q, k, v: [q, k, torch.cat([v, v], -1)],
        lambda q, k, v: [q[:, :, :0], k, v],
    ],
    ids=["float32", "odd depth", "rows apart", "keys for all samples", "deeper values", "no queries"],
)
def test_what_it_does_not_know_is_left_to_others(change: Callable[..., list[Tensor]]) -> None:
    """Also after the same shape has been attended with so."""
    torch.manual_seed(0)
    given = fitting()
    assert fused.fits(*given)
    attention.attend(*given)
    other = change(*given)
    assert not fused.fits(*other)
    exact = F.scaled_dot_product_attention(*(part.double() for part in other))
    torch.testing.assert_close(attention.attend(*other).double(), exact, rtol=0.02, atol=0.02)


def test_the_type_that_tensors_are_made_in_does_not_matter() -> None:
    before, given = torch.get_default_dtype(), [part.requires_grad_() for part in fitting()]
    expected = attention.fuse(*given)
    torch.set_default_dtype(BF16)
    try:
        assert fused.attend(*given, learns=True)[1].dtype is torch.float32
        assert torch.equal(attention.fuse(*given), expected)
    finally:
        torch.set_default_dtype(before)


def test_products_after_it_are_what_they_were() -> None:
    """PyTorch's own kernels use the same registers."""
    torch.manual_seed(0)
    left, right = torch.randn(70, 90).to(BF16), torch.randn(90, 50).to(BF16)
    before = left @ right
    attention.fuse(*(make(1, 2, 40, 32) for _ in range(3)))
    assert torch.equal(left @ right, before)


@pytest.mark.parametrize("empty", [0, 1])
def test_an_empty_sequence_is_pytorchs_to_answer(empty: int) -> None:
    """Its own backward pass is fit for none, and a division by zero would end the process."""
    sizes = [4, 4]
    sizes[empty] = 0
    query, key, value = (torch.randn(1, 2, size, 8, requires_grad=True) for size in (*sizes, sizes[1]))
    attention.attend(query, key, value).sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
