"""Does the control steer? Held-out pairs and a generator in; figures, pictures and `evaluation.json` out.

Each hint is drawn with every seed, once with the control and once without it. The pictures are annotated again and
compared with the hint; so is the target after a trip through the autoencoder, which is the ceiling.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bridle.errors import DataError, SampleError
from bridle.evaluate.fidelity import TOLERANCE_PX
from bridle.evaluate.measures import Figures, choose_measures, measure
from bridle.evaluate.result import Evaluation, PairResult, SeedResult, compare, write_evaluation
from bridle.sample.picture import save_picture, settings_text

LIBRARIES = ("bridle", "torch", "diffusers", "transformers", "numpy", "opencv-python-headless", "pillow")


@dataclass(frozen=True, kw_only=True)
class HeldOutPair:
    """A pair that training never saw."""

    id: str
    image: np.ndarray
    """[H, W, 3] uint8, the target."""
    hint: np.ndarray
    """[H, W, K] uint8, what the annotator makes of the target, or the exact map that it estimates."""
    caption: str


class Annotator(Protocol):
    """Makes hints of pictures; the same picture gives the same hint as long as `rng` is None."""

    @property
    def name(self) -> str: ...

    @property
    def channels(self) -> int: ...

    def __call__(self, image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """[H, W, 3] uint8 to [H, W, K] uint8."""


class Generate(Protocol):
    """Draws one picture [H, W, 3] uint8 for each hint [H, W, K] uint8; scale 0.0 leaves the control out."""

    def __call__(
        self, hints: list[np.ndarray], captions: list[str], seeds: list[int], scale: float
    ) -> list[np.ndarray]: ...


class Reconstruct(Protocol):
    """Sends pictures [H, W, 3] uint8 through the base's autoencoder and back."""

    def __call__(self, images: list[np.ndarray]) -> list[np.ndarray]: ...


