"""The models of Debian's `sweethome3d-furniture`, made ready for the renderer, with their names, licences and authors.

Out, under `--out`: `catalogue.jsonl` (one model a line), `models/<key>/mesh.npz` and its textures, and
`ATTRIBUTION.md`, the list of all authors that CC-BY asks for. Needs `apt-get download` and `dpkg`; no root.

    python tools/scenes/catalogue.py --out work/scenes
"""

import argparse
import json
import re
import subprocess
import tempfile
import zipfile
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import names
import numpy as np
import obj
from library import CC0, CC_BY, CC_BY_US, Model, attribution, hold_out
from PIL import Image

from bridle import atomic

PACKAGE = "sweethome3d-furniture"
FOLDER = Path("usr/share/sweethome3d/furniture")
CATALOGUES = {
    "BlendSwap-CC-0": ("cc0", CC0),
    "BlendSwap-CC-BY": ("cc-by", CC_BY),
    "KatorLegaz": ("kator-legaz", CC_BY_US),
    "Reallusion": ("reallusion", CC_BY_US),
    "Scopia": ("scopia", CC_BY),
}
TEXTURE_PX = 512  # at most: the pictures are small
TRANSPARENT_SHARE = 0.4  # of the surface, above which a model is mostly glass


def fetch(out: Path) -> Path:
    """Unpack the Debian package under `out`, once. Returns: the folder with its catalogues."""
    if not (out / "debian" / FOLDER).is_dir():
        with tempfile.TemporaryDirectory() as scratch:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
            package = next(Path(scratch).glob("*.deb"))
            subprocess.run(["dpkg", "-x", str(package), str(out / "debian")], check=True)
    return out / "debian" / FOLDER


def list_entries(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    """The numbered entries of a catalogue's properties, in their order."""
    entries: dict[int, dict[str, str]] = defaultdict(dict)
    for line in archive.read("PluginFurnitureCatalog.properties").decode("latin1").splitlines():
        match = re.match(r"(\w+)#(\d+)=(.*)", line)
        if match:
            entries[int(match[2])][match[1]] = match[3].strip()
    return [entries[number] for number in sorted(entries)]


def read_model(archive: zipfile.ZipFile, entry: dict[str, str]) -> tuple[obj.Mesh, dict[str, Image.Image]]:
    """The mesh of an entry, scaled to metres, standing on y = 0 in the middle, and its textures by file name."""
    path = Path(entry["model"].lstrip("/"))
    text = archive.read(str(path)).decode("latin1")
    library: dict[str, obj.Material] = {}
    for name in re.findall(r"^mtllib (.+?)\s*$", text, re.M):
        if str(path.parent / name) in archive.namelist():
            library |= obj.read_materials(archive.read(str(path.parent / name)).decode("latin1"))
    mesh = to_metres(obj.read_mesh(text, library), entry)
    textures = {}
    for material in mesh.materials:
        if material.texture and str(path.parent / material.texture) in archive.namelist():
            with archive.open(str(path.parent / material.texture)) as file:
                image = Image.open(file)
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            image.thumbnail((TEXTURE_PX, TEXTURE_PX), Image.Resampling.LANCZOS)
            textures[material.texture] = image
    return mesh, textures


def to_metres(mesh: obj.Mesh, entry: dict[str, str]) -> obj.Mesh:
    """Turn by the catalogue's rotation, and stretch the bounding box to the catalogue's size."""
    turn = np.array([float(number) for number in entry.get("modelRotation", "1 0 0 0 1 0 0 0 1").split()])
    positions = mesh.positions.astype(np.float64) @ turn.reshape(3, 3).T
    normals = mesh.normals.astype(np.float64) @ turn.reshape(3, 3).T
    low, high = positions.min((0, 1)), positions.max((0, 1))
    size = np.array([float(entry[side]) / 100 for side in ("width", "height", "depth")])
    scale = size / np.maximum(high - low, 1e-9)
    positions = (positions - np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])) * scale
    normals = normals / scale
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-30)
    return replace(mesh, positions=positions.astype(np.float32), normals=normals.astype(np.float32))


def transparent_share(mesh: obj.Mesh) -> float:
    """How much of the surface one sees through, in [0, 1]."""
    area = obj.areas(mesh.positions)
    clear = np.array([material.opacity < 0.6 for material in mesh.materials])[mesh.material]
    return float(area[clear].sum() / area.sum())


def save_model(folder: Path, mesh: obj.Mesh, textures: dict[str, Image.Image]) -> None:
    """Write `mesh.npz` and `textures/`; textures that the package lacks are forgotten."""
    materials = [replace(m, texture=m.texture if m.texture in textures else None) for m in mesh.materials]
    stored = {name: f"{number}.png" for number, name in enumerate(sorted(textures))}
    for name, image in textures.items():
        atomic.write_with(folder / stored[name], lambda path, image=image: image.save(path, "PNG"))
    rows = [asdict(replace(m, texture=stored.get(m.texture or ""))) for m in materials]
    arrays = {
        "positions": mesh.positions,
        "normals": mesh.normals.astype(np.float16),
        "uv": mesh.uv,
        "material": mesh.material,
        "materials": np.array(json.dumps(rows)),
    }
    atomic.write_with(folder / "mesh.npz", lambda path: np.savez_compressed(path, **arrays))


def build(out: Path) -> list[Model]:
    """Convert every model that is worth a picture. Models that are there already are converted again."""
    models = []
    for path in sorted(fetch(out).glob("*.sh3f")):
        short, licence = CATALOGUES[path.stem]
        with zipfile.ZipFile(path) as archive:
            for entry in list_entries(archive):
                key = f"{short}/{entry['id'].split('#')[-1]}"
                if names.is_left_out(key):
                    continue
                mesh, textures = read_model(archive, entry)
                if transparent_share(mesh) > TRANSPARENT_SHARE:
                    print(f"{key}: mostly glass, left out")
                    continue
                save_model(out / "models" / key.replace("/", "-"), mesh, textures)
                models.append(describe(key, licence, entry))
    return hold_out(models)


def describe(key: str, licence: str, entry: dict[str, str]) -> Model:
    name = names.plain_name(key, entry["name"])
    width, height, depth = (float(entry[side]) / 100 for side in ("width", "height", "depth"))
    return Model(
        key=key, name=name, kind=names.kind(name), mount=names.mount(key), licence=licence,
        creator=entry["creator"], title=entry["name"], size_m=(width, height, depth),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("work/scenes"))
    args = parser.parse_args()
    found = build(args.out)
    atomic.write_text(args.out / "catalogue.jsonl", "".join(json.dumps(asdict(m)) + "\n" for m in found))
    atomic.write_text(args.out / "ATTRIBUTION.md", attribution(found))
    free = sum(m.licence == CC0 for m in found)
    print(f"{len(found)} models, {free} of them CC0, {sum(m.held_out for m in found)} held out, in {args.out}")
