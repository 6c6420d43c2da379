"""Each compiled loop gives what PyTorch gives, within one rounding; without a compiler everything works."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bridle.kernels import compiler, native, norm, patches
from bridle.kernels.working import sum_rows
from bridle.train.optim import clip, make_optimizer

BF16, LAST = torch.bfloat16, torch.channels_last
needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C compiler here")


def near(found: Tensor, expected: Tensor) -> bool:
    """Within the last of bfloat16's 8 bits, and where terms cancel within that of what is usual here."""
    return torch.allclose(found.float(), expected.float(), rtol=2**-8, atol=2**-8 * float(expected.abs().mean()))


@needs_compiler
@pytest.mark.parametrize("shape", [(3, 5, 14), (2, 130, 2 * 384)])
def test_gated_activation(shape: tuple[int, ...], threads: int) -> None:
    """As PyTorch in bfloat16, which rounds between its steps: one step of training away, one rounding more shows."""
    torch.manual_seed(0)
    hidden, gradient = 2 * torch.randn(shape), torch.randn(*shape[:-1], shape[-1] // 2)
    hidden, gradient = hidden.to(BF16), gradient.to(BF16)
    theirs = hidden.clone().requires_grad_()
    value, gate = theirs.chunk(2, -1)
    expected = value * F.gelu(gate)
    expected.backward(gradient)
    assert near(native.geglu(hidden), expected.detach())
    assert near(native.geglu_backward(gradient, hidden), theirs.grad)


@needs_compiler
@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_what_is_no_number_is_not_made_one(number: float) -> None:
    """Or a step would be taken that has to be skipped."""
    hidden = torch.ones(4, 64, dtype=BF16)
    hidden[2, 5] = number
    assert not native.geglu(hidden)[2, 5].isfinite()
    assert not native.sum_rows(hidden)[5].isfinite()
    assert not math.isfinite(native.square_sum(hidden))
    image = hidden.view(1, 64, 2, 2).to(memory_format=LAST)
    assert not native.group_norm(image, nn.GroupNorm(32, 64), torch.ones(64), torch.zeros(64))[0].isfinite().all()


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [(1, 64, 4, 4), (3, 32, 7, 5), (5, 96, 16, 16), (1, 2560, 8, 8), (1, 8192, 2, 2)],  # the last in parts
)
def test_group_normalisation(shape: tuple[int, ...], threads: int) -> None:
    torch.manual_seed(0)
    layer = nn.GroupNorm(32, shape[1])
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    hidden, gradient = torch.randn(shape) * 2 + 1, torch.randn(shape)
    hidden, gradient = (part.to(BF16).to(memory_format=LAST) for part in (hidden, gradient))
    exact = hidden.float().requires_grad_()
    expected = layer(exact)
    expected.backward(gradient.float())
    weight = layer.weight.detach()
    found, mean, inverse = native.group_norm(hidden, layer, weight, layer.bias.detach())
    assert norm.compiles(layer)
    assert near(found, expected.detach())
    for_hidden, for_weight, for_bias = native.group_norm_backward(gradient, hidden, mean, inverse, weight)
    assert near(for_hidden, exact.grad)
    torch.testing.assert_close(for_weight, layer.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(for_bias, layer.bias.grad, rtol=1e-3, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("place", [(0, 0), (64, 0), (64, 64), (127, 127)])
def test_group_normalisation_of_a_single_bright_pixel(place: tuple[int, int]) -> None:
    """Wherever it lies: sums are taken relative to one of the pixels, which may be that one."""
    torch.manual_seed(0)
    layer, hidden = nn.GroupNorm(8, 32), torch.randn(1, 32, 128, 128)
    hidden[:, :, place[0], place[1]] = 1000
    hidden = hidden.to(BF16).to(memory_format=LAST)
    found, _, _ = native.group_norm(hidden, layer, layer.weight.detach(), layer.bias.detach())
    assert (found.float() - layer(hidden.float())).abs().max() < 0.5  # bfloat16's own step at 127


@needs_compiler
@pytest.mark.parametrize("convolved", [(3, 1, 1), (3, 2, 1), (3, 2, 0), (1, 2, 0), (4, 2, 1), (3, 1, 2)])
def test_neighbourhoods_are_those_that_pytorch_gathers(convolved: tuple[int, int, int], threads: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 20, 9, 12).to(BF16).to(memory_format=LAST)
    kernel, stride, padding = convolved
    found, size = patches.gather(hidden, *convolved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "library", lambda kind: None)
        expected, same = patches.gather(hidden, *convolved)
        said = torch.randn_like(expected).view(*size, kernel, kernel, -1)
        told = patches.scatter(said, 9, 12, 13, stride, padding)
    assert size == same
    assert torch.equal(found, expected)
    assert near(patches.scatter(said, 9, 12, 13, stride, padding), told)


@needs_compiler
def test_sums(threads: int) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1700, 5000).to(BF16)
    torch.testing.assert_close(sum_rows(rows), rows.float().sum(0), rtol=1e-4, atol=1e-3)
    for tensor in (rows, rows.float(), rows[:3, :7].contiguous()):
        assert native.square_sum(tensor) == pytest.approx(tensor.double().square().sum().item(), rel=1e-5)


@needs_compiler
@pytest.mark.parametrize("halved", [False, True])
def test_adamw_moves_as_pytorchs_does(halved: bool, threads: int) -> None:
    torch.manual_seed(0)
    start = [torch.randn(32, 16, 3, 3).to(memory_format=LAST), torch.randn(700, 33)]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    optimizer = make_optimizer("adamw", [{"params": ours, "lr": 1e-2}], weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1, foreach=False)
    for step in range(5):
        for mine, other in zip(ours, theirs, strict=True):
            gradient = torch.randn(mine.shape).to(BF16 if halved else torch.float32)
            if halved:
                mine.grad_dtype = BF16
            mine.grad, other.grad = gradient, gradient.float().clone()  # in another order than the first weight lies
        norm = clip(optimizer, ours, 1.0)
        assert norm == pytest.approx(nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-5)
        before = ours[0]._version
        optimizer.step()
        reference.step()
        assert ours[0]._version > before, f"casts would not be made anew after step {step}"
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


ALONE = """
import sys; sys.path.insert(0, {tests!r})
import tiny, torch
from bridle.control.control import Control
from bridle.control.text import Text
from bridle.kernels import native
from bridle.kernels.quicken import quicken
unet = tiny.make_unet().requires_grad_(False)
control = tiny.wake(Control.from_base(unet))
quicken(unet, control)
latents, timesteps, text, hint = tiny.make_inputs()
with torch.autocast("cpu", torch.bfloat16):
    output = control.join(unet, control.call(latents, timesteps, Text(text)), control(latents, timesteps, text, hint))
output.float().square().mean().backward()
norm = torch.stack([weight.grad.norm() for weight in control.parameters() if weight.grad is not None]).norm()
print(native.library() is None, output.float().norm().item(), norm.item())
"""


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    subprocess.run([sys.executable, "-c", "from bridle.kernels.compiler import load; load('native.c')"], check=True)
    (library,) = tmp_path.rglob("*.so")
    library.write_bytes(b"cut short")
    assert compiler.load("native.c") is not None
    assert [library.read_bytes()[:4] for library in tmp_path.rglob("*.so")] == [b"\x7fELF"]


def test_without_a_compiler_pytorch_computes(tmp_path: Path) -> None:
    code = ALONE.format(tests=str(Path(tiny.__file__).parent))
    said = {}
    for cc in ("false", os.environ.get("CC", "")):
        environment = os.environ | {"CC": cc, "XDG_CACHE_HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        said[cc] = done.stdout.split()
    without, *plain = said["false"]
    assert without == "True"
    for found, expected in zip(said[os.environ.get("CC", "")][1:], plain, strict=True):
        assert float(found) == pytest.approx(float(expected), rel=0.02)
