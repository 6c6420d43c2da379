"""Files in, PNG files out: pictures that say how they were made, and requests that cannot be met."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from small_run import Done
from tiny import SIZE_PX, TOKENS, make_hint, wake

from bridle import config
from bridle.control.control import Control
from bridle.control.strength import Strength
from bridle.data.annotate import get_annotator
from bridle.data.transforms import fit_hint, fit_image
from bridle.errors import ConfigError, DataError, FileError, HintError, SampleError
from bridle.files.convert import convert
from bridle.files.weights import load_control, save_control
from bridle.kernels.precision import choose_precision
from bridle.run.recipes import read_recipe, warn_of_annotators, warn_of_changes
from bridle.run.sampling import annotate_file, fit, sample_to_files, steer
from bridle.run.sampling import make_hint as hint_of
from bridle.sample.picture import read_settings, save_picture
from bridle.sample.recipe import ControlRecipe, Recipe, to_table

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 asks to be changed.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLAGS = {"prompt": "a red disc", "steps": 2, "guidance": 2.0, "seed": 7}


@pytest.fixture
def hint(tmp_path: Path) -> Path:
    Image.fromarray(make_hint(size_px=2 * SIZE_PX)).save(tmp_path / "hint.png")
    return tmp_path / "hint.png"


@pytest.fixture(scope="module")
def strong(done: Done, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control that pulls, as after four steps of training it hardly does."""
    folder = tmp_path_factory.mktemp("strong")
    save_control(wake(load_control(done.run.folder / "control")), folder)
    return folder


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def draw(done: Done, out: Path, count: int = 1, **changes: Any) -> list[Path]:
    """By flags alone, as `bridle sample` hands them over."""
    flags = {**FLAGS, "base": done.settings.base, "control": done.run.folder / "control", **changes}
    return sample_to_files(read_recipe(None, None, flags), out, count)


def test_a_prompt_that_is_cut_is_told_in_one_line(done: Done, hint: Path, tmp_path: Path, capsys: Any) -> None:
    draw(done, tmp_path / "short.png", hint=hint)
    assert "longer than" not in capsys.readouterr().err
    draw(done, tmp_path / "long.png", hint=hint, prompt="a red disc on a white wall", count=2)
    told = [line for line in capsys.readouterr().err.splitlines() if "longer than" in line]
    assert told == [f"bridle: prompt is longer than {TOKENS} tokens; the rest is cut off, as the base does"]


def full(done: Done, strong: Path, hint: Path, folder: Path) -> dict[str, Any]:
    """A recipe with everything in it."""
    region = np.zeros((SIZE_PX, 2 * SIZE_PX), np.uint8)
    region[:, :SIZE_PX] = 255
    Image.fromarray(region).save(folder / "left.png")
    return {
        "prompt": 'a "red" disc',
        "negative_prompt": "blur",
        "seed": 3,
        "base": done.settings.base,
        "width_px": 2 * SIZE_PX,
        "height_px": SIZE_PX,
        "steps": 4,
        "guidance": 3.0,
        "scheduler": "euler",
        "init": str(hint),
        "strength": 0.8,
        "mask": str(folder / "left.png"),
        "controls": [
            {"file": str(strong), "hint": str(hint), "scale": 0.8, "end": 0.7, "mask": str(folder / "left.png")},
            {"file": str(strong), "image": str(hint), "annotator": "soft_edge", "guess": "official"},
            {"file": str(strong), "hint": str(hint), "weights": [0.5] * 13, "keyframes": [[0, 1], [0.6, 0.2]]},
        ],
    }


