"""`bridle sample` and `bridle annotate`: files in, PNG files out."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bridle.base.load import load_base
from bridle.data.annotate import get_annotator
from bridle.data.picture import read_hint, read_picture
from bridle.data.transforms import CENTER, fit_hint, fit_image
from bridle.errors import SampleError
from bridle.files.weights import load_control
from bridle.sample.picture import save_picture
from bridle.sample.sampler import generate, set_scheduler
from bridle.sample.settings import SampleSettings


def sample_to_files(
    prompt: str,
    control: Path | None,
    hint: Path | None,
    image: Path | None,
    annotator: str,
    base: str,
    how: SampleSettings,
    seeds: Sequence[int],
    out: Path,
) -> list[Path]:
    """Draw one picture per seed and write each as a PNG that carries its settings.

    Raises: SampleError: a control without a hint, a hint without a control, or two hints.
    """
    check_request(control, hint, image)
    model = load_base(base, device="auto")
    steering = load_control(control, device=str(model.device)) if control is not None else None
    hints = [make_hint(hint, image, annotator, model.size_px)] * len(seeds) if steering is not None else []
    pictures = generate(model, steering, hints, [prompt] * len(seeds), list(seeds), how)
    sampler = set_scheduler(model, how.scheduler)
    paths = [out] if len(seeds) == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
    for path, picture, seed in zip(paths, pictures, seeds, strict=True):
        made = {
            "prompt": prompt,
            "seed": seed,
            "sampler": sampler,
            "base": model.name,
            **dataclasses.asdict(how),
        }
        given = {"control": control, "hint": hint, "image": image, "annotator": annotator if image else None}
        save_picture(picture, path, made | {name: str(value) for name, value in given.items() if value})
    return paths


def check_request(control: Path | None, hint: Path | None, image: Path | None) -> None:
    if control is None and (hint or image):
        raise SampleError(f"hint {hint or image} was given without a control; add --control RUN/control")
    if control is not None and (hint is None) == (image is None):
        raise SampleError("a control needs one hint; give --hint EDGES.png, or --image PICTURE with --annotator")


def make_hint(hint: Path | None, image: Path | None, annotator: str, size_px: int) -> np.ndarray:
    """The hint at the base's size: read as it is, or made from a picture. Returns: [H, W, K] uint8."""
    if hint is not None:
        return fit_hint(read_hint(hint), size_px, CENTER)
    assert image is not None
    return get_annotator(annotator)(fit_image(read_picture(image), size_px, CENTER), None)


def annotate_file(image: Path, out: Path, annotator: str) -> None:
    """Make a hint of a picture file, at the picture's own size."""
    made = get_annotator(annotator)(read_picture(image), None)
    save_picture(made[..., :3], out, {"image": str(image), "annotator": annotator})
