"""From any control that Bridle reads to the format that another tool reads, tensor by tensor.

| target       | written                                                                        |
|--------------|--------------------------------------------------------------------------------|
| `diffusers`  | a folder of `config.json` and weights                                          |
| `official`   | one file of `control_model.*`, with a base's checkpoint beside it where given  |
| `comfyui`    | one file that ComfyUI reads: official names, no prefix                         |
| `difference` | one file of the control minus its base, see `difference.py`                    |
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridle.atomic import write_text, write_with
from bridle.errors import FileError
from bridle.files import kinds
from bridle.files.architecture import OFFICIAL_HINT
from bridle.files.base import open_unet, put_beside
from bridle.files.difference import MARK, REST, take_base
from bridle.files.official import CONTROL
from bridle.files.read import METADATA_KEY, UNMAPPED, OpenControl, open_control
from bridle.files.tensors import CONFIG, WEIGHTS, Spec, Weights, weight_files
from bridle.files.write import write_weights

TARGETS = ("diffusers", "official", "comfyui", "difference")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")  # hashes of the file that was read
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What was written.

    Args:
        path: the file or folder.
        to: the format.
        parameters: of the control.
        size_bytes: of the weights.
        notes: what the format cannot carry.
    """

    path: str
    to: str
    parameters: int
    size_bytes: int
    notes: list[str]


def convert(
    source: Path,
    out: Path,
    to: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done_bytes, total_bytes: None,
) -> Converted:
    """Write a control in another format. Nothing but the file under way is left behind where this is stopped.

    Args:
        source: any file or folder that `read_control` reads.
        to: one of the table above.
        out: what to write: a `.safetensors` file, or for `diffusers` a folder. It must not exist yet.
        base: "embedded", a diffusers folder, or a checkpoint. A difference needs it, in either direction; with
            `official`, a single-file checkpoint is written beside the control.
        dtype: "float32", "float16" or "bfloat16"; the type stays where not given.
        progress: called with bytes done and in all: reading for the hash, and writing.

    Raises: FileError: the source is no control or damaged, the target cannot hold it, or a base is missing or wrong.
    """
    check_request(out, to, dtype)
    control, unet = open_both(source, to, base)
    weights = control.weights.checked()
    weights = weights.cast(DTYPES[dtype]) if dtype else weights
    files, passes = weight_files(source), 2 if to == "difference" else 1
    meter = Meter(progress, sum(file.stat().st_size for file in files) + passes * weights.size_bytes)
    facts = control.facts | {"source": {file.name: hash_file(file, meter.add) for file in files}}
    delta = find_delta(control)
    if to == "diffusers":
        try:
            return write_folder(control, weights, facts, out, delta, meter)
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)  # it was not there before, and would be in the way of another try
            raise
    named = arrange(control, weights, to, unet, meter)
    whole = to == "official" and unet is not None
    if whole:
        named = put_beside(named, shape_of(control), str(base), unet, read_delta(control, delta))
    return write_file(control, named, out, to, *leave_delta(facts, to, whole), meter)


def open_both(source: Path, to: str, base: str | None) -> tuple[OpenControl, Weights | None]:
    """The control, and what it copied from its base where one is given."""
    control = open_control(source)
    check_target(control, to)
    if base is None:
        return control.with_base(None), None
    if control.shape is None or (to in ("diffusers", "comfyui") and control.kind is not kinds.DIFFERENCE):
        raise FileError(f"{to} holds no base, and {source} needs none to be read; leave out --base")
    unet = open_unet(base, control.shape)
    return control.with_base(unet), unet


def arrange(control: OpenControl, weights: Weights, to: str, unet: Weights | None, meter: "Meter") -> Weights:
    """Under the names of a single file."""
    if to == "difference":
        return as_difference(control, weights, unet, meter)
    if control.kind in UNMAPPED:
        return weights
    return prefixed(control, weights, "" if to == "comfyui" else CONTROL)


class Meter:
    """Bytes done, of a number that is known for certain only once the last file is begun."""

    def __init__(self, progress: Progress, total_bytes: int) -> None:
        self.progress, self.total_bytes, self.done_bytes = progress, total_bytes, 0

    def begin(self, last_bytes: int) -> None:
        self.total_bytes = self.done_bytes + last_bytes

    def add(self, count_bytes: int) -> None:
        self.done_bytes += count_bytes
        self.progress(self.done_bytes, self.total_bytes)


def check_request(out: Path, to: str, dtype: str | None) -> None:
    if to not in TARGETS:
        raise FileError(f"target is {to!r}; expected one of {', '.join(TARGETS)}")
    if dtype is not None and dtype not in DTYPES:
        raise FileError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if out.exists():
        raise FileError(f"{out} exists already; give a name that is free")
    if to != "diffusers" and out.suffix != ".safetensors":
        raise FileError(f"{out} is no name for a weight file; expected one that ends on .safetensors")


