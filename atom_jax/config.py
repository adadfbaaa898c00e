"""Frozen dataclass configurations: files with variants, `--set` overrides, JSON, differences.

A configuration file defines `VARIANTS: dict[str, Callable[[], Config]]`; its first entry is the default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import numbers
import operator
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from atom_jax.typing import AtomError

T = TypeVar("T")
_CLASSES: dict[str, type] = {}


def register(cls: type[T]) -> type[T]:
    """Marks a dataclass whose JSON carries its own name, so that a field of a general type can be restored. Raises
    AtomError where another module has one of this name."""
    if (known := _CLASSES.get(cls.__name__, cls)).__module__ != cls.__module__:
        raise AtomError(f"{cls.__module__}: {known.__module__} has a configuration of the name {cls.__name__}, too")
    _CLASSES[cls.__name__] = cls
    return cls


def to_json(value: Any) -> Any:
    """Converts a dataclass (nested, with tuples and plain values) to what `json.dump` accepts."""
    if dataclasses.is_dataclass(value):
        out = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **out} if type(value).__name__ in _CLASSES else out
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def from_json(cls: type[T], data: dict[str, Any], where: str = "config") -> T:
    """Rebuilds a dataclass from `to_json` output.

    Raises AtomError for an unknown class, an unknown field (with the valid names) or a value of the wrong type.
    """
    if not isinstance(data, dict):
        raise AtomError(f"{where}: expected an object with fields, got {data!r}")
    data = dict(data)
    name = data.pop("class", None)
    if name is not None:
        if not isinstance(name, str) or name not in _CLASSES:
            raise AtomError(f"{where}: unknown class {name!r}; known: {', '.join(sorted(_CLASSES))}")
        cls = _CLASSES[name]
    if not dataclasses.is_dataclass(cls):
        raise AtomError(f"{where}: the field 'class' is missing; known: {', '.join(sorted(_CLASSES))}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise AtomError(f"{where}: unknown field {unknown[0]!r}; valid fields: {', '.join(names)}")
    values = {k: _coerce(v, hints[k], f"{where}.{k}") for k, v in data.items()}
    try:
        return cls(**values)
    except TypeError as e:
        raise AtomError(f"{where}: {e}") from e


def override(cfg: T, settings: Sequence[str]) -> T:
    """Returns `cfg` changed by settings such as "optim.learning_rate=3e-4".

    Values are read with the type of the field; tuples are comma-separated; "none" clears an optional field.
    Raises AtomError for an unknown name (with the valid ones) or an unreadable value.
    """
    for setting in settings:
        path, eq, text = setting.partition("=")
        if not eq:
            raise AtomError(f"--set {setting}: expected NAME=VALUE")
        cfg = _replace(cfg, path.strip().split("."), text.strip(), f"--set {setting}")
    return cfg


def build(cls: type[T], settings: Sequence[str], flag: str) -> T:
    """An instance of a dataclass without parts, from settings such as "budget=512", read as by `override`.

    Raises AtomError, whose message begins with `flag` or its first word, for an unknown name, an unreadable value, or
    values that do not go together.
    """
    hints, names = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    values = {}
    for setting in settings:
        name, eq, text = (part.strip() for part in setting.partition("="))
        if not eq:
            raise AtomError(f"{flag} {setting}: expected NAME=VALUE")
        if name not in names:
            raise AtomError(f"{flag} no field {name!r}; valid names here: {', '.join(names)}")
        values[name] = _parse(text, hints[name], f"{flag} {setting}")
    try:
        return cls(**values)
    except AtomError as e:
        first = flag.split()[0].rstrip(":")
        raise e if str(e).startswith(first) else AtomError(f"{flag} {e}") from None


def named(text: str, known: Mapping[str, type[T]], what: str, also: str = "") -> T:
    """What a text such as "tova:budget=512" names: an instance of the class that is known by that name.

    also: what else would do. Raises AtomError, whose message begins with `what`, for an unknown name, and as of
    `build`.
    """
    name, _, fields = text.strip().partition(":")
    if name not in known:
        raise AtomError(f"{what} {name!r}: expected {', '.join(filter(None, (also, *known)))}")
    return build(known[name], [f for f in fields.split(",") if f], f"{what} {name}:")


def load_file(reference: str) -> Any:
    """Loads "FILE.py" or "FILE.py:variant" and returns the configuration that the variant builds. A file of configs/
    that is not there is that of the installed package.

    Raises AtomError when the file is missing, defines no VARIANTS, or has no such variant.
    """
    file, _, variant = reference.partition(":")
    path = _found(file)
    if path is None:
        own = sorted({f"configs/{found.name}" for place in _places() for found in place.glob("[!_]*.py")})
        raise AtomError(f"--config={reference}: there is no file {file}; those that come along: {', '.join(own)}")
    if path.suffix != ".py":
        raise AtomError(f"--config={reference}: {file} is not a .py file")
    module_spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        variants = getattr(module, "VARIANTS", None)
        if not variants:
            raise AtomError(f"--config={reference}: {file} defines no VARIANTS")
        variant = variant or next(iter(variants))
        if variant not in variants:
            raise AtomError(f"--config={reference}: no variant {variant!r}; {file} has {', '.join(variants)}")
        return variants[variant]()
    except AtomError:
        raise
    except Exception as e:  # it is a program, in which anything may go wrong
        raise AtomError(f"--config={reference}: {type(e).__name__}: {e}") from e


def _found(file: str) -> pathlib.Path | None:
    """The file; or, of configs/NAME.py, the one that came with the package or lies in the clone around it."""
    path = pathlib.Path(file)
    if path.is_file():
        return path
    places = _places() if path.parent == pathlib.Path("configs") else ()
    return next((found for place in places if (found := place / path.name).is_file()), None)


def _places() -> tuple[pathlib.Path, pathlib.Path]:
    """Where the configurations that come with the package may be: in it, or in the clone around it."""
    package = pathlib.Path(__file__).parent
    return package / "configs", package.parent / "configs"


def diff(old: Any, new: Any, where: str = "") -> list[str]:
    """Lists the leaves in which two configurations differ, as "path: old -> new"."""
    a, b = to_json(old), to_json(new)
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(set(a) | set(b))
        return [line for k in keys for line in diff(a.get(k), b.get(k), f"{where}.{k}" if where else k)]
    return [] if a == b else [f"{where}: {a} -> {b}"]


def _replace(cfg: Any, names: list[str], text: str, flag: str) -> Any:
    fields = {f.name for f in dataclasses.fields(cfg)} if dataclasses.is_dataclass(cfg) else set()
    name, rest = names[0], names[1:]
    if name not in fields:
        valid = ", ".join(sorted(fields)) or f"none, it is {cfg!r}"
        raise AtomError(f"{flag}: no field {name!r}; valid names here: {valid}")
    if rest:
        value = _replace(getattr(cfg, name), rest, text, flag)
    else:
        value = _parse(text, typing.get_type_hints(type(cfg))[name], flag)
    try:
        return dataclasses.replace(cfg, **{name: value})
    except AtomError as e:
        raise e if flag in str(e) or rest else AtomError(f"{flag}: {e}") from None


def _parse(text: str, hint: Any, flag: str) -> Any:
    """Reads command-line text as a value of type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(text, next(a for a in args if a is not type(None)), flag)
    if origin is tuple:
        item = args[0]
        return tuple(_parse(t.strip(), item, flag) for t in text.split(",") if t.strip())
    if hint is bool:
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
        raise AtomError(f"{flag}: expected true or false")
    if hint is str:
        return text
    if hint in (int, float):
        try:
            # A whole number may be written as 1e6.
            value = float(text) if hint is float or "e" in text.lower() or "." in text else int(text)
        except ValueError:
            raise AtomError(f"{flag}: {text[:60]!r} is not {'an integer' if hint is int else 'a number'}") from None
        if hint is int and isinstance(value, float):
            if value.is_integer():
                value = int(value)
            elif math.isfinite(value):
                raise AtomError(f"{flag}: {text[:60]!r} is not an integer")
        return in_range(flag, value, hint)
    if hint is Any and text.lower() == "none":
        return None
    raise AtomError(f"{flag}: this field holds {hint}; set its parts instead, or write a config file")


