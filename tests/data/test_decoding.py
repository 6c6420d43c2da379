"""Every kind of file becomes RGB bytes, or one DataError with the reason."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bridle.data.picture import read_hint, read_picture
from bridle.errors import DataError


def write_bomb(path: Path, side_px: int) -> Path:
    """A PNG of some bytes whose header declares a picture of side_px squared."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


# Above our limit; where Pillow starts to warn; where it raises.
@pytest.mark.parametrize("side_px", [8_100, 10_000, 30_000])
def test_a_bomb_is_rejected_by_its_header(side_px: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"bomb\.png: .*megapixels"):  # decoding would have said "truncated"
        read_picture(write_bomb(tmp_path / "bomb.png", side_px))


def test_every_damaged_or_foreign_file_is_one_clear_error(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    Image.new("RGB", (8, 8)).save(tmp_path / "tiff.png", format="TIFF")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    for name in ("tiff.png", "cut.jpg", "empty.png", "text.png", "moving.webp", "gone.png"):
        with pytest.raises(DataError, match=name):
            read_picture(tmp_path / name)


def test_pictures_stand_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste("white", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top of the scene is at the right of the file
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = read_picture(tmp_path / "turned.png")
    assert pixels.shape == (20, 10, 3)
    assert pixels[:10].min() == 255
    assert pixels[10:].max() == 0


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    deep = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png")[0, :, 1], [0, 1, 128, 255])


def test_the_grey_that_stands_for_transparent_may_have_sixteen_bits(tmp_path: Path) -> None:
    deep = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16))
    deep.save(tmp_path / "deep.png", transparency=257)
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png")[0, :, 1], [0, 255, 128, 255])
    with pytest.raises(DataError, match="transparent"):
        read_hint(tmp_path / "deep.png")


def test_transparency_lies_over_white_in_every_mode(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    picture.putpixel((1, 0), (0, 0, 0, 0))
    picture.save(tmp_path / "rgba.png")
    picture.quantize().save(tmp_path / "palette.png")
    Image.merge("LA", (Image.new("L", (2, 1), 200), picture.getchannel("A"))).save(tmp_path / "grey.png")
    for name, left in (("rgba.png", [200, 0, 0]), ("palette.png", [200, 0, 0]), ("grey.png", [200] * 3)):
        np.testing.assert_array_equal(read_picture(tmp_path / name), [[left, [255] * 3]], err_msg=name)
        with pytest.raises(DataError, match="transparent"):
            read_hint(tmp_path / name)
    picture.putalpha(255)
    picture.save(tmp_path / "opaque.png")
    assert read_hint(tmp_path / "opaque.png")[0, 1].max() == 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "mpo"])
def test_every_format_that_is_promised_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"red.{ending}"
    Image.new("RGB", (16, 16), (200, 40, 40)).save(path)
    assert np.abs(read_picture(path).astype(int) - (200, 40, 40)).max() < 8  # what lossy formats may change
