"""Reading sampling recipes: a TOML or JSON file, or a picture that carries one, with what the command line changes."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bridle import config
from bridle.base.load import EMBEDDED, embedded_folder
from bridle.data.annotate import NAMES
from bridle.errors import ConfigError, SampleError
from bridle.files.read import open_control
from bridle.sample.picture import read_settings
from bridle.sample.recipe import ControlRecipe, Recipe

# Flags that are about the only control of a recipe; pictures of Bridle 0.1 have its settings under the same names.
CONTROL_FLAGS = {"control": "file"} | {name: name for name in ("hint", "image", "annotator", "scale", "half")}
INSTEAD = {"hint": "image", "image": "hint"}  # which flag puts an end to which other setting
OLD = ("prompt", "seed", "base", "steps", "guidance", "scheduler", "precision")


def read_recipe(
    file: Path | None, picture: Path | None, flags: Mapping[str, Any], overrides: Iterable[str] = ()
) -> Recipe:
    """A recipe with its changes.

    Args:
        file: .toml or .json.
        picture: a .png that `bridle sample` drew, in its place; without either it begins from the defaults.
        flags: fields of the recipe, and those of its only control by `CONTROL_FLAGS`; None is not given.
        overrides: such as "controls.0.scale=0.5", applied last.

    Raises: ConfigError: the file cannot be read, a key is unknown, or a value is wrong. SampleError: the picture
        carries no recipe, both are given, or flags of a control are about none or several.
    """
    if file is not None and picture is not None:
        raise SampleError(f"both {file} and --from {picture} say what to draw; give one of them")
    table = read_file(file) if file is not None else {}
    if picture is not None:
        table = recipe_of(read_settings(picture), picture)
    given = {name: value for name, value in flags.items() if value is not None}
    of_control = {CONTROL_FLAGS[name]: value for name, value in given.items() if name in CONTROL_FLAGS}
    table |= {name: value for name, value in given.items() if name not in CONTROL_FLAGS}
    if of_control:
        controls = table.get("controls", [])
        if not isinstance(controls, list) or not all(isinstance(one, dict) for one in controls):
            raise ConfigError(f"setting controls is {controls!r}; expected tables, each under [[controls]]")
        table["controls"] = [change_control(controls, of_control)]
    return config.build(Recipe, config.overlay(table, overrides))


def read_file(path: Path) -> dict[str, Any]:
    """A recipe as it stands in a file. Raises: ConfigError: it cannot be read."""
    if path.suffix.lower() == ".png":
        raise ConfigError(f"recipe {path} is a picture; draw it again with --from {path}")
    if path.suffix.lower() != ".json":
        return config.load(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}; give a .toml or .json file") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not valid JSON: {error}; correct that place") from None
    if not isinstance(table, dict):
        raise ConfigError(f"recipe {path} holds {table!r}; expected an object with prompt and so on")
    return table


def recipe_of(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The recipe of a picture, also of one that Bridle 0.1 drew. Raises: SampleError: it carries none."""
    if isinstance(settings.get("recipe"), dict):
        return dict(settings["recipe"])
    if not {"prompt", "seed", "scheduler"} <= settings.keys():
        raise SampleError(f"picture {path} was not drawn by `bridle sample`; give one that was, or a recipe")
    table = {"precision": "fp32"} | {name: settings[name] for name in OLD if name in settings}
    base = str(table.get("base", EMBEDDED))
    table["base"] = EMBEDDED if base.startswith(f"{EMBEDDED}/") else base
    if "control" in settings:
        table["controls"] = [{key: settings[name] for name, key in CONTROL_FLAGS.items() if name in settings}]
    return table


def change_control(controls: Sequence[Mapping[str, Any]], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The only control of a recipe, changed. Raises: SampleError: there are several, or there is none to change."""
    if len(controls) > 1:
        named, first = ", ".join(changes), next(iter(changes))
        raise SampleError(f"{named} could be of any of {len(controls)} controls; use --set controls.0.{first}=...")
    if not controls and "file" not in changes:
        raise SampleError(f"{', '.join(changes)} was given without a control; add --control RUN/control")
    dropped = {INSTEAD[name] for name in changes if name in INSTEAD} - changes.keys()
    kept = dict(controls[0]) if controls else {}
    return {name: value for name, value in kept.items() if name not in dropped} | dict(changes)


def settle_annotators(recipe: Recipe) -> Recipe:
    """Name the annotator of every picture that a hint is to be made of: the same that made the hints in training.

    Raises: SampleError: a control was trained on hints that no annotator makes, and none is named. FileError: it cannot
        be read.
    """
    return replace(recipe, controls=tuple(settle_annotator(one) for one in recipe.controls))


def settle_annotator(one: ControlRecipe) -> ControlRecipe:
    if one.image is None or one.annotator is not None:
        return one
    trained = trained_on(one.file) or "canny"
    if trained in NAMES:
        return replace(one, annotator=trained)
    which = "files that the data set brought" if trained == "files" else f"{trained!r}, which Bridle cannot make"
    remedy = f"give --hint, or say with --annotator what makes such hints: {', '.join(NAMES)}"
    raise SampleError(f"control {one.file} was trained on hints from {which}: {remedy}")


def trained_on(control: Path) -> Any:
    """What made the hints in training, as the control's file says; None where it does not."""
    return open_control(control).facts.get("hint")


def warn_of_annotators(recipe: Recipe) -> list[str]:
    """A line for each control that is to get other hints than it was trained on."""
    asked = [(one, trained_on(one.file)) for one in recipe.controls if one.image is not None and one.annotator]
    return [
        f"control {one.file} was trained on hints of {trained}, not of {one.annotator}: it may not obey"
        for one, trained in asked
        if trained in NAMES and trained != one.annotator
    ]


def digest(path: Path) -> str:
    """Sha256 of a file, or of all files of a folder with their names."""
    hasher = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            hasher.update(b"" if file == path else file.relative_to(path).as_posix().encode())
            with file.open("rb") as stream:
                hasher.update(hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()


def warn_of_changes(picture: Path | None, recipe: Recipe) -> list[str]:
    """A line for each thing that is no longer what a picture was drawn from. Of a base only the name is looked at."""
    settings = read_settings(picture) if picture is not None else {}
    known = settings.get("sha256", {})
    named = [file for file in recipe.files if str(file) in known and file.exists()]
    changed = [str(file) for file in named if digest(file) != known[str(file)]]
    if recipe.base == EMBEDDED and str(settings.get("base")) not in (f"{EMBEDDED}/{embedded_folder().name}", "None"):
        changed.append(f"the embedded base ({settings['base']})")
    return [f"{what} has changed since {picture} was drawn: this will be another picture" for what in changed]
