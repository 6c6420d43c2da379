"""A control on disk, as diffusers lays it out: `config.json` and `diffusion_pytorch_model.safetensors`.

`ControlNetModel.from_pretrained(folder)` reads it as it is. What only Bridle knows (which links are connected, which
hint encoder, how it was trained) lies in the metadata of the safetensors file, where other tools leave it alone.
"""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bridle.atomic import write_text, write_with
from bridle.control.unet import COPIED, Control
from bridle.errors import ConfigError, FileError

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
METADATA_KEY = "bridle"


def save_control(control: Control, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Write a control folder, each file atomically. `metadata`: facts worth keeping, such as annotator and steps."""
    folder = Path(folder)
    own = {"hint_encoder": control.hint_encoder, "links": control.links, "size_factor": control.size_factor}
    header = {"format": "pt", METADATA_KEY: json.dumps({**(metadata or {}), **own}, sort_keys=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in control.state_dict().items()}
    write_with(folder / WEIGHTS, lambda path: save_file(tensors, path, header))
    config = {"_class_name": "ControlNetModel", "_diffusers_version": diffusers.__version__, **control.config}
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def load_control(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Control:
    """Load a control folder that Bridle or diffusers wrote.

    Raises: FileError: a file is missing or damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    try:
        control = build(read_config(folder), read_metadata(folder))
    except (TypeError, ValueError, ConfigError) as error:  # diffusers' own, and ours for what only the metadata says
        raise FileError(f"{folder / CONFIG} is damaged ({first_line(error)}); copy the control again") from None
    assign(control, read_weights(folder), folder)
    return control.eval().to(device, dtype)


def build(config: dict[str, Any], facts: dict[str, Any]) -> Control:
    """A control without weights: on the meta device, which takes no memory and draws no random numbers."""
    with torch.device("meta"):
        model: Any = ControlNetModel.from_config(config)
        settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
        return Control(
            {name: getattr(model, name) for name in COPIED},
            settings,
            facts.get("hint_encoder", "official"),
            facts.get("links", "all"),
            facts.get("size_factor", 2 ** (len(settings["conditioning_embedding_out_channels"]) - 1)),
        )


def read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{folder} has no {CONFIG}; expected a control folder, such as RUN/control") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{folder / CONFIG} is damaged ({error}); copy the control again") from None
    if not isinstance(config, dict):
        raise FileError(f"{folder / CONFIG} is damaged (no table of settings); copy the control again")
    if config.get("_class_name") != "ControlNetModel":
        raise FileError(f"{folder / CONFIG} describes a {config.get('_class_name')}; expected a ControlNetModel")
    return config


def read_metadata(folder: Path) -> dict[str, Any]:
    """What Bridle wrote beside the weights; empty for a control that another tool wrote."""
    with open_weights(folder) as file:
        text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise FileError(f"{folder / WEIGHTS} is damaged (its metadata is no table); copy the control again") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    with open_weights(folder) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary


def open_weights(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.exists():
        raise FileError(f"{folder} has no {WEIGHTS}; expected a control folder, such as RUN/control")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged ({error}); copy the control again") from None


def assign(control: Control, weights: dict[str, Tensor], folder: Path) -> None:
    """Raises: FileError: names or shapes differ from what the configuration asks for."""
    expected = control.state_dict()
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or extra:
        named = f"{len(missing)} missing {missing[:3]}, {len(extra)} unknown {extra[:3]}"
        raise FileError(f"the weights in {folder} do not fit its {CONFIG}: {named}; both must come from one save")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)}, the configuration asks for {list(expected[name].shape)}"
            raise FileError(f"{name} in {folder} has shape {shapes}; both must come from one save")
    # Copied, not assigned: tensors in a mapped file lie unaligned, and kernels then round differently.
    control.to_empty(device="cpu").load_state_dict(weights)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
