"""What a file is, for `bridle info`: told from names, shapes and the header, without reading weights into memory."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bridle.errors import FileError
from bridle.files import kinds
from bridle.files.convert import hash_file
from bridle.files.difference import REST
from bridle.files.read import METADATA_KEY, UNMAPPED, find_folder, open_control
from bridle.files.tensors import CONFIG, Weights, open_weights, read_json, weight_files


def describe(path: Path) -> dict[str, Any]:
    """Everything that can be said of a file or folder without its weights, as plain values.

    Raises: FileError: it is no weight file, or damaged; or a control that is not whole.
    """
    folder = find_folder(path)
    weights = open_weights(path)
    kind = kinds.recognise_class(read_json(folder / CONFIG).get("_class_name")) if folder else None
    kind = kind or kinds.recognise(weights.specs, path.name)
    files = weight_files(path)
    about: dict[str, Any] = {
        "path": str(path),
        "kind": kind.name,
        "title": kind.title,
        "usable": not kind.remedy,
        "remedy": kind.remedy,
        "tensors": len(weights),
        "precision": precision(weights),
        "size_bytes": sum(file.stat().st_size for file in files),
        "sha256": {file.name: hash_file(file) for file in files},
        "metadata": {key: text for key, text in sorted(weights.metadata.items()) if key != METADATA_KEY},
    }
    return about if kind.remedy else about | describe_control(path, kind)


def describe_control(path: Path, kind: kinds.Kind) -> dict[str, Any]:
    try:
        control = open_control(path)
    except FileError:
        if kind in UNMAPPED and path.is_file():
            return {"family": kind.name.partition(" ")[0], "bridle": {}, "needs": f"the folder with its {CONFIG}"}
        raise
    parameters = sum(spec.count for name, spec in control.weights.specs.items() if not name.startswith(REST))
    about: dict[str, Any] = {"parameters": parameters, "bridle": control.facts}
    if control.shape is None:
        return about | {"family": kind.name.partition(" ")[0], "links": count_links(control.weights)}
    return about | {
        "family": control.shape.family,
        "links": control.shape.links,
        "connected": control.facts.get("links", "all"),
        "hint_channels": control.shape.hint_channels,
        "hint_encoder": control.facts.get("hint_encoder", "official"),
        "text_width": control.shape.text_width,
        "widths": list(control.shape.widths),
    }


def count_links(weights: Weights) -> int:
    blocks = ("controlnet_blocks.", "controlnet_single_blocks.")
    return len([name for name in weights.specs if name.startswith(blocks) and name.endswith(".weight")])


def precision(weights: Weights) -> str:
    """The type of most values; all of them, where there are several."""
    sizes: Counter[str] = Counter()
    for name, spec in weights.specs.items():
        if not name.startswith(REST):
            sizes[str(spec.dtype).removeprefix("torch.")] += spec.count
    return ", ".join(name for name, _ in sizes.most_common())


FAMILIES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "Flux",
    "other": "none that Bridle knows by name",
}


def lines_of(about: dict[str, Any]) -> list[str]:
    """For people."""
    rows = [("kind", f"{about['title']}{'' if about['usable'] else ': ' + about['remedy']}")]
    if "family" in about:
        rows.append(("family", FAMILIES[about["family"]]))
    if "needs" in about:
        rows.append(("needs", about["needs"]))
    if "links" in about:
        rows.append(
            (
                "links",
                f"{about['links']}, {about['connected']} connected" if "connected" in about else str(about["links"]),
            )
        )
    if "hint_channels" in about:
        rows.append(("hint", f"{about['hint_channels']} channels, {about['hint_encoder']} encoder"))
    if "parameters" in about:
        rows.append(("parameters", f"{about['parameters']:,}"))
    rows += [
        ("precision", about["precision"]),
        ("size", f"{about['size_bytes'] / 1e6:,.1f} MB, {about['tensors']} tensors"),
    ]
    rows += [("sha256", f"{digest}  {name}") for name, digest in about["sha256"].items()]
    rows += [(key, json.dumps(value)) for key, value in sorted(about.get("bridle", {}).items())]
    rows += [(key, text if len(text) < 200 else f"{text[:200]}…") for key, text in about["metadata"].items()]
    width = max(len(key) for key, _ in rows)
    return [f"{key:<{width}}  {' '.join(text.split())}" for key, text in rows]