def test_a_picture_is_drawn_again_from_itself_bit_for_bit(done: Done, strong: Path, hint: Path, tmp_path: Path) -> None:
    (tmp_path / "all.json").write_text(json.dumps(full(done, strong, hint, tmp_path)))
    recipe = read_recipe(tmp_path / "all.json", None, {})
    (first,) = sample_to_files(recipe, tmp_path / "first.png")
    redone = read_recipe(None, first, {})
    assert redone.precision == choose_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert redone == replace(recipe, precision=redone.precision)  # what "auto" was here, so that it is so elsewhere
    (again,) = sample_to_files(redone, tmp_path / "again.png")
    kept = fit(pixels(hint), (SIZE_PX, 2 * SIZE_PX), cv2.INTER_CUBIC)[:, SIZE_PX:]
    assert np.array_equal(pixels(first)[:, SIZE_PX:], kept)  # the mask is white on the left
    assert np.array_equal(pixels(first), pixels(again))
    assert read_settings(first) == read_settings(again)
    for change in ("controls.2.scale=0", "controls.1.guess=paper", "controls.0.end=1.0", "seed=4", "strength=0.4"):
        (other,) = sample_to_files(read_recipe(None, first, {}, [change]), tmp_path / "other.png")
        assert not np.array_equal(pixels(first), pixels(other)), change


def test_toml_json_and_flags_say_the_same(done: Done, strong: Path, hint: Path, tmp_path: Path) -> None:
    flags = {**FLAGS, "control": strong, "hint": hint, "scale": 0.5}
    table = {**FLAGS, "controls": [{"file": str(strong), "hint": str(hint), "scale": 0.5}]}
    (tmp_path / "a.json").write_text(json.dumps(table))
    lines = [f"{name} = {json.dumps(value)}" for name, value in FLAGS.items()]
    lines += ["[[controls]]", f"file = {json.dumps(str(strong))}", f"hint = {json.dumps(str(hint))}", "scale = 0.5"]
    (tmp_path / "a.toml").write_text("\n".join(lines))
    asked = read_recipe(None, None, flags)
    assert read_recipe(tmp_path / "a.json", None, {}) == read_recipe(tmp_path / "a.toml", None, {}) == asked


def test_flags_change_a_recipe_and_overrides_have_the_last_word(strong: Path, hint: Path) -> None:
    asked = read_recipe(None, None, {**FLAGS, "control": strong, "hint": hint}, ["controls.0.start=0.2"])
    assert (asked.steps, asked.controls[0].start) == (2, 0.2)
    changed = config.build(Recipe, to_table(asked))
    assert changed == asked
    (halved,) = read_recipe(None, None, {**FLAGS, "control": strong, "hint": hint, "half": "conditional"}).controls
    assert halved.strength == Strength(half="conditional")
    with_picture = read_recipe(None, None, {**FLAGS, "control": strong, "image": hint, "seed": 1}, ["seed=2"])
    assert (with_picture.controls[0].hint, with_picture.controls[0].image, with_picture.seed) == (None, hint, 2)


def test_a_new_hint_takes_the_place_of_the_picture_that_a_hint_was_made_of(
    done: Done, hint: Path, tmp_path: Path
) -> None:
    (path,) = draw(done, tmp_path / "first.png", image=hint, annotator="scribble")
    (control,) = read_recipe(None, path, {"hint": tmp_path / "new.png"}).controls
    assert (control.hint, control.image, control.file) == (tmp_path / "new.png", None, done.run.folder / "control")


def test_each_of_several_pictures_is_the_one_that_its_seed_gives_alone(done: Done, hint: Path, tmp_path: Path) -> None:
    several = draw(done, tmp_path / "disc.png", count=2, hint=hint, seed=6)
    assert [path.name for path in several] == ["disc-6.png", "disc-7.png"]
    assert [read_settings(path)["seed"] for path in several] == [6, 7]
    (alone,) = draw(done, tmp_path / "alone.png", hint=hint)
    assert np.array_equal(pixels(several[1]), pixels(alone))
    assert not np.array_equal(pixels(several[0]), pixels(alone))
    assert read_recipe(None, several[1], {}) == read_recipe(None, alone, {})


def test_other_tools_find_the_form_they_know(done: Done, tmp_path: Path) -> None:
    (path,) = draw(done, tmp_path / "free.png", control=None, negative_prompt="blur")
    with Image.open(path) as picture:
        shown = picture.info["parameters"]
    assert shown == "a red disc\nNegative prompt: blur\nSteps: 2, Sampler: ddim, CFG scale: 2.0, Seed: 7, Size: 64x64"