def evaluate(
    pairs: Sequence[HeldOutPair],
    annotator: Annotator,
    generate: Generate,
    reconstruct: Reconstruct,
    folder: Path,
    seeds: Sequence[int],
    scale: float = 1.0,
    tolerance_px: int = TOLERANCE_PX,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Measure how well pictures follow hints, and keep everything that was drawn.

    The condition, which is the annotator's name, says what decides (`measures.py`); SSIM is told beside it.

    Args:
        folder: `evaluation.json` and `pictures/` are written here.
        seeds: the noises to draw each pair with, the same for both arms.
        scale: the control's scale; the other arm has 0.0.
        settings: how the pictures were made; recorded as given.

    Raises:
        DataError: no pairs or no seeds, a repeated one, or a pair that does not fit the annotator.
        SampleError: a setting that JSON cannot hold, or pictures of another number or kind than were asked for.
        HintError: the annotated pictures are of another size than the hints.
    """
    _check(pairs, annotator, seeds)
    # Here, so that a bad setting fails before hours of drawing.
    recorded = json.loads(settings_text(settings or {}))
    names = choose_measures(annotator.name, [pair.hint for pair in pairs])
    measuring = _Measuring(annotator, names, tolerance_px, folder)
    results = _measure_all(pairs, measuring, generate, reconstruct, list(seeds), scale)
    evaluation = Evaluation(
        folder=folder,
        condition=annotator.name,
        measure=names[0],
        tolerance_px=tolerance_px,
        scale=scale,
        seeds=tuple(seeds),
        figures={name: compare(results, name) for name in names},
        pairs=results,
        settings=recorded,
        versions=_versions(),
    )
    write_evaluation(evaluation)
    return evaluation


@dataclass(frozen=True)
class _Measuring:
    """What every picture of one evaluation goes through: annotate, compare, keep."""

    annotator: Annotator
    names: tuple[str, ...]
    tolerance_px: int
    folder: Path

    def figures(self, hint: np.ndarray, image: np.ndarray) -> tuple[Figures, np.ndarray]:
        annotated = self.annotator(image, rng=None)
        return measure(self.names, hint, annotated, self.tolerance_px), annotated

    def keep(self, image: np.ndarray, index: int, kind: str, pair: HeldOutPair, **settings: Any) -> str:
        # Numbered, because an id may hold what a file name must not.
        name = f"pictures/{index:04d}-{kind}.png"
        settings = {"id": pair.id, "kind": kind, "prompt": pair.caption, **settings}
        save_picture(as_picture(image), self.folder / name, settings)
        return name


def as_picture(hint: np.ndarray) -> np.ndarray:
    """Make a map [H, W, K] uint8 visible as [H, W, 3]: one channel in grey, other numbers than three by the maximum."""
    if hint.shape[2] == 3:
        return hint
    return np.repeat(hint.max(axis=2, keepdims=True), 3, axis=2)


def _measure_all(
    pairs: Sequence[HeldOutPair],
    measuring: _Measuring,
    generate: Generate,
    reconstruct: Reconstruct,
    seeds: list[int],
    scale: float,
) -> tuple[PairResult, ...]:
    ceilings = _checked(reconstruct([pair.image for pair in pairs]), pairs, "the autoencoder")
    rows: list[list[SeedResult]] = [[] for _ in pairs]
    for seed in seeds:
        control, without = _draw(generate, pairs, seed, scale), _draw(generate, pairs, seed, 0.0)
        for index, pair in enumerate(pairs):
            rows[index].append(_seed_result(measuring, index, pair, seed, scale, control[index], without[index]))
    return tuple(
        _pair_result(measuring, index, pair, ceilings[index], tuple(rows[index])) for index, pair in enumerate(pairs)
    )


def _draw(generate: Generate, pairs: Sequence[HeldOutPair], seed: int, scale: float) -> list[np.ndarray]:
    hints, captions = [pair.hint for pair in pairs], [pair.caption for pair in pairs]
    return _checked(generate(hints, captions, [seed] * len(pairs), scale), pairs, "the generator")


def _seed_result(
    measuring: _Measuring,
    index: int,
    pair: HeldOutPair,
    seed: int,
    scale: float,
    control: np.ndarray,
    without: np.ndarray,
) -> SeedResult:
    with_figures, annotated = measuring.figures(pair.hint, control)
    without_figures, _ = measuring.figures(pair.hint, without)
    return SeedResult(
        seed=seed,
        control=with_figures,
        without=without_figures,
        control_picture=measuring.keep(control, index, f"control-{seed}", pair, seed=seed, scale=scale),
        without_picture=measuring.keep(without, index, f"without-{seed}", pair, seed=seed, scale=0.0),
        annotated_picture=measuring.keep(annotated, index, f"annotated-{seed}", pair, seed=seed, scale=scale),
    )


def _pair_result(
    measuring: _Measuring, index: int, pair: HeldOutPair, ceiling: np.ndarray, seeds: tuple[SeedResult, ...]
) -> PairResult:
    return PairResult(
        id=pair.id,
        caption=pair.caption,
        ceiling=measuring.figures(pair.hint, ceiling)[0],
        seeds=seeds,
        hint_picture=measuring.keep(pair.hint, index, "hint", pair),
        target_picture=measuring.keep(pair.image, index, "target", pair),
        ceiling_picture=measuring.keep(ceiling, index, "ceiling", pair),
    )


def _check(pairs: Sequence[HeldOutPair], annotator: Annotator, seeds: Sequence[int]) -> None:
    if not pairs or not seeds:
        raise DataError(f"{len(pairs)} pairs and {len(seeds)} seeds to evaluate; expected at least one of each")
    counted = {**Counter(f"pair {pair.id}" for pair in pairs), **Counter(f"seed {seed}" for seed in seeds)}
    for name, count in counted.items():
        if count > 1:
            raise DataError(f"{name} is given {count} times and would count as often; give it once")
    for pair in pairs:
        expected = (*pair.image.shape[:2], annotator.channels)
        if pair.image.dtype != np.uint8 or pair.image.ndim != 3 or pair.image.shape[2] != 3:
            raise DataError(
                f"pair {pair.id}: image is {pair.image.dtype} {list(pair.image.shape)}; expected uint8 [H, W, 3]"
            )
        if pair.hint.dtype != np.uint8 or pair.hint.shape != expected:
            kind = f"{pair.hint.dtype} {list(pair.hint.shape)}"
            raise DataError(f"pair {pair.id}: hint is {kind}; expected uint8 {list(expected)} from {annotator.name}")


def _checked(images: list[np.ndarray], pairs: Sequence[HeldOutPair], maker: str) -> list[np.ndarray]:
    if len(images) != len(pairs):
        raise SampleError(f"{maker} gave {len(images)} pictures; expected {len(pairs)}, one for each pair")
    for image, pair in zip(images, pairs, strict=True):
        if image.dtype != np.uint8 or image.shape != pair.image.shape:
            kind = f"{image.dtype} {list(image.shape)}"
            raise SampleError(f"{maker} gave {kind} for pair {pair.id}; expected uint8 {list(pair.image.shape)}")
    return images


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # bridle run from its source tree, or a base without transformers
            continue
    return found
