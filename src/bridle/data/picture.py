"""One file in, [H, W, 3] uint8 RGB out. Whatever is wrong with the file ends as one DataError with the reason."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bridle.data.example import Pixels
from bridle.errors import DataError

MAX_MEGAPIXELS = 64  # a picture of this size takes 200 MB once decoded; a file of 20 kB can declare it
# A closed list: Pillow would otherwise hand some formats (EPS) to outside programs. JPEG opens MPO, which phones write.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_DEEP_GREY = ("I;16", "I;16B", "I;16L", "I")  # how Pillow's versions name a 16-bit greyscale PNG
_WHITE = (255, 255, 255, 255)


def read_picture(path: Path) -> Pixels:
    """Decode a still picture, upright as its EXIF orientation says, transparency over white.

    Returns: [H, W, 3] uint8, RGB.
    Raises: DataError: the file is missing, damaged, too large, moving, or of another format.
    """
    return _read(path, see_through=True)


def read_hint(path: Path) -> Pixels:
    """As `read_picture`, but transparent pixels are an error: white lines over white would be an empty hint.

    Raises: DataError: as `read_picture`, or a pixel is transparent.
    """
    return _read(path, see_through=False)


def _read(path: Path, see_through: bool) -> Pixels:
    try:
        with warnings.catch_warnings():
            # Pillow only warns from 89 megapixels on, and before we can look at the size ourselves.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as picture:
                _check_header(picture)
                return _to_rgb(ImageOps.exif_transpose(picture), see_through)
    except DataError as error:
        raise DataError(f"{path.name}: {error}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"{path.name}: above {MAX_MEGAPIXELS} megapixels; shrink it") from None
    except Exception as error:  # a damaged file makes Pillow raise anything: OSError, struct.error, SyntaxError, ...
        raise DataError(f"{path.name}: cannot be read as PNG, JPEG, WebP or BMP ({_brief(error)})") from None


def _check_header(picture: Image.Image) -> None:
    megapixels = picture.width * picture.height / 1e6
    if megapixels > MAX_MEGAPIXELS:
        raise DataError(f"{megapixels:.0f} megapixels, expected at most {MAX_MEGAPIXELS}; shrink it")
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise DataError("a moving picture; expected a still one: save a single frame")


def _to_rgb(picture: Image.Image, see_through: bool) -> Pixels:
    if picture.mode in _DEEP_GREY:
        picture = _scale(picture)
    if picture.has_transparency_data:
        picture = _over_white(picture.convert("RGBA"), see_through)
    return np.array(picture.convert("RGB"))


def _scale(picture: Image.Image) -> Image.Image:
    """16-bit grey with 8 bits: convert("RGB") would clip at 255, and pass over the grey that stands for transparent."""
    deep = np.asarray(picture)
    grey = Image.fromarray(np.rint(deep.astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
    if "transparency" in picture.info:
        grey.putalpha(Image.fromarray(np.where(deep == picture.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _over_white(picture: Image.Image, see_through: bool) -> Image.Image:
    if not see_through and np.asarray(picture)[..., 3].min() < 255:
        raise DataError("the hint has transparent pixels; expected an opaque one: save it over its background colour")
    return Image.alpha_composite(Image.new("RGBA", picture.size, _WHITE), picture)


def _brief(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
