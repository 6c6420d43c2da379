"""Attention on a CPU by the way that is fastest for its shape, forward and backward together.

PyTorch's flash attention keeps no probabilities and is good forward; its backward pass on a CPU runs at a tenth of the
rate of matrix products. Where one side is short (captions, small latents), keeping the probabilities is faster. On
processors with instructions for bfloat16 (AVX-512's, Intel AMX), a kernel of our own (`attention.c`) does both passes
in it. Elsewhere, where both sides are long, probabilities are computed again in the backward pass, some rows of one
head at a time, with loops of our own between the products; with PyTorch's own softmax that was slower than flash.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from bridle.kernels import fused, native
from bridle.kernels.choice import pick
from bridle.kernels.stand_in import Undo
from bridle.kernels.working import BF16, computed_in

ROWS = 512  # whose probabilities are computed again at once
KEPT = 2**24  # probabilities beyond which keeping them is not even tried
PARTS = 4  # bfloat16 numbers whose sum is a float32 number; three would do, but products like even widths


def fits(attention: nn.Module) -> bool:
    """Whether `Attend` knows such an attention: diffusers' own, with nothing but projections around it."""
    if not isinstance(attention, Attention) or type(attention.processor) not in (AttnProcessor, AttnProcessor2_0):
        return False
    parts = ("spatial_norm", "group_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    plain = not any(getattr(attention, part, None) for part in parts)
    unlike = attention.upcast_attention or attention.upcast_softmax or not attention.scale_qk
    return plain and not attention.residual_connection and not unlike


def choose_attention(*models: nn.Module) -> Undo:
    """Have all attention in the models, where it is diffusers' plain one, computed by the fastest way.

    Returns: what gives them their processors back.
    """
    return set_processors(models, lambda attention: Attend(attention.processor) if fits(attention) else None)


def set_processors(models: Iterable[nn.Module], make: Callable[[Attention], Any]) -> Undo:
    """Give attention another processor; where `make` has none to offer, it keeps its own. Returns: what undoes it."""
    before = []
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, Attention) and (processor := make(module)) is not None:
            before.append((module, module.processor))
            module.set_processor(processor)

    def undo() -> None:
        for module, processor in before:
            module.set_processor(processor)

    return undo


def restore_attention(model: nn.Module) -> None:
    """Give a copy of a model, made while `choose_attention` lasted, its own processors."""
    set_processors(
        [model],
        lambda attention: attention.processor.before if isinstance(attention.processor, Attend) else None,
    )


class Attend:
    """In the place of an attention's processor; what it does not know, that processor does."""

    def __init__(self, before: Any) -> None:
        self.before = before

    def __call__(
        self, attn: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        masked = any(value is not None for value in (*args, *kwargs.values()))
        if masked or hidden.ndim != 3 or computed_in(hidden) is None:
            given: Tensor = self.before(attn, hidden, encoder_hidden_states, *args, **kwargs)
            return given
        text = hidden if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden), attn.to_k(text), attn.to_v(text))
        )
        seen = attend(query, key, value).transpose(1, 2).flatten(2)
        output: Tensor = attn.to_out[1](attn.to_out[0](seen))
        return output if attn.rescale_output_factor == 1 else output / attn.rescale_output_factor


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt(D)) v. Args: query: [B, heads, L, D]; key, value: [B, heads, S, D]. Returns: as the query."""
    parts = query, key, value
    kind = query.dtype
    if kind not in native.KINDS or any(part.dtype is not kind or part.numel() == 0 for part in parts):
        return flash(*parts)
    wanted = [torch.is_grad_enabled() and part.requires_grad for part in parts]
    learns, fuses = any(wanted), fused.fits(*parts)

    def timed(name: str) -> Any:
        given = [part.detach().requires_grad_(want) for part, want in zip(parts, wanted, strict=True)]

        def once() -> None:
            with torch.set_grad_enabled(learns):
                output = WAYS[name](*given)
                if learns:
                    output.backward(output.detach())

        return once

    def ways() -> dict[str, Any]:
        few = query[..., 0].numel() * key.shape[2] <= KEPT
        compiles = learns and native.library(kind) is not None
        names = ["flash", *["kept"] * few, *["again"] * compiles, *["fused"] * fuses]
        return {name: timed(name) for name in names}

    shape = *query.shape, key.shape[2], *wanted, kind, "fused" * fuses
    return WAYS[pick(("attend", *shape), ways)](query, key, value)


def flash(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def kept(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """With scores that are rounded, so the less of them the better: what all keys share, softmax does not see."""
    exact = key.float()
    apart = ((exact - exact.mean(2, keepdim=True)) * query.shape[-1] ** -0.5).to(key.dtype)
    chances = (query @ apart.transpose(2, 3)).softmax(-1)
    return chances.to(value.dtype) @ value


def again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `flash` forward; backward, probabilities are computed again, some rows of one head at a time."""
    output: Tensor = Again.apply(query, key, value)
    return output


