"""`bridle sample` and `bridle annotate`: files in, PNG files out."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from bridle.base.base import Base
from bridle.base.load import load_base, pick_device
from bridle.control.control import Control
from bridle.data.annotate import get_annotator
from bridle.data.picture import read_hint, read_picture
from bridle.errors import SampleError
from bridle.files.weights import load_control
from bridle.kernels.precision import TYPES, choose_precision
from bridle.run.recipes import digest, settle_annotators
from bridle.sample.picture import save_picture
from bridle.sample.recipe import ControlRecipe, Recipe, to_table
from bridle.sample.sampler import generate
from bridle.sample.scheduler import set_scheduler
from bridle.sample.steering import Init, Steering

Size = tuple[int, int]  # height and width


def sample_to_files(recipe: Recipe, out: Path, count: int = 1) -> list[Path]:
    """Draw pictures with seeds one after another, and write each as a PNG that carries its recipe.

    Raises: SampleError, DataError, HintError, BaseError, FileError: the recipe asks for what is not there.
    """
    check_out(out)
    recipe = settle_annotators(recipe)
    device = torch.device(pick_device("auto"))
    precision = choose_precision(recipe.precision, device)
    recipe = dataclasses.replace(recipe, precision=precision)
    controls = [load_control(one.file, base=recipe.base) for one in recipe.controls]
    exact = any(control.base_delta for control in controls)  # what an unlocked base has learned, 16 bits would lose
    dtype = torch.float32 if exact else TYPES[precision]
    model = load_base(recipe.base, device=str(device), dtype=dtype)
    size = recipe.height_px or model.size_px, recipe.width_px or model.size_px
    asked = zip(recipe.controls, controls, strict=True)
    steering = {
        f"{place} ({one.file})": steer(one, control.to(device, model.denoiser.dtype), size)
        for place, (one, control) in enumerate(asked, 1)
    }
    init = read_init(recipe, size)
    warn_of_cuts(recipe, model)
    seeds = range(recipe.seed, recipe.seed + count)
    paths = [out] if count == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
    negative, facts = [recipe.negative_prompt], describe(recipe, model)
    for path, seed in zip(paths, seeds, strict=True):  # one at a time: a batch rounds the same picture otherwise
        drawn = generate(
            model, steering, [], [recipe.prompt], [seed], recipe.settings, size, negative_prompts=negative, init=init
        )
        made = to_table(dataclasses.replace(recipe, seed=seed))
        save_picture(drawn[0], path, {**facts, "seed": seed, "recipe": made})
    return paths


def check_out(out: Path) -> None:
    """Raises: SampleError: no picture can be written there; better known before it is drawn."""
    if out.is_dir():
        raise SampleError(f"picture would be written to {out}, which is a folder; give the name of a file in it")
    if out.suffix.lower() != ".png":
        raise SampleError(f"picture would be written to {out}; expected a name that ends on .png, which keeps a recipe")
    if any(parent.is_file() for parent in out.parents):
        raise SampleError(f"picture would be written to {out}, which lies beneath a file; give another path")


def warn_of_cuts(recipe: Recipe, model: Base) -> None:
    """One line on stderr for a prompt that is longer than the base reads."""
    asked = {"prompt": recipe.prompt, "negative prompt": recipe.negative_prompt}
    for (name, _), count in zip(asked.items(), model.count_tokens(list(asked.values())), strict=True):
        if count > model.max_tokens:
            cut = f"longer than {model.max_tokens} tokens; the rest is cut off, as the base does"
            print(f"bridle: {name} is {cut}", file=sys.stderr)


def describe(recipe: Recipe, model: Base) -> dict[str, Any]:
    """What a picture says of itself beside its recipe: for other tools, and to see what it was drawn from."""
    return {
        "prompt": recipe.prompt,
        "negative_prompt": recipe.negative_prompt,
        "sampler": set_scheduler(model, recipe.scheduler),
        "base": model.name,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
        "sha256": {str(path): digest(path) for path in recipe.files},
    }


def steer(one: ControlRecipe, control: Control, size: Size) -> Steering:
    """A control with its hint and mask, read from their files."""
    hint = make_hint(one.hint, one.image, one.annotator, size)
    # Files are read as RGB, grey ones as three equal channels.
    if control.hint_channels == 1 and (hint == hint[..., :1]).all():
        hint = hint[..., :1]
    mask = read_mask(one.mask, size) if one.mask is not None else None
    return Steering(control=control, hints=[hint], strength=one.strength, mask=mask)


def read_init(recipe: Recipe, size: Size) -> Init | None:
    if recipe.init is None:
        return None
    image = fit(read_picture(recipe.init), size, cv2.INTER_CUBIC)
    mask = read_mask(recipe.mask, size) if recipe.mask is not None else None
    return Init(image=image, strength=recipe.strength, mask=mask)


def read_mask(path: Path, size: Size) -> np.ndarray:
    """A picture's brightness as a mask: [H, W] uint8."""
    grey = np.asarray(Image.fromarray(read_hint(path)).convert("L"))
    return fit(grey[..., None], size, cv2.INTER_NEAREST_EXACT)[..., 0]


def make_hint(hint: Path | None, image: Path | None, annotator: str | None, size: Size) -> np.ndarray:
    """The hint at the picture's size: read as it is, or made from a picture. Returns: [H, W, K] uint8."""
    if hint is not None:
        return fit(read_hint(hint), size, cv2.INTER_NEAREST_EXACT)
    assert image is not None
    assert annotator is not None
    return get_annotator(annotator)(fit(read_picture(image), size, cv2.INTER_CUBIC), None)


def fit(pixels: np.ndarray, size: Size, enlarge: int) -> np.ndarray:
    """Cut the middle in the size's shape and resize it; to a square it is what training does to its pairs.

    Args:
        pixels: [H, W, K] uint8.
        enlarge: how cv2 is to enlarge; it shrinks by area averages.
    """
    (height, width), (to_h, to_w) = pixels.shape[:2], size
    cut_h, cut_w = min(height, max(1, round(width * to_h / to_w))), min(width, max(1, round(height * to_w / to_h)))
    top, left = round((height - cut_h) / 2), round((width - cut_w) / 2)
    cut = np.ascontiguousarray(pixels[top : top + cut_h, left : left + cut_w])
    if (cut_h, cut_w) == size:
        return cut
    how = cv2.INTER_AREA if cut_h > to_h else enlarge
    return np.asarray(cv2.resize(cut, (to_w, to_h), interpolation=how), np.uint8).reshape(to_h, to_w, -1)


def annotate_file(image: Path, out: Path, annotator: str) -> None:
    """Make a hint of a picture file, at the picture's own size. Raises: SampleError: it cannot be written there."""
    check_out(out)
    made = get_annotator(annotator)(read_picture(image), None)
    save_picture(made[..., :3], out, {"image": str(image), "annotator": annotator})
