"""What a write promises: the old file or the new one, never a part, and nothing left beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bridle.atomic import write_bytes, write_folder, write_text, write_with


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    write_bytes(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_with(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_being_written_lies_beside_the_old_one_with_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "new" / "picture.png"
    seen: list[Path] = []
    write_with(path, lambda temporary: (seen.append(temporary), temporary.write_bytes(b"new")))
    assert (seen[0].parent, seen[0].suffix) == (path.parent, ".png")
    assert seen[0] != path
    assert path.read_bytes() == b"new"


def test_text_is_utf8_with_its_own_line_ends_in_every_locale(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    code = (
        "import pathlib, sys; from bridle import atomic; atomic.write_text(pathlib.Path(sys.argv[1]), '\\xe9\\r\\n\\n')"
    )
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(path)], env=os.environ | locale, check=True)
    assert path.read_bytes() == "é\r\n\n".encode()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt", "text")
    assert (tmp_path / "text.txt").stat().st_mode & 0o777 == 0o644


def test_a_folder_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    def fill(temporary: Path) -> None:
        (temporary / "one.txt").write_text("new")

    def fail(temporary: Path) -> None:
        fill(temporary)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(tmp_path / "folder", fail)
    assert list(tmp_path.iterdir()) == []
    write_folder(tmp_path / "folder", fill)
    assert (tmp_path / "folder" / "one.txt").read_text() == "new"
    with pytest.raises(OSError, match="folder"):
        write_folder(tmp_path / "folder", fill)  # it is no longer empty
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