def test_a_picture_that_an_earlier_version_drew_is_drawn_again(done: Done, hint: Path, tmp_path: Path) -> None:
    (new,) = draw(done, tmp_path / "new.png", hint=hint, scale=0.5, precision="fp32")
    old = {**FLAGS, "sampler": "ddim", "base": done.settings.base, "scheduler": "ddim", "scale": 0.5, "batch": 16}
    old |= {"precision": "fp32", "control": str(done.run.folder / "control"), "hint": str(hint)}
    save_picture(pixels(new), tmp_path / "old.png", old)
    (again,) = sample_to_files(read_recipe(None, tmp_path / "old.png", {}), tmp_path / "again.png")
    assert np.array_equal(pixels(again), pixels(new))
    assert warn_of_changes(tmp_path / "old.png", read_recipe(None, tmp_path / "old.png", {})) == []


def test_what_has_changed_since_a_picture_was_drawn_is_named(
    done: Done, strong: Path, hint: Path, tmp_path: Path
) -> None:
    (path,) = draw(done, tmp_path / "first.png", hint=hint, control=strong)
    recipe = read_recipe(None, path, {})
    assert warn_of_changes(path, recipe) == []
    assert warn_of_changes(None, recipe) == []
    Image.fromarray(make_hint(9)).save(hint)
    assert warn_of_changes(path, recipe) == [f"{hint} has changed since {path} was drawn: this will be another picture"]
    assert warn_of_changes(path, read_recipe(None, path, {"hint": tmp_path / "first.png"})) == []
    (strong / "config.json").write_bytes((strong / "config.json").read_bytes() + b"\n")
    assert [line.split(" has ")[0] for line in warn_of_changes(path, recipe)] == [str(strong), str(hint)]


def test_the_hint_of_a_picture_is_what_the_annotator_makes_of_it_at_the_pictures_size(pictures: Path) -> None:
    made = hint_of(None, pictures / "3.png", "canny", (SIZE_PX, SIZE_PX))
    assert made.any()
    assert np.array_equal(made, get_annotator("canny")(pixels(pictures / "3.png")))


def says(done: Done, folder: Path, **facts: str) -> Path:
    """A control that says so of itself."""
    save_control(load_control(done.run.folder / "control"), folder, facts)
    return folder


@pytest.mark.parametrize(("facts", "expected"), [({"hint": "soft_edge"}, "soft_edge"), ({}, "canny")])
def test_a_picture_becomes_the_hint_that_the_control_was_trained_on(
    done: Done, hint: Path, tmp_path: Path, facts: dict[str, str], expected: str
) -> None:
    control = says(done, tmp_path / "control", **facts)
    (found,) = draw(done, tmp_path / "found.png", image=hint, control=control)
    (wanted,) = draw(done, tmp_path / "wanted.png", image=hint, control=control, annotator=expected)
    assert read_settings(found) == read_settings(wanted)
    assert read_recipe(None, found, {}).controls[0].annotator == expected


@pytest.mark.parametrize(("kind", "said"), [("pose", "from 'pose', which Bridle cannot make"), ("files", "from files")])
def test_where_no_annotator_makes_what_the_control_was_trained_on_a_hint_is_asked_for(
    done: Done, hint: Path, tmp_path: Path, kind: str, said: str
) -> None:
    control = says(done, tmp_path / "control", hint=kind)
    with pytest.raises(SampleError, match=rf"control {control} was trained on hints {said}.*: give --hint, or"):
        draw(done, tmp_path / "out.png", image=hint, control=control)
    assert draw(done, tmp_path / "out.png", image=hint, control=control, annotator="canny")


def test_another_annotator_than_the_one_in_training_is_warned_of(done: Done, hint: Path, tmp_path: Path) -> None:
    control = says(done, tmp_path / "control", hint="depth")
    asked = {name: {**FLAGS, "control": control, "image": hint, "annotator": name} for name in ("depth", "canny")}
    assert warn_of_annotators(read_recipe(None, None, asked["depth"])) == []
    said = [f"control {control} was trained on hints of depth, not of canny: it may not obey"]
    assert warn_of_annotators(read_recipe(None, None, asked["canny"])) == said


