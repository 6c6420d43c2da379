"""bfloat16 is computed in where the machine is faster in it, and nowhere else unless asked for."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bridle.kernels import choice, precision
from bridle.kernels.precision import TYPES, can_do, choose_precision, convolution
from bridle.kernels.stand_in import Undo

CPU = torch.device("cpu")


@pytest.mark.parametrize("wanted", ["bf16", "fp32"])
def test_what_was_asked_for_stays(wanted) -> None:
    assert choose_precision(wanted, CPU) == wanted


@pytest.mark.parametrize("fastest", ["bf16", "fp32"])
def test_auto_is_what_measures_faster(monkeypatch: pytest.MonkeyPatch, fastest: str) -> None:
    monkeypatch.setattr(choice, "CHOSEN", {})
    monkeypatch.setattr(choice, "_kept", dict)
    monkeypatch.setattr(choice, "_settle", lambda key, measured, ways: measured)
    monkeypatch.setattr(choice, "_measure", lambda ways: next(name for name in ways if name == fastest))
    assert choose_precision("auto", CPU) == fastest


@pytest.mark.parametrize("around", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_it_is_found_out_wherever_somebody_asks(monkeypatch: pytest.MonkeyPatch, around) -> None:
    """A way to measure that computed the same in both would leave the answer to chance."""
    seen: list[torch.dtype] = []
    monkeypatch.setattr(choice, "CHOSEN", {})
    monkeypatch.setattr(choice, "_kept", dict)
    monkeypatch.setattr(choice, "_settle", lambda key, measured, ways: measured)

    def watch(layer: nn.Module) -> Undo:
        return layer.register_forward_hook(lambda layer, given, output: seen.append(output.dtype)).remove

    monkeypatch.setattr(precision, "quicken", watch)
    with around():
        assert choose_precision("auto", CPU) in TYPES
    assert set(seen) == set(TYPES.values())


def test_bfloat16_weights_are_computed_with_in_bfloat16() -> None:
    assert choose_precision("auto", CPU, torch.bfloat16) == "bf16"


def test_what_was_found_with_fewer_instructions_is_not_kept_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    before = can_do()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert can_do() != before
    monkeypatch.undo()
    monkeypatch.setattr(precision, "instructions", lambda: "sse2")
    assert can_do() != before


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the libraries can only be told so there")
def test_a_processor_without_bfloat16_computes_in_float32(tmp_path: Path) -> None:
    """Many laptops': told by PyTorch's libraries that there is AVX2 and no more."""
    code = "from bridle.kernels import precision as p; print(p.choose_precision('auto', p.torch.device('cpu')))"
    told = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | told, capture_output=True, text=True)
    assert done.stdout.strip() == "fp32", done.stderr


@pytest.mark.parametrize("name", TYPES)
def test_what_is_measured_leaves_nothing_behind(name: str) -> None:
    before = torch.is_grad_enabled()
    with torch.no_grad():
        convolution(TYPES[name])()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() == before
