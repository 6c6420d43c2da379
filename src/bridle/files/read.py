"""A control from any file or folder that is recognised, in one form: diffusers' names and configuration, and facts.

`read_control` gives all of it at once, `open_control` before its weights are read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridle.errors import FileError
from bridle.files import kinds
from bridle.files.architecture import Architecture, from_config, to_config
from bridle.files.difference import MARK, REST, add_base
from bridle.files.infer import infer, infer_diffusers
from bridle.files.kinds import Kind
from bridle.files.layout import layout
from bridle.files.official import CONTROL
from bridle.files.tensors import CONFIG, WEIGHTS, Weights, find_weights, open_weights, read_json

METADATA_KEY = "bridle"
UNMAPPED = (kinds.SD3, kinds.FLUX, kinds.PIXEL)  # these have one set of names, and their configuration says all
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class OpenControl:
    """A control whose weights have not been read yet.

    Args:
        path: of the file or folder.
        kind: what it is on disk.
        config: diffusers' configuration, with `_class_name`.
        shape: what decides its parameters; None where they have no other names.
        weights: under diffusers' names; of a difference, the difference until `with_base`.
        facts: Bridle's metadata; empty where it has none.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    shape: Architecture | None
    weights: Weights
    facts: dict[str, Any]

    def with_base(self, base: Mapping[str, Tensor] | None) -> "OpenControl":
        """The control itself, where the file holds its difference to a base.

        Args: base: the U-Net's parameters under diffusers' names.
        Raises: FileError: it is needed and not given, or is another one.
        """
        if self.kind is not kinds.DIFFERENCE:
            return self
        if base is None:
            trained = f" ({self.facts['base']!r})" if "base" in self.facts else ""
            raise FileError(f"{self.path} is a difference to the base it was trained on{trained}; give that base too")
        return replace(self, weights=add_base(self.weights, base))


def read_control(
    path: Path, base_unet_state: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Read a control of any recognised kind.

    Args:
        path: a file or a folder, see docs/files.md.
        base_unet_state: the base's parameters under diffusers' names; only a difference needs them.

    Returns: diffusers' configuration with `_class_name`; the tensors under diffusers' names, on the CPU and in the type
        they are stored in; Bridle's metadata, empty where there is none.
    Raises: FileError: it is damaged, not a control, or a control that Bridle cannot use.
    """
    control = open_control(path).with_base(base_unet_state)
    return control.config, dict(control.weights.checked()), control.facts


def open_control(path: Path) -> OpenControl:
    """Recognise a file or folder and check that every parameter is there in its shape, without reading the weights.

    Raises: FileError: see `read_control`.
    """
    folder = find_folder(path)
    config = read_json(folder / CONFIG) if folder else None
    weights = open_weights(path)
    kind = kinds.recognise_class(config.get("_class_name")) if config else kinds.recognise(weights.specs, path.name)
    if kind.remedy:
        raise FileError(f"{path} is {kind.title}: {kind.remedy}")
    facts = read_facts(weights)
    config = config or facts.pop("config", None)
    if kind in UNMAPPED:
        if config is None:
            raise FileError(f"{path} is {kind.title} without a {CONFIG}; give the folder of both")
        check_types(weights)
        return OpenControl(path, kind, config, None, weights, facts)
    prefix = CONTROL if f"{CONTROL}input_hint_block.0.weight" in weights.specs else ""
    shape = find_shape(path, kind, config, weights, prefix, facts)
    named = weights if kind is kinds.DIFFUSERS else rename(weights, shape, prefix, kind)
    check_layout(named, shape)
    return OpenControl(path, kind, config or to_config(shape, path), shape, named, facts)


def find_folder(path: Path) -> Path | None:
    """The folder whose configuration counts: the one given, or that of a file with diffusers' own name."""
    if path.is_dir():
        if (path / "model_index.json").exists():
            inner = ", such as its folder controlnet" if (path / "controlnet").is_dir() else " beside it"
            raise FileError(f"{path} is a pipeline, not a control; give a control{inner}")
        find_weights(path)
        return path
    own = path.name.startswith(Path(WEIGHTS).stem)  # with ".fp16" in it as well
    return path.parent if own and (path.parent / CONFIG).exists() else None


def find_shape(
    path: Path, kind: Kind, config: Any, weights: Weights, prefix: str, facts: Mapping[str, Any]
) -> Architecture:
    """From the configuration where there is one, else from the parameters."""
    if config is not None:
        if not isinstance(config, dict) or kinds.recognise_class(config.get("_class_name")) is not kinds.DIFFUSERS:
            raise FileError(f"{path} is damaged (its configuration is none of a ControlNetModel); copy it again")
        shape = from_config(config, path)
        return replace(shape, hint_widths=()) if facts.get("hint_encoder") == "paper" else shape
    if kind is kinds.DIFFUSERS:
        return infer_diffusers(weights.specs, path)
    specs = {name.removeprefix(prefix): spec for name, spec in weights.specs.items() if name.startswith(prefix)}
    return infer(specs, path)


def rename(weights: Weights, shape: Architecture, prefix: str, kind: Kind) -> Weights:
    """From official names to diffusers'. Raises: FileError: parameters are missing, or there are others."""
    names = {name: prefix + shape.official(name) for name in layout(shape)}
    rests = {name for name in weights.specs if name.startswith(REST) and kind is kinds.DIFFERENCE}
    ours = {name for name in weights.specs if name.startswith(prefix)} - rests - {MARK}
    missing, unknown = sorted(set(names.values()) - ours), sorted(ours - set(names.values()))
    refuse_names(weights.path, missing, unknown)
    return weights.renamed(names | {name: name for name in rests})


def check_layout(weights: Weights, shape: Architecture) -> None:
    """Raises: FileError: names, shapes or types are not those of such a control."""
    expected = layout(shape)
    ours = {name for name in weights.specs if not name.startswith(REST)}
    if not shape.hint_widths:  # an encoder that only Bridle has; `load_control` builds it and checks it
        ours = {name for name in ours if not name.startswith("controlnet_cond_embedding.")}
    refuse_names(weights.path, sorted(expected.keys() - ours), sorted(ours - expected.keys()))
    for name, size in expected.items():
        if weights.specs[name].shape != size:
            found = list(weights.specs[name].shape)
            raise FileError(f"{name} in {weights.path} has shape {found}, the rest of it asks for {list(size)}")
    check_types(weights)


def check_types(weights: Weights) -> None:
    for name, spec in weights.specs.items():
        if spec.dtype not in FLOATS and not name.startswith(REST):
            kind = str(spec.dtype).removeprefix("torch.")
            raise FileError(f"{name} in {weights.path} is {kind}; expected float32, float16 or bfloat16 weights")


def refuse_names(path: Path, missing: list[str], unknown: list[str]) -> None:
    if missing or unknown:
        named = f"{len(missing)} missing {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        raise FileError(f"{path} does not hold one whole control: {named}; take another copy")


def read_facts(weights: Weights) -> dict[str, Any]:
    """Raises: FileError: Bridle's metadata is no table."""
    try:
        return dict(json.loads(weights.metadata.get(METADATA_KEY, "{}")))
    except (TypeError, ValueError, RecursionError):
        raise FileError(f"{weights.path} is damaged (its metadata is no table); copy it again") from None