def test_a_control_of_one_channel_takes_grey_files_and_refuses_coloured_ones(
    done: Done, hint: Path, tmp_path: Path
) -> None:
    control = wake(Control.from_base(done.run.base, hint_channels=1))
    save_control(control, tmp_path / "control")
    edges = tmp_path / "edges.png"
    with Image.open(hint) as picture:
        picture.convert("L").save(edges)
    grey = fit(pixels(edges)[..., None], (SIZE_PX, SIZE_PX), cv2.INTER_NEAREST_EXACT)
    steering = steer(ControlRecipe(file=tmp_path / "control", hint=edges), control, (SIZE_PX, SIZE_PX))
    assert np.array_equal(steering.hints[0], grey)
    assert draw(done, tmp_path / "drawn.png", control=tmp_path / "control", hint=edges)
    assert draw(done, tmp_path / "made.png", control=tmp_path / "control", image=hint)  # edges are grey
    with pytest.raises(HintError, match="3 channels; this control was made for 1: give a grey picture"):
        draw(done, tmp_path / "out.png", control=tmp_path / "control", hint=hint)


@pytest.mark.parametrize("shape", [(100, 60), (48, 91), (64, 64), (20, 20)])
def test_a_file_is_cut_to_a_square_as_training_cuts_its_pairs(shape: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert np.array_equal(fit(picture, (SIZE_PX, SIZE_PX), cv2.INTER_CUBIC), fit_image(picture, SIZE_PX))
    assert np.array_equal(fit(picture, (SIZE_PX, SIZE_PX), cv2.INTER_NEAREST_EXACT), fit_hint(picture, SIZE_PX))


def test_a_file_keeps_its_shape_where_it_is_that_of_the_picture() -> None:
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, :30] = 255
    fitted = fit(wide, (100, 200), cv2.INTER_NEAREST_EXACT)
    assert fitted.shape == (100, 200, 3)
    assert np.array_equal(fitted[..., 0] == 255, np.broadcast_to(np.arange(200) < 60, (100, 200)))


@pytest.mark.parametrize(
    ("request_", "error", "said"),
    [
        ({"hint": None}, ConfigError, "needs one hint; give it a hint, or an image with annotator"),
        ({"hint": Path("a.png"), "image": Path("b.png")}, ConfigError, "needs one hint"),
        ({"hint": Path("a.png"), "control": None}, SampleError, "hint was given without a control; add --control"),
        ({"hint": Path("missing.png")}, DataError, "missing.png: .*no such file"),
        ({"hint": None, "image": Path("missing.png")}, DataError, "missing.png: .*no such file"),
        ({"control": None, "init": Path("missing.png")}, DataError, "missing.png: .*no such file"),
        ({"control": None, "mask": Path("m.png")}, ConfigError, "mask m.png says where an init image is drawn anew"),
        ({"control": None, "prompt": None}, ConfigError, "setting prompt is missing"),
        ({"control": None, "seed": -1}, ConfigError, "seed is -1; expected 0 or more"),
        ({"control": None, "strength": 1.5}, ConfigError, "strength is 1.5; expected above 0 and at most 1"),
    ],
)
def test_a_request_that_cannot_be_met_says_why_and_writes_nothing(
    done: Done, tmp_path: Path, request_: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        draw(done, tmp_path / "out.png", **request_)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_place_of_its_control_is_understood(done: Done, hint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=re.escape(f"did you mean {done.run.folder / 'control'}?")):
        draw(done, tmp_path / "out.png", hint=hint, control=done.run.folder)


def test_a_control_that_is_no_control_is_named(done: Done, hint: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="nowhere"):
        draw(done, tmp_path / "out.png", hint=hint, control=Path("nowhere"))


CONTROL = {"file": "c", "hint": "h.png"}


@pytest.mark.parametrize(
    ("table", "overrides", "said"),
    [
        ({"promt": "a"}, [], "unknown setting promt; did you mean prompt"),
        ({"prompt": "a", "controls": [{**CONTROL, "scales": 1}]}, [], "unknown setting controls.scales; did you mean"),
        ({"prompt": "a", "controls": [{**CONTROL, "guess": "papr"}]}, [], "controls.guess is 'papr'; expected one of"),
        ({"prompt": "a", "controls": [{**CONTROL, "guess": "paper", "half": "both"}]}, [], "give it, or those two"),
        ({"prompt": "a", "controls": [{**CONTROL, "weights": "papr"}]}, [], "weights are 'papr'; expected one of"),
        ({"prompt": "a", "controls": [{**CONTROL, "keyframes": [[0.5]]}]}, [], "expected an array of 2 values"),
        ({"prompt": "a", "controls": [CONTROL]}, ["controls.1.scale=0"], "1 is none of the 1 entries; they count from"),
        ({"prompt": "a", "controls": [CONTROL]}, ["controls.x=0"], "controls is an array; name a setting of one of"),
        ({"prompt": "a", "width_px": 0}, [], "width_px is 0; expected 1 or more"),
    ],
)
def test_a_recipe_with_a_mistake_is_one_clear_error(
    tmp_path: Path, table: dict[str, Any], overrides: list[str], said: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=said):
        read_recipe(tmp_path / "a.json", None, {}, overrides)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"recipe .*a.json"):
        read_recipe(tmp_path / "a.json", None, {})
    with pytest.raises(ConfigError, match=r"recipe .*b.json cannot be read"):
        read_recipe(tmp_path / "b.json", None, {})