def _coerce(value: Any, hint: Any, where: str) -> Any:
    """Checks a JSON value against `hint` and rebuilds tuples and dataclasses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), where)
    if hint is Any or isinstance(hint, TypeVar):
        return from_json(object, value, where) if isinstance(value, dict) and "class" in value else value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise AtomError(f"{where}: expected a list, got {value!r}")
        return tuple(_coerce(v, args[0], f"{where}[{i}]") for i, v in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and (type(value) is not hint):
        raise AtomError(f"{where}: expected {hint.__name__}, got {value!r}")
    return in_range(where, value, hint) if hint in (int, float) else value


# What counts, positions and seeds are made of in JAX; and what no number of a configuration exceeds.
_WHOLE, _REAL = (-(2**31), 2**31 - 1), (-1e30, 1e30)


def in_range(where: str, value: Any, kind: type, least: float | None = None, most: float | None = None) -> Any:
    """`value`, where it is a number of a kind (int or float) from `least` to `most`; by default what fits 32 bits, or
    is finite. Raises AtomError, whose message begins with `where` and names the range, where it is not."""
    low, high = _WHOLE if kind is int else _REAL
    low, high = low if least is None else least, high if most is None else most
    right = isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    if not (right and low <= value <= high):
        what = "a whole number" if kind is int else "a number"
        raise AtomError(f"{where}: expected {what} from {low:.10g} to {high:.10g}, got {_shown(value)}")
    return value


def whole(name: str, value: Any, least: int = 0, most: int = 2**31 - 1) -> int:
    """An argument of a function as an int: whatever Python takes for an index, but no bool. Raises AtomError, which
    names the argument and the range, for anything else."""
    number = value
    with contextlib.suppress(TypeError):
        number = value if isinstance(value, bool) else operator.index(value)
    if type(number) is not int or not least <= number <= most:
        raise AtomError(f"{name} is {_shown(value)}; expected a whole number from {least} to {most}")
    return number


def _shown(value: Any) -> str:
    """The value in a message; Python refuses to write very long numbers."""
    return "a number of hundreds of digits" if type(value) is int and abs(value) > 10**300 else repr(value)


def check(cfg: Any, **ranges: tuple[float | None, float | None]) -> None:
    """Raises AtomError, naming the field and what it holds, unless every value in a configuration is of its field's
    type, and numbers are in their range (`in_range`'s by default). Fields of general types are not looked at."""
    for name, hint in _hints(type(cfg)).items():
        _check(name, getattr(cfg, name), hint, ranges.get(name, (None, None)))


_WORDS = {bool: "True or False", str: "a text"}


def _check(name: str, value: Any, hint: Any, limits: tuple[float | None, float | None]) -> None:
    args = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = [a for a in args if a is not type(None)]
        if len(kinds) == 1 and not (value is None and type(None) in args):
            _check(name, value, kinds[0], limits)
    elif typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple) or not (args[-1] is Ellipsis or len(value) == len(args)):
            size = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise AtomError(f"{name}: expected a tuple{size}, got {_shown(value)}")
        for item, kind in zip(value, args[:1] * len(value) if args[-1] is Ellipsis else args):
            _check(name, item, kind, limits)
    elif hint in (int, float):
        in_range(name, value, hint, *limits)
    elif (hint in _WORDS or dataclasses.is_dataclass(hint)) and not isinstance(value, hint):
        raise AtomError(f"{name}: expected {_WORDS.get(hint, hint.__name__)}, got {_shown(value)}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}
