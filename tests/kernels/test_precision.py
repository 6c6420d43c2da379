"""bfloat16 is computed in where the machine is faster in it, and nowhere else unless asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bridle.kernels import choice
from bridle.kernels.precision import TYPES, choose_precision, convolution

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


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="nothing here could have bfloat16 to lose")
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