class Again(Function):
    """Attention that keeps the logarithm of each row's sum."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        output, level = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
        ctx.save_for_backward(query, key, value, output, level)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, output, level = ctx.saved_tensors
        drift = (gradient.float() * output.float()).sum(-1)  # what the probabilities' gradient is on average, [B, H, L]
        scale = query.shape[-1] ** -0.5
        found = tuple(torch.empty_like(part) for part in (query, key, value))
        for sample in range(query.shape[0]):
            for head in range(query.shape[1]):
                at = sample, head
                given = query[at], key[at], value[at], gradient[at], level[at], drift[at]
                back_by_rows(*(part.contiguous() for part in given), scale, [part[at] for part in found])
        return found


def back_by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gradient: Tensor,
    level: Tensor,
    drift: Tensor,
    scale: float,
    found: Sequence[Tensor],
) -> None:
    """Of one head: query, gradient [L, D]; key, value [S, D]; level, drift [L].

    Args:
        found: for the gradients of query, key and value, which are written there.
    """
    for_key, for_value = (torch.zeros(part.shape[::-1]) for part in (key, value))  # products are faster this way around
    # Most of the level comes off inside the product, before scores are rounded. Of those that count, in rows that look
    # at one key or at all alike, no more is left than `rest`.
    rest = math.log(len(key)) / 2
    below = split((level - rest) / scale, query.dtype)
    lowered, raised = torch.cat([query, below], 1), torch.cat([key, below.new_full((len(key), PARTS), -1)], 1)
    for start in range(0, len(query), ROWS):
        part = slice(start, start + ROWS)
        chances = native.chances_(lowered[part] @ raised.t(), scale, rest)
        for_value += gradient[part].t() @ chances
        for_scores = native.chances_backward_(gradient[part] @ value.t(), chances, drift[part], scale)
        found[0][part] = for_scores @ key
        for_key += query[part].t() @ for_scores
    found[1].copy_(for_key.t())
    found[2].copy_(for_value.t())


def split(numbers: Tensor, kind: torch.dtype) -> Tensor:
    """Float32 [L] as sums of numbers of a shorter kind: [L, PARTS]."""
    parts = []
    for _ in range(PARTS):
        parts.append(numbers.to(kind))
        numbers = numbers - parts[-1]
    return torch.stack(parts, 1)


def fuse(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Both passes by one kernel each."""
    if not torch.is_grad_enabled() or not (query.requires_grad or key.requires_grad or value.requires_grad):
        return fused.attend(query, key, value, learns=False)[0]
    output: Tensor = Fused.apply(query, key, value)
    return output


class Fused(Function):
    """The same, with gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Any:
        output, level = fused.attend(query, key, value, learns=True)
        ctx.save_for_backward(query, key, value, output, level)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.to(BF16)
        if gradient.stride(-1) != 1:
            gradient = gradient.contiguous()
        return fused.attend_backward(gradient, *ctx.saved_tensors, all_three=any(ctx.needs_input_grad[1:]))


WAYS = {"flash": flash, "kept": kept, "again": again, "fused": fuse}