def test_pictures_and_flags_that_cannot_be_meant_are_refused(
    done: Done, pictures: Path, hint: Path, tmp_path: Path
) -> None:
    with pytest.raises(SampleError, match="carries no settings"):
        read_recipe(None, pictures / "0.png", {})
    annotate_file(pictures / "0.png", tmp_path / "made.png", "canny")
    with pytest.raises(SampleError, match="was not drawn by `bridle sample`"):
        read_recipe(None, tmp_path / "made.png", {})
    with pytest.raises(ConfigError, match=r"made.png is a picture; draw it again with --from"):
        read_recipe(tmp_path / "made.png", None, {})
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "a", "controls": [CONTROL] * 2}))
    with pytest.raises(SampleError, match=r"both .*a.json and --from .* say what to draw; give one of them"):
        read_recipe(tmp_path / "a.json", tmp_path / "made.png", {})
    with pytest.raises(SampleError, match=r"hint could be of any of 2 controls; use --set controls.0.hint="):
        read_recipe(tmp_path / "a.json", None, {"hint": hint})


@pytest.mark.parametrize("name", ["canny", "soft_edge", "scribble"])
def test_annotating_a_file_writes_the_hint_at_the_pictures_own_size(pictures: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "made" / "hint.png"
    annotate_file(pictures / "5.png", out, name)
    assert np.array_equal(pixels(out), get_annotator(name)(pixels(pictures / "5.png")))
    assert read_settings(out) == {"image": str(pictures / "5.png"), "annotator": name}


@pytest.mark.parametrize(
    ("name", "said"),
    [("folder.png", "is a folder"), ("picture.jpg", "ends on .png"), ("file/picture.png", "lies beneath a file")],
)
def test_where_no_picture_can_be_written_none_is_drawn(
    done: Done, hint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("bridle.run.sampling.load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(SampleError, match=said):
        draw(done, tmp_path / name, hint=hint)


def test_a_difference_to_the_base_is_drawn_with(done: Done, strong: Path, hint: Path, tmp_path: Path) -> None:
    convert(strong, tmp_path / "difference.safetensors", "difference", base=done.settings.base)
    wanted = draw(done, tmp_path / "a.png", control=strong, hint=hint)
    found = draw(done, tmp_path / "b.png", control=tmp_path / "difference.safetensors", hint=hint)
    assert np.abs(pixels(found[0]).astype(int) - pixels(wanted[0])).max() <= 2


@pytest.mark.parametrize("controls", ["controls = 3\n", "controls = ['ctl']\n", "[controls]\nfile = 'a'\n"])
def test_controls_are_tables(controls: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("prompt = 'a'\n" + controls)
    with pytest.raises(ConfigError, match=r"setting controls is .*; expected tables, each under \[\[controls\]\]"):
        read_recipe(tmp_path / "recipe.toml", None, {"scale": 0.5})
