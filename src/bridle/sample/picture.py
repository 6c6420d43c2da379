"""Pictures that carry their settings, and sheets of them: uint8 arrays in, PNG files and one large array out.

A picture keeps everything needed to make it again in two text chunks of its PNG: `bridle`, all settings as JSON, and
`parameters`, the short form that other tools show beside a picture.
"""

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from bridle.atomic import write_with
from bridle.errors import SampleError

CHUNK = "bridle"
SHOWN = {"Steps": "steps", "Sampler": "sampler", "CFG scale": "guidance", "Seed": "seed"}

CELL_PX = 256  # smaller pictures are enlarged, so that the titles over them stay readable
GAP_PX = 12
MARGIN_PX = 28
TITLE_PX = 19
CAPTION_PX = 17
GROUND = (250, 250, 248)
INK = (28, 30, 34)
QUIET = (92, 97, 105)
FRAME = (218, 219, 216)  # sets a white picture off from the ground


def save_picture(image: np.ndarray, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a picture as PNG, with the settings that made it.

    Args:
        image: [H, W, 3] uint8.
        path: an existing file is replaced in one move.
        settings: plain values; `prompt`, `negative_prompt`, `steps`, `sampler`, `guidance` and `seed` are
            also written in the form that other tools show.

    Raises: SampleError: the picture has another shape or type, or a setting cannot be written as JSON.
    """
    _check(image)
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(CHUNK, settings_text(settings))
    chunks.add_text("parameters", _parameters(settings, image))
    write_with(path, lambda temporary: Image.fromarray(image).save(temporary, "PNG", pnginfo=chunks))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_picture` wrote into a picture. The pixels are not decoded.

    Raises: SampleError: the file is missing, is no PNG, or carries no settings of ours.
    """
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            text = picture.info.get(CHUNK)
    except FileNotFoundError:
        raise SampleError(f"picture {path} does not exist; give the path of a PNG made by bridle") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"picture {path} cannot be read as PNG ({error}); give one made by bridle") from None
    if text is None:
        raise SampleError(f"picture {path} carries no settings; expected a PNG made by bridle, not edited since")
    return _parse(text, path)


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as JSON. Raises: SampleError: a value is not a plain one."""
    for key, value in settings.items():
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as error:
            raise SampleError(
                f"setting {key} is {value!r}, which JSON cannot hold ({error}); pass a plain value"
            ) from None
    return json.dumps(dict(settings), ensure_ascii=False)


def grid(
    rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], captions: Sequence[str] | None = None
) -> np.ndarray:
    """Lay pictures out as a titled contact sheet on a light ground.

    Args:
        rows: pictures [H, W, 3] uint8, all of one size, as many in each row as there are columns.
        columns: a title for each column; cut short where it does not fit.
        captions: a line above each row, or None for none.

    Returns: [H', W', 3] uint8.
    Raises: SampleError: no rows, rows of different length, or pictures of different size.
    """
    _check_rows(rows, columns, captions)
    height, width = rows[0][0].shape[:2]
    factor = max(1.0, CELL_PX / width)
    cell_w, cell_h = round(width * factor), round(height * factor)
    line = GAP_PX + CAPTION_PX + GAP_PX // 2 if captions is not None else 0
    left = [MARGIN_PX + index * (cell_w + GAP_PX) for index in range(len(columns))]
    first = MARGIN_PX + TITLE_PX + GAP_PX
    top = [first + line + index * (cell_h + GAP_PX + line) for index in range(len(rows))]
    sheet = Image.new("RGB", (left[-1] + cell_w + MARGIN_PX, top[-1] + cell_h + MARGIN_PX), GROUND)
    draw = ImageDraw.Draw(sheet)
    for x, title in zip(left, columns, strict=True):
        _write(draw, (x, MARGIN_PX), title, TITLE_PX, INK, cell_w)
    for y, caption in zip(top, captions or (), strict=captions is not None):
        _write(draw, (left[0], y - CAPTION_PX - GAP_PX // 2), caption, CAPTION_PX, QUIET, sheet.width - 2 * MARGIN_PX)
    for y, row in zip(top, rows, strict=True):
        for x, picture in zip(left, row, strict=True):
            draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline=FRAME)
            sheet.paste(Image.fromarray(picture).resize((cell_w, cell_h), Image.Resampling.BICUBIC), (x, y))
    return np.asarray(sheet)


def _parameters(settings: Mapping[str, Any], image: np.ndarray) -> str:
    lines = [str(settings.get("prompt", ""))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    facts = [f"{shown}: {settings[key]}" for shown, key in SHOWN.items() if key in settings]
    return "\n".join([*lines, ", ".join([*facts, f"Size: {image.shape[1]}x{image.shape[0]}"])])


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"the settings in picture {path} are damaged ({error}); use the original file") from None
    if not isinstance(settings, dict):
        raise SampleError(f"the settings in picture {path} are {settings!r}; expected a table, use the original file")
    return settings


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SampleError(f"picture is {image.dtype} {list(image.shape)}; expected uint8 [H, W, 3]")


def _check_rows(rows: Sequence[Sequence[np.ndarray]], columns: Sequence[str], captions: Sequence[str] | None) -> None:
    if not rows or not columns:
        raise SampleError("a sheet needs at least one row and one column of pictures; none were given")
    if captions is not None and len(captions) != len(rows):
        raise SampleError(f"{len(captions)} captions for {len(rows)} rows; give one for each row, or None")
    for index, row in enumerate(rows):
        if len(row) != len(columns):
            raise SampleError(f"row {index} holds {len(row)} pictures; expected {len(columns)}, one for each title")
        for picture in row:
            _check(picture)
            if picture.shape != rows[0][0].shape:
                sizes = f"{list(picture.shape)} beside {list(rows[0][0].shape)}"
                raise SampleError(f"row {index} holds pictures of different size: {sizes}; resize them first")


def _write(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size_px: int, ink: tuple[int, int, int], width_px: int
) -> None:
    """One line of text, cut short with an ellipsis where it is too wide."""
    font = ImageFont.load_default(size=size_px)
    text = " ".join(text.split())  # a line break would run into the pictures below
    if draw.textlength(text[:width_px], font) > width_px or len(text) > width_px:
        counts = range(min(len(text), width_px) + 1)
        fits = bisect_right(counts, width_px, key=lambda count: draw.textlength(text[:count] + "…", font)) - 1
        text = text[: max(fits, 0)].rstrip() + "…"
    draw.text(at, text, ink, font)
