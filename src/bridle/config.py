"""Settings: one TOML in, `--set key=value` over it, frozen dataclasses out, and the resolved copy saved with the run.

Every setting lives in a frozen, keyword-only dataclass beside its owner; this module only fills them in. A setting is a
bool, int, float, str, Path, Literal, tuple of these, or a nested dataclass; TOML has no null, so one that may be None
has None as its default.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from bridle.atomic import write_text
from bridle.errors import ConfigError

S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class _Typed:
    """A number or truth value that an override gave, and the text of it, which is meant where a string is expected."""

    value: Any
    text: str

    def __repr__(self) -> str:
        return repr(self.value)


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string in quotes",
    Path: "a path in quotes",
}


def read(settings: type[S], path: Path | None, overrides: Iterable[str] = ()) -> S:
    """Read settings from a TOML file and `key=value` overrides.

    Args:
        settings: the dataclass to fill in; nested dataclasses are tables.
        path: the TOML file, or None for the defaults.
        overrides: such as "train.lr=1e-5"; the value is read as TOML, and as a plain string where that fails, or where
            a string is expected: a folder may be called 2024.

    Raises: ConfigError: the file cannot be read or is no TOML, a key is unknown or missing, or a value has the wrong
        type.
    """
    return build(settings, overlay({} if path is None else load(path), overrides))


def overlay(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Lay `key=value` overrides over a table, in place; the entries of an array are counted from 0: "controls.0.scale".

    Raises: ConfigError: one is not of that form, or leads nowhere.
    """
    for override in overrides:
        _apply(table, override)
    return table


def build(settings: type[S], table: Mapping[str, Any], prefix: str = "") -> S:
    """Fill in a dataclass from a table. Raises: ConfigError, naming the nearest known key."""
    hints = get_type_hints(settings)
    known = {field.name: field for field in _fields(settings)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            remedy = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"unknown setting {prefix}{key}; {remedy}")
    for key, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and key not in table:
            missing = f"{prefix}{key}{required_of(hints[key])}"
            raise ConfigError(f"setting {missing} is missing; add it, or use --set {missing}=...")
    return settings(**{key: _convert(value, hints[key], prefix + key) for key, value in table.items()})


def required_of(kind: Any) -> str:
    """Of a table the first setting that has no default, with its dot; of a value nothing."""
    for field in _fields(kind) if dataclasses.is_dataclass(kind) else ():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            return f".{field.name}"
    return ""


def save(settings: Any, path: Path) -> None:
    """Write settings as TOML; `read` gives them back equal."""
    write_text(path, dump(settings))


def dump(settings: Any, prefix: str = "") -> str:
    """Settings as TOML text. A value of None is left out, which is how it is read back."""
    plain, tables = [], []
    for field in _fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            name = f"{prefix}{field.name}"
            tables.append(f"\n[{name}]\n{dump(value, name + '.')}")
        elif value is not None:
            plain.append(f"{field.name} = {literal(value, prefix + field.name)}\n")
        else:
            assert field.default is None, f"{prefix}{field.name} is None, but would be read back as its default"
    return "".join(plain + tables)


def _fields(settings: Any) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if field.init]


def load(path: Path) -> dict[str, Any]:
    """A TOML file as it stands. Raises: ConfigError: it cannot be read, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # as some editors begin a file
    except FileNotFoundError:
        raise ConfigError(f"settings file {path} does not exist; give the path of a TOML file") from None
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}; give a TOML file") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"settings file {path} is not valid TOML: {error}; correct that place") from None


def literal(value: Any, name: str) -> str:
    """One value as TOML, whose strings are JSON's except for DEL and whose inf and nan are spelt as Python's."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(literal(item, name) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    text = json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"setting {name} is {value!r}, which is not valid Unicode and cannot be saved; rename it")
    return text


def _apply(table: dict[str, Any], override: str) -> None:
    """Lay one `key=value` over the table, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value; for example --set train.lr=1e-5")
    *parents, name = key.strip().split(".")
    place: Any = table
    for parent in parents:
        place = _entry(place, parent, override) if isinstance(place, list) else place.setdefault(parent, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a table; leave out what follows it")
    if isinstance(place, list):
        raise ConfigError(f"override {override!r}: {parents[-1]} is an array; name a setting of one of its entries")
    place[name] = _value(text)


def _entry(array: list[Any], key: str, override: str) -> Any:
    if not (key.isdecimal() and int(key) < len(array)):
        raise ConfigError(f"override {override!r}: {key} is none of the {len(array)} entries; they count from 0")
    return array[int(key)]


def _value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    if len(parsed) > 1:  # several lines can be several settings
        return text
    value = parsed["value"]
    return value if isinstance(value, str | list | dict) else _Typed(value, text.strip())


def _convert(value: Any, kind: Any, name: str) -> Any:
    """Check one value against its annotation; integers pass as floats, strings as paths, arrays as tuples."""
    if isinstance(value, _Typed):
        try:
            return _convert(value.value, kind, name)
        except ConfigError:
            with suppress(ConfigError):
                return _convert(value.text, kind, name)
            raise
    origin = get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, get_args(kind), name)
    if origin is tuple and isinstance(value, list | tuple):
        return _convert_tuple(value, get_args(kind), name)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(typing.cast(type, kind), value, f"{name}.")
    if origin is Literal and any(value == known and type(value) is type(known) for known in get_args(kind)):
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str) and value:  # "" would be the current folder
        return Path(value)
    if kind in _EXPECTED and type(value) is kind:
        return value
    if kind is Path and isinstance(value, Path):
        return value
    raise ConfigError(f"setting {name} is {value!r}; expected {_expected(kind)}")


def _convert_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    """The first kind that takes the value; an exact one goes before one that would convert it."""
    kinds = tuple(sorted((kind for kind in kinds if kind is not type(None)), key=lambda kind: type(value) is not kind))
    for kind in kinds[:-1]:
        try:
            return _convert(value, kind, name)
        except ConfigError:
            continue
    try:
        return _convert(value, kinds[-1], name)
    except ConfigError:
        if not all(kind in _EXPECTED or get_origin(kind) is Literal for kind in kinds):
            raise  # it says more: which setting of a table, how many values of an array
        expected = " or ".join(map(_expected, sorted(kinds, key=lambda kind: get_origin(kind) is Literal)))
        raise ConfigError(f"setting {name} is {value!r}; expected {expected}") from None


def _convert_tuple(value: list[Any] | tuple[Any, ...], kinds: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        raise ConfigError(f"setting {name} is {list(value)!r}; expected an array of {len(kinds)} values")
    return tuple(_convert(item, kind, name) for item, kind in zip(value, kinds, strict=True))


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return "an array in brackets"
    if dataclasses.is_dataclass(kind):
        return "a table of settings"
    return _EXPECTED.get(kind, str(kind))
