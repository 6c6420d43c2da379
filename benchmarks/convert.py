"""How much memory and time converting a full-size control takes. Random weights, float32: 1.45 GB.

    python benchmarks/convert.py FOLDER

Writes some 20 GB into the folder, which must be new. Prints one line per conversion: peak resident memory (the
conversion has a process of its own), time, size written.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from bridle.files.architecture import Architecture
from bridle.files.convert import convert
from bridle.files.layout import layout
from bridle.files.tensors import Spec, Weights
from bridle.files.write import write_weights

SD15 = Architecture(
    widths=(320, 640, 1280, 1280),
    layers=2,
    depths=(1, 1, 1, 0),
    middle_depth=1,
    text_width=768,
    linear=False,
    in_channels=4,
    added="",
    added_width=0,
    hint_channels=3,
    hint_widths=(16, 32, 96, 256),
)
PLAN = (
    ("control", "official", None),
    ("official", "comfyui", None),
    ("comfyui", "diffusers", None),
    ("control", "official+base", "base"),
    ("control", "difference", "base"),
    ("difference", "back", "base"),
    ("control.pth", "from pth", None),
)


def make(folder: Path) -> None:
    """A control, and a base whose weights lie near the control's, as after training."""
    generator = torch.Generator().manual_seed(0)
    specs = {name: Spec(torch.float32, shape) for name, shape in layout(SD15).items()}
    control = {name: torch.randn(spec.shape, generator=generator) / 20 for name, spec in specs.items()}
    write_weights(folder / "control.safetensors", Weights(folder, specs, control.__getitem__), {})
    torch.save(
        {f"control_model.{SD15.official(name)}": value for name, value in control.items()}, folder / "control.pth"
    )
    base = {
        f"model.diffusion_model.{SD15.official(name)}": value * 1.001 + 1e-4
        for name, value in control.items()
        if not name.startswith("controlnet_")
    }
    base |= {f"first_stage_model.{number}": torch.randn(25_000_000) for number in range(16)}  # the rest of a checkpoint
    specs = {name: Spec(value.dtype, tuple(value.shape)) for name, value in base.items()}
    write_weights(folder / "base.safetensors", Weights(folder, specs, base.__getitem__), {})


def measure(folder: Path, source: str, target: str, base: str | None) -> None:
    """One conversion, in a process of its own."""
    to = {"official+base": "official", "back": "diffusers", "from pth": "diffusers"}.get(target, target)
    given = folder / source if (folder / source).exists() else folder / f"{source}.safetensors"
    out = folder / (target if to == "diffusers" else f"{target}.safetensors")
    start = time.perf_counter()
    done = convert(given, out, to, base=str(folder / f"{base}.safetensors") if base else None)
    took_s = time.perf_counter() - start
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {
        "peak_gib": round(peak_gib, 2),
        "time_s": round(took_s, 1),
        "written_gb": round(done.size_bytes / 1e9, 2),
    }
    print(f"{source} to {target}: {json.dumps(figures)}", flush=True)


def main() -> None:
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    if given == ["make"]:
        make(folder)
    elif given:
        measure(folder, given[0], given[1], given[2] or None)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for arguments in (["make"], *([source, target, base or ""] for source, target, base in PLAN)):
            subprocess.run([sys.executable, __file__, folder, *arguments], check=True)


if __name__ == "__main__":
    main()
