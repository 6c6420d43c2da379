"""A control of ours on disk, as diffusers lays it out: `config.json` and `diffusion_pytorch_model.safetensors`.

`ControlNetModel.from_pretrained(folder)` reads it as it is. What only Bridle knows (which links are connected, which
hint encoder, how it was trained) lies in the metadata of the safetensors file, where other tools leave it alone. A
control that was trained with the base unlocked has a third file: what changed in the base.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from bridle.atomic import write_text, write_with
from bridle.base.load import pick_device
from bridle.control.control import Control, control_class
from bridle.errors import FileError
from bridle.files.base import open_unet
from bridle.files.kinds import DIFFERENCE
from bridle.files.read import METADATA_KEY, open_control, read_facts
from bridle.files.tensors import CONFIG, WEIGHTS, Weights, open_weights

DELTA_NAME = re.compile(r"base_delta-[0-9a-f]{16}\.safetensors")


def save_control(control: Control, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a control folder, each file atomically.

    A base delta is named after its content and written before the weights, which name it; one from an earlier save is
    deleted after them. So whatever moment the process is killed at, the weights find the delta they were saved with.

    Args:
        metadata: facts worth keeping, such as annotator and steps; `base` and `unlock` are kept beside the delta too.
    """
    folder, facts = Path(folder), dict(metadata or {})
    facts.pop("base_delta", None)  # that of the control these facts were read from, should it be another one
    facts |= {"hint_encoder": control.hint_encoder, "links": control.links, "size_factor": control.size_factor}
    if control.base_delta:
        facts["base_delta"] = save_delta(control.base_delta, folder, facts)
    header = {"format": "pt", METADATA_KEY: json.dumps(facts, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in control.state_dict().items()}
    write_with(folder / WEIGHTS, lambda path: save_file(tensors, path, header))
    config = {"_class_name": control.CLASS, "_diffusers_version": diffusers.__version__, **control.config}
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    drop_deltas(folder, keep=facts.get("base_delta"))


def load_control(
    path: str | Path, *, base: str | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Control:
    """Load a control from any file or folder that is recognised, see docs/files.md.

    A base delta stays in float32 on the CPU; `bridle.attach` brings it to the base.

    Args:
        base: of a file that holds the difference to it: "embedded", a diffusers folder, or a checkpoint.
        device: a torch device, or "auto": a GPU where there is one.

    Raises: FileError: it is missing or damaged, no control that Bridle can use, or the base delta is not the one that
        the weights were saved with.
    """
    found = open_control(Path(path))
    if found.kind is DIFFERENCE and found.shape is not None:
        found = found.with_base(open_unet(base, found.shape) if base is not None else None)
    try:
        control = build(found.config, found.facts)
    except Exception as error:  # of any kind, whatever a damaged one makes diffusers stumble over
        raise FileError(f"the configuration of {path} is damaged ({first_line(error)}); copy it again") from None
    assign(control, found.weights.checked())
    if "base_delta" in found.facts:
        folder = found.weights.path.parent
        control.base_delta = read_delta(folder, found.facts["base_delta"])
    return control.eval().to(pick_device(device), dtype)


def build(config: dict[str, Any], facts: Mapping[str, Any]) -> Control:
    """A control without weights: on the meta device, which takes no memory and draws no random numbers."""
    with torch.device("meta"):
        return control_class(config["_class_name"]).build(config, facts)


def read_metadata(path: Path) -> dict[str, Any]:
    """What Bridle wrote beside the weights; empty for a control that another tool wrote."""
    return read_facts(open_weights(path))


def save_delta(delta: dict[str, Tensor], folder: Path, facts: dict[str, Any]) -> str:
    """Returns: the name of the file, which differs where the content does."""
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in delta.items()}
    name = delta_name(tensors)
    header = {METADATA_KEY: json.dumps({key: facts[key] for key in ("base", "unlock") if key in facts}, sort_keys=True)}
    write_with(folder / name, lambda path: save_file(tensors, path, header))
    return name


def read_delta(folder: Path, name: Any) -> dict[str, Tensor]:
    """Raises: FileError: the file that the weights name is missing, damaged, or another one."""
    if not isinstance(name, str) or not DELTA_NAME.fullmatch(name):  # a name from outside could lead anywhere
        raise FileError(f"{folder / WEIGHTS} is damaged (it names the base delta {name!r}); copy it again")
    path = folder / name
    if not path.exists():
        what = "what training changed in the base"
        raise FileError(f"{folder} has no {name}, {what}; copy the whole folder, or save the control again")
    # Copied: a mapped file would tie the control to the folder, which a later save may tidy.
    delta = {key: tensor.to(torch.float32, copy=True) for key, tensor in open_weights(path).items()}
    if delta_name(delta) != name:
        raise FileError(f"{path} is not the base delta that {WEIGHTS} was saved with; copy the whole folder again")
    return delta


def delta_name(delta: dict[str, Tensor]) -> str:
    """Args: delta: float32 on the CPU."""
    digest = hashlib.sha256()
    for name, tensor in sorted(delta.items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.numpy())
    return f"base_delta-{digest.hexdigest()[:16]}.safetensors"


def drop_deltas(folder: Path, keep: Any) -> None:
    """Delete what earlier saves wrote, or were killed while writing; files under any other name stay."""
    begun = (f".{WEIGHTS}.", f".{CONFIG}.", ".base_delta-")
    for path in folder.iterdir():
        if path.name.startswith(begun) or (DELTA_NAME.fullmatch(path.name) and path.name != keep):
            path.unlink()


def assign(control: Control, weights: Weights) -> None:
    """Fill a control. Raises: FileError: names or shapes differ from what its configuration asks for."""
    expected, path = control.state_dict(), weights.path
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        named = f"{len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
        raise FileError(f"the weights in {path} do not fit their {CONFIG}: {named}; both must come from one save")
    for name, spec in weights.specs.items():
        if spec.shape != expected[name].shape:
            shapes = f"{list(spec.shape)}, the configuration asks for {list(expected[name].shape)}"
            raise FileError(f"{name} in {path} has shape {shapes}; both must come from one save")
    if control.device.type == "meta":
        control.to_empty(device="cpu")
    for name, parameter in control.state_dict().items():
        # Copied, not assigned: tensors in a mapped file lie unaligned, and kernels then round differently.
        parameter.copy_(weights[name])


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
