"""A base's own weights beside a control's: for differences, and for official checkpoints that hold both."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from bridle.errors import FileError
from bridle.files import kinds
from bridle.files.architecture import Architecture
from bridle.files.difference import MARK, REST, check_base, is_copied
from bridle.files.layout import layout
from bridle.files.official import CONTROL, UNET
from bridle.files.tensors import CONFIG, Spec, Weights, open_weights, read_json

EXPECTED = "expected a diffusers pipeline, its unet folder, or a single-file checkpoint"


def open_unet(base: str, shape: Architecture) -> Weights:
    """What a control of that shape copied from its base, under diffusers' names.

    Args: base: "embedded", a diffusers folder, or a checkpoint.
    Raises: FileError: nothing is found there, or no U-Net of that shape.
    """
    path = find_unet(base)
    weights = open_weights(path)
    names = [name for name in layout(shape) if is_copied(name)]
    kind = kinds.recognise(weights.specs)
    if kind in (kinds.BASE, kinds.OFFICIAL_FULL):
        ours = {name: UNET + shape.official(name) for name in names}
    elif kind is kinds.BASE_UNET and "input_blocks.0.0.weight" in weights.specs:
        ours = {name: shape.official(name) for name in names}
    elif kind is kinds.BASE_UNET:
        ours = {name: name for name in names}
    else:
        raise FileError(f"base {base} is {kind.title}; {EXPECTED}")
    return weights.renamed({name: old for name, old in ours.items() if old in weights.specs})


def find_unet(base: str) -> Path:
    if base == "embedded":
        from bridle.base.load import embedded_folder  # imports diffusers

        return embedded_folder() / "unet"
    path = Path(base)
    if (path / "model_index.json").exists():
        return path / "unet"
    if path.is_dir() and read_json(path / CONFIG).get("_class_name") != "UNet2DConditionModel":
        raise FileError(f"base {base} is no U-Net; {EXPECTED}")
    return path


def put_beside(control: Weights, shape: Architecture, base: str, unet: Weights, delta: Mapping[str, Tensor]) -> Weights:
    """An official checkpoint of both, from the control under its official names and a single-file base.

    Args:
        unet: of that base, from `open_unet`.
        delta: what training changed in the base, under diffusers' names; it is put into the base.

    Raises: FileError: the base is no single file, or one of another shape.
    """
    path = Path(base)
    whole = open_weights(path) if path.is_file() else None
    if whole is None or kinds.recognise(whole.specs) not in (kinds.BASE, kinds.OFFICIAL_FULL):
        raise FileError(f"base {base} is no single-file checkpoint, which an official file holds; give one, or none")
    copied = {name: control.specs[CONTROL + shape.official(name)] for name in layout(shape) if is_copied(name)}
    check_base(copied, copied, unet, path)
    kept = {name: spec for name, spec in whole.specs.items() if not name.startswith((CONTROL, REST)) and name != MARK}
    changes = official_delta(delta, shape, kept, base)

    def read(name: str) -> Tensor:
        if name not in kept:
            return control[name]
        tensor = whole[name]
        return (tensor.float() + changes[name]).to(tensor.dtype) if name in changes else tensor

    return Weights(control.path, kept | control.specs, read, control.metadata)


def official_delta(
    delta: Mapping[str, Tensor], shape: Architecture, kept: Mapping[str, Spec], base: str
) -> dict[str, Tensor]:
    """The same under the names of the checkpoint."""
    changes = {}
    for name, change in delta.items():
        try:
            official = UNET + shape.official(name)
            fits = kept[official].shape == tuple(change.shape)
        except KeyError:
            fits = False
        if not fits:
            raise FileError(f"base {base} has no {name} of shape {list(change.shape)}; give the base it was trained on")
        changes[official] = change
    return changes
