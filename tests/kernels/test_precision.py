"""16 bits are computed in where the machine is faster in them, and nowhere else unless asked for."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridle.errors import ConfigError
from bridle.kernels import choice, precision
from bridle.kernels.precision import ON_CPU, TYPES, can_do, choose_precision, convolution
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
        assert choose_precision("auto", CPU) in ON_CPU
    assert set(seen) == {TYPES[name] for name in ON_CPU}


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_weights_of_16_bits_are_computed_with_in_these(name: Any) -> None:
    assert choose_precision("auto", CPU, TYPES[name]) == name
    with pytest.raises(ConfigError, match=f"weights are {str(TYPES[name])[6:]}: load the base in float32"):
        choose_precision("fp32", CPU, TYPES[name])


@pytest.mark.parametrize(
    ("bfloat16", "generation", "expected"),
    [(True, (9, 0), "bf16"), (False, (7, 5), "fp16"), (False, (7, 0), "fp16"), (False, (6, 1), "fp32")],
    ids=["Hopper", "Turing", "Volta", "Pascal"],
)
def test_a_gpu_without_bfloat16_computes_in_float16_where_that_is_faster(
    bfloat16: bool, generation: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    assert choose_precision("auto", torch.device("cuda")) == expected


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