def check_target(control: OpenControl, to: str) -> None:
    """Raises: FileError: the format has no place for something without which the control is another one."""
    if control.shape is None:
        if to not in ("diffusers", "comfyui"):
            raise FileError(
                f"{control.path} is {control.kind.title}, which has no {to} form; expected diffusers or comfyui"
            )
        return
    if to == "diffusers":
        return
    if control.facts.get("hint_encoder") == "paper":
        raise FileError(f"{control.path} has the paper's hint encoder, which only Bridle reads; {to} cannot hold it")
    if control.shape.hint_widths != OFFICIAL_HINT:
        widths = list(control.shape.hint_widths)
        raise FileError(f"{control.path} has a hint encoder of {widths}; {to} holds only {list(OFFICIAL_HINT)}")


def shape_of(control: OpenControl) -> Any:
    assert control.shape is not None
    return control.shape


def prefixed(control: OpenControl, weights: Weights, prefix: str) -> Weights:
    """Under official names."""
    return weights.renamed({prefix + shape_of(control).official(name): name for name in weights.specs})


def as_difference(control: OpenControl, weights: Weights, unet: Weights | None, meter: Meter) -> Weights:
    if unet is None:
        raise FileError("a difference needs the base that it is one to; give it with --base")
    strange = [name for name, spec in weights.specs.items() if spec.dtype not in DTYPES.values()]
    if strange:
        raise FileError(f"{strange[0]} is {weights.specs[strange[0]].dtype}; convert with --dtype float32")
    split = take_base(weights, unet, meter.add)
    names = {name if name.startswith(REST) else CONTROL + shape_of(control).official(name): name for name in split}
    named = split.renamed(names)

    def read(name: str) -> Tensor:
        return torch.ones(1) if name == MARK else named[name]

    return Weights(named.path, named.specs | {MARK: Spec(torch.float32, (1,))}, read, named.metadata)


def write_file(
    control: OpenControl, weights: Weights, out: Path, to: str, facts: dict[str, Any], notes: list[str], meter: Meter
) -> Converted:
    """A single file, which has its configuration in the header."""
    meter.begin(weights.size_bytes)
    write_weights(out, weights, header(control, facts | {"config": control.config}), meter.add)
    return Converted(str(out), to, count(control), weights.size_bytes, [*notes, *advise(control)])


def advise(control: OpenControl) -> Iterator[str]:
    """What other tools do with a single file that nothing in it can change."""
    if control.shape and control.shape.widths[0] != 320:
        yield "ComfyUI and webui know the sizes of Stable Diffusion only; this base has another."
    if control.config.get("global_pool_conditions"):
        yield "ComfyUI and webui average its residuals over the picture only if the file's name ends on _shuffle."


def write_folder(
    control: OpenControl, weights: Weights, facts: dict[str, Any], out: Path, delta: Path | None, meter: Meter
) -> Converted:
    """The configuration last: a folder without it is no control."""
    if delta:
        write_with(out / delta.name, lambda temporary: shutil.copyfile(delta, temporary))
    meter.begin(weights.size_bytes)
    write_weights(out / WEIGHTS, weights, header(control, facts), meter.add)
    write_text(out / CONFIG, json.dumps(control.config, indent=2, sort_keys=True) + "\n")
    return Converted(str(out), "diffusers", count(control), weights.size_bytes, [])


def header(control: OpenControl, facts: dict[str, Any]) -> dict[str, str]:
    """What the source's header says, with Bridle's facts brought up to date."""
    kept = {key: text for key, text in control.weights.metadata.items() if key not in STALE}
    return kept | {"format": "pt", METADATA_KEY: json.dumps(facts, sort_keys=True)}


def count(control: OpenControl) -> int:
    return sum(spec.count for name, spec in control.weights.specs.items() if not name.startswith(REST))


def find_delta(control: OpenControl) -> Path | None:
    """The file that the facts name. Raises: FileError: it is missing."""
    name = control.facts.get("base_delta")
    if name is None:
        return None
    from bridle.files.weights import DELTA_NAME  # imports diffusers

    folder = control.path if control.path.is_dir() else control.path.parent
    if not isinstance(name, str) or not DELTA_NAME.fullmatch(name) or not (folder / name).exists():
        raise FileError(f"{control.path} names the base delta {name!r}, which is not there; copy the whole folder")
    return folder / name


def read_delta(control: OpenControl, delta: Path | None) -> Mapping[str, Tensor]:
    from bridle.files.weights import read_delta as read

    return read(delta.parent, delta.name) if delta else {}


def leave_delta(facts: dict[str, Any], to: str, with_base: bool) -> tuple[dict[str, Any], list[str]]:
    """Facts for a file without the base delta, which they go on to name, and the note on it."""
    if "base_delta" not in facts:
        return facts, []
    name = facts["base_delta"]
    rest = {key: value for key, value in facts.items() if key != "base_delta"} | {"without_base_delta": name}
    what = f"is left out, for {to} cannot hold it; save the trained base beside the file (docs/formats.md)"
    what = "is in the base that the file holds; draw with that base" if with_base else what
    return rest, [f"What training changed in the base ({name}) {what}."]


def hash_file(path: Path, progress: Callable[[int], None] = lambda done_bytes: None) -> str:
    """The sha256 of its content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()
