"""Samples and features, made once and kept: a broken-off measurement goes on, and the next one reuses its anchors.

Each file is named by the digest of all that it follows from (weights, prompts, seeds, settings; or pixels), so a file
that fits is right, and nothing has to be cleared after a change. The folder can be deleted at any time.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bridle import atomic
from bridle.base.base import Base
from bridle.base.load import EMBEDDED, embedded_folder, load_base
from bridle.evaluate import quality
from bridle.sample.sampler import generate, reconstruct
from bridle.sample.settings import SampleSettings

CHUNK = 64


@dataclass(kw_only=True)
class Kept:
    """Where things are kept, and how they are made. inception: its file, None for the installed package."""

    folder: Path
    inception: Path | None = None
    precision: quality.Precision = "bf16"
    spent: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Pictures and seconds by what was done, without what was there already."""
    read: set[Path] = field(default_factory=set)
    seen: dict[str, np.ndarray] = field(default_factory=dict)

    def samples(
        self, where: str, prompts: Sequence[str], seeds: Sequence[int], settings: SampleSettings
    ) -> list[np.ndarray]:
        """One picture per prompt, from a base: "embedded" or a folder."""
        print_of = fingerprint(where)

        def key(rows: slice) -> str:
            return digest("samples", print_of, asdict(settings), list(prompts[rows]), list(seeds[rows]))

        base = Late(where)
        return self._pictures("drawn", len(prompts), key, lambda rows: generate(
            base.get(), None, [], prompts[rows], seeds[rows], settings
        ))  # fmt: skip

    def reconstructed(self, where: str, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures through a base's autoencoder and back."""
        print_of = fingerprint(where)

        def key(rows: slice) -> str:
            return digest("reconstructed", print_of, digest_pixels(pictures[rows]))

        base = Late(where)
        return self._pictures("reconstructed", len(pictures), key, lambda rows: reconstruct(base.get(), pictures[rows]))

    def features(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Inception's, [N, 2048] float32. Kept picture by picture, so that any selection of them is found again."""
        known, keys = self._known(), [digest_pixels([picture]) for picture in pictures]
        missing = list({key: picture for key, picture in zip(keys, pictures, strict=True) if key not in known}.items())
        network = quality.load_inception(self.inception) if missing else None
        for start in range(0, len(missing), CHUNK):
            names, rows = zip(*missing[start : start + CHUNK], strict=True)
            began = time.monotonic()
            made = quality.features(rows, network, precision=self.precision)
            self._count("seen", len(rows), time.monotonic() - began)
            path = self.folder / f"features-{self.precision}-{digest(names)}.npz"
            atomic.write_with(
                path, lambda temporary, names=names, made=made: np.savez(temporary, keys=names, rows=made)
            )
            known.update(zip(names, made, strict=True))
        return np.stack([known[key] for key in keys])

    def _known(self) -> dict[str, np.ndarray]:
        for path in self.folder.glob(f"features-{self.precision}-*.npz"):
            if path not in self.read:
                with np.load(path) as arrays:
                    self.seen.update(zip(arrays["keys"].tolist(), arrays["rows"], strict=True))
                self.read.add(path)
        return self.seen

    def _pictures(
        self, what: str, count: int, key: Callable[[slice], str], make: Callable[[slice], list[np.ndarray]]
    ) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        for start in range(0, count, CHUNK):
            rows = slice(start, start + CHUNK)
            path = self.folder / f"{key(rows)}.npz"
            if not path.exists():
                began = time.monotonic()
                made = np.stack(make(rows))
                self._count(what, len(made), time.monotonic() - began)
                atomic.write_with(path, lambda temporary, made=made: np.savez_compressed(temporary, pictures=made))
            with np.load(path) as arrays:
                found += list(arrays["pictures"])
        return found

    def _count(self, what: str, count: int, time_s: float) -> None:
        done, spent_s = self.spent.get(what, (0, 0.0))
        self.spent[what] = done + count, spent_s + time_s
        print(f"{what}: {done + count} at {(done + count) / (spent_s + time_s):.1f} a second", flush=True)


class Late:
    """A base that is loaded when it is first needed, which is never where all is kept already."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.base: Base | None = None

    def get(self) -> Base:
        self.base = self.base or load_base(self.where)
        return self.base


def fingerprint(where: str) -> str:
    """The digest of a base's weights and settings, wherever it lies."""
    folder = embedded_folder() if where == EMBEDDED else Path(where)
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
    return digest(
        *((path.relative_to(folder).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in paths)
    )


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def digest_pixels(pictures: Sequence[np.ndarray]) -> str:
    found = hashlib.sha256()
    for picture in pictures:
        found.update(f"{picture.shape}".encode() + np.ascontiguousarray(picture).tobytes())
    return found.hexdigest()
