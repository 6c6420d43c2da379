"""Files in, PNG files out: pictures that say how they were made, and requests that cannot be met."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import Done
from tiny import SIZE_PX, make_hint

from bridle.data.annotate import get_annotator
from bridle.errors import DataError, FileError, SampleError
from bridle.run.sampling import annotate_file, sample_to_files
from bridle.run.sampling import make_hint as hint_of
from bridle.sample.picture import read_settings
from bridle.sample.settings import SampleSettings

HOW = SampleSettings(steps=2, guidance=2.0)


@pytest.fixture
def hint(tmp_path: Path) -> Path:
    Image.fromarray(make_hint(size_px=2 * SIZE_PX)).save(tmp_path / "hint.png")
    return tmp_path / "hint.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def draw(done: Done, out: Path, **changes: Any) -> list[Path]:
    request: dict[str, Any] = {
        "control": done.run.folder / "control",
        "hint": None,
        "image": None,
        "annotator": "canny",
        "base": done.settings.base,
        "how": HOW,
        "seeds": [7],
    }
    return sample_to_files("a red disc", out=out, **(request | changes))


def test_a_picture_carries_all_that_is_needed_to_draw_it_again(done: Done, hint: Path, tmp_path: Path) -> None:
    (path,) = draw(done, tmp_path / "first.png", hint=hint)
    made = read_settings(path)
    assert (made["prompt"], made["seed"], made["base"]) == ("a red disc", 7, done.settings.base)
    how = SampleSettings(**{field.name: made[field.name] for field in fields(SampleSettings)})
    files = {"control": Path(made["control"]), "hint": Path(made["hint"]), "base": made["base"]}
    (again,) = draw(done, tmp_path / "again.png", how=how, seeds=[made["seed"]], **files)
    assert pixels(path).shape == (SIZE_PX, SIZE_PX, 3)
    assert np.array_equal(pixels(path), pixels(again))


def test_each_of_several_pictures_is_the_one_that_its_seed_gives_alone(done: Done, hint: Path, tmp_path: Path) -> None:
    several = draw(done, tmp_path / "disc.png", hint=hint, seeds=range(6, 8))
    assert [path.name for path in several] == ["disc-6.png", "disc-7.png"]
    assert [read_settings(path)["seed"] for path in several] == [6, 7]
    (alone,) = draw(done, tmp_path / "alone.png", hint=hint)
    difference = np.abs(pixels(several[1]).astype(int) - pixels(alone))
    assert difference.max() <= 1  # a batch rounds otherwise
    assert np.abs(pixels(several[0]).astype(int) - pixels(alone)).max() > 1


def test_without_a_control_no_hint_is_asked_for(done: Done, tmp_path: Path) -> None:
    (path,) = draw(done, tmp_path / "free.png", control=None)
    assert read_settings(path).keys() & {"control", "hint", "image", "annotator"} == set()


def test_the_hint_of_a_picture_is_what_the_annotator_makes_of_it_at_the_bases_size(pictures: Path) -> None:
    made = hint_of(None, pictures / "3.png", "canny", SIZE_PX)
    assert made.any()
    assert np.array_equal(made, get_annotator("canny")(pixels(pictures / "3.png")))


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        ({"hint": None}, SampleError, "a control needs one hint; give --hint"),
        ({"hint": Path("a.png"), "image": Path("b.png")}, SampleError, "a control needs one hint"),
        ({"hint": Path("a.png"), "control": None}, SampleError, "a.png was given without a control; add --control"),
        ({"hint": Path("missing.png")}, DataError, "missing.png: .*no such file"),
        ({"hint": Path("a.png"), "control": Path("nowhere")}, FileError, "nowhere has no config.json"),
    ],
)
def test_a_request_that_cannot_be_met_says_why_and_writes_nothing(
    done: Done, tmp_path: Path, request_: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        draw(done, tmp_path / "out.png", **request_)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["canny", "soft_edge", "scribble"])
def test_annotating_a_file_writes_the_hint_at_the_pictures_own_size(pictures: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "made" / "hint.png"
    annotate_file(pictures / "5.png", out, name)
    assert np.array_equal(pixels(out), get_annotator(name)(pixels(pictures / "5.png")))
    assert read_settings(out) == {"image": str(pictures / "5.png"), "annotator": name}
