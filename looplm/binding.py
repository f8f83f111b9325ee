"""Plain values into dataclasses, by the types of their fields.

A number, a truth value or one of several choices may be written as text, as it is on a command line. Nothing else is
converted: no fraction becomes a whole number, and no number becomes text.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from looplm.bounds import expand_path, is_path
from looplm.failures import UserError
from looplm.yaml_text import Plain

ConfigType = TypeVar("ConfigType")

MAX_INT = 2**63
_NULLS = {"", "~", "null", "Null", "NULL"}
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")  # no leading zero: YAML 1.1 reads 010 as 8, YAML 1.2 as 10
_NUMBER = re.compile(rf"({_WHOLE.pattern}\.?[0-9]*|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?")


class Flag(str):
    """A word of the command line: ``null`` means no value if the key allows that."""


def hints_of(cls: type) -> dict[str, Any]:
    """Return the type of each field."""
    return _hints_of(cls)


@cache  # resolving type hints dominates the cost of small files
def _hints_of(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(cls)}


def build(cls: type[ConfigType], values: Mapping[str, Any], prefix: str = "", *, expand: bool = False) -> ConfigType:
    """Return the dataclass.

    Args:
        cls: its fields are texts, numbers, paths, choices, tuples, dicts, or dataclasses themselves.
        values: by field; those of an inner dataclass are a mapping too.
        prefix: of the keys in error messages, with its last dot.
        expand: replace ``~`` and ``$NAME`` in paths.

    Raises:
        UserError: an unknown key, a missing key, or a value of another type.
    """
    for key, fix in unknown_keys(cls, values, prefix):
        raise UserError(f"{key}: unknown key; {fix}")
    bound = dict[str, Any]()
    for spec in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = f"{prefix}{spec.name}"
        if spec.name in values:
            hint = hints_of(cls)[spec.name]
            bound[spec.name] = convert(hint, values[spec.name], key, expand=expand)
            if expand and is_path(spec, hint) and bound[spec.name] is not None:
                bound[spec.name] = _expanded(bound[spec.name], key)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            if dataclasses.is_dataclass(hints_of(cls)[spec.name]):
                convert(hints_of(cls)[spec.name], {}, key)  # raises for its first required key, or needs none
            raise UserError(f"{key}: required and not given; set it in a --config file or on the command line")
    return cls(**bound)


def convert(hint: Any, value: Any, key: str, *, expand: bool = False, optional: bool = False) -> Any:
    """Return ``value`` as the type ``hint``; ``key`` names it in error messages."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in inner if kind is not type(None)]
        if len(kinds) < len(inner) and _is_null(value):
            return None
        [kind] = kinds  # no key of ours takes two types
        return convert(kind, value, key, expand=expand, optional=len(kinds) < len(inner))
    if hint is Any:
        return value
    wanted = "null or " * optional + describe(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(hint, value, f"{key}.", expand=expand)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(convert(inner[0], item, f"{key}[{index}]", expand=expand) for index, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return {name: convert(inner[1], item, f"{key}.{name}", expand=expand) for name, item in value.items()}
    if origin is Literal:
        if isinstance(value, (str, int)) and (value in inner or str(value) in map(str, inner)):
            return next(choice for choice in inner if str(choice) == str(value))
    elif hint in _SCALARS:
        found = _SCALARS[hint](value)
        if found is not None:
            return found
    shown = "null" if value is None or (isinstance(value, Plain) and value in _NULLS) else repr(_short(value))
    large = hint is int and (isinstance(value, int) or _WHOLE.fullmatch(str(value)))
    raise UserError(f"{key}: {shown} is not allowed; give {wanted}{' below 2^63' * bool(large)}")


def describe(hint: Any) -> str:
    """Return the type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if kind is type(None) else describe(kind) for kind in inner)
    if origin is tuple:
        return "a list"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "a mapping of keys"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    return words[hint]


def section_of(hint: Any) -> type | None:
    """Return the dataclass in an annotation such as ``X | None`` or ``tuple[X, ...]``, or None."""
    if dataclasses.is_dataclass(hint):
        return hint  # type: ignore[return-value]
    if typing.get_origin(hint) in (Union, types.UnionType, tuple):
        return next(filter(None, map(section_of, typing.get_args(hint))), None)
    return None


def retired_of(cls: type) -> Mapping[str, str]:
    """Return the keys that ``cls`` had in earlier releases, each with the reason why it has no effect any more.

    They are accepted, so that old files can still be read.
    """
    retired: Mapping[str, str] = getattr(cls, "RETIRED", {})
    return retired


def retired_keys(cls: type, values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of ``values`` that is in :func:`retired_of` of its dataclass, with the reason."""
    for section, key, before in _keys_without_field(cls, values, prefix):
        if key in retired_of(section):
            yield f"{before}{key}", retired_of(section)[key]


def unknown_keys(cls: type, values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield each other key of ``values`` for which ``cls`` has no field, with a suggestion."""
    for section, key, before in _keys_without_field(cls, values, prefix):
        if key not in retired_of(section):
            known, (start, _, rest) = hints_of(section), key.partition(".")
            nested = f"write {before}{start}: {{{rest}: ...}}"
            yield f"{before}{key}", nested if rest and start in known else suggest(key, list(known), before)


def _keys_without_field(cls: type, values: Any, prefix: str) -> Iterator[tuple[type, str, str]]:
    """Yield the dataclass, the key as text and its prefix, for ``values`` and the sections in it."""
    if isinstance(values, (list, tuple)):
        for index, value in enumerate(values):
            yield from _keys_without_field(cls, value, f"{prefix[:-1]}[{index}].")
    if not isinstance(values, Mapping):
        return
    known = hints_of(cls)
    for key, value in values.items():
        if key not in known:
            yield cls, str(key), prefix
        elif inner := section_of(known[key]):
            yield from _keys_without_field(inner, value, f"{prefix}{key}.")


def suggest(key: str, known: list[str], prefix: str = "") -> str:
    """Return what to write instead of an unknown key."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"give one of {', '.join(known)}"


def _is_null(value: Any) -> bool:
    return (
        value is None or (isinstance(value, Plain) and value in _NULLS) or (isinstance(value, Flag) and value == "null")
    )


def _expanded(value: Any, key: str) -> Any:
    if isinstance(value, tuple):
        return tuple(_expanded(item, f"{key}[{index}]") for index, item in enumerate(value))
    return type(value)(expand_path(str(value), key))


def _short(value: Any) -> Any:
    """Return a value as it is shown in a message."""
    if isinstance(value, str):
        return str(value) if len(value) <= 100 else f"{value[:80]}... ({len(value):,} characters)"
    return value if len(repr(value)) <= 200 else f"{repr(value)[:80]}..."


def _whole(value: Any) -> int | None:
    if isinstance(value, str):
        value = int(value) if len(value) < 30 and _WHOLE.fullmatch(value) else None
    return value if type(value) is int and abs(value) < MAX_INT else None


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        number = float(value) if len(value) < 400 and _NUMBER.fullmatch(value) else math.inf
        return number if math.isfinite(number) else None
    if type(value) is int and abs(value) < MAX_INT:
        return float(value)
    return value if type(value) is float else None  # what a program wrote may be infinite: the loss of a diverged run


def _truth(value: Any) -> bool | None:
    if isinstance(value, str):
        value = _WORDS.get(value.lower()) if value in (value.lower(), value.upper(), value.capitalize()) else None
    return value if type(value) is bool else None


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or (isinstance(value, Plain) and value in _NULLS):
        return None
    try:
        return value.encode("utf-16", "surrogatepass").decode("utf-16")  # joins the halves of JSON's "\\ud83d\\ude00"
    except UnicodeDecodeError:
        return None


def _path(value: Any) -> Path | None:
    text = str(value) if isinstance(value, Path) else _text(value)
    return Path(text) if text else None  # Path("") would be the working directory


_SCALARS: dict[Any, Any] = {int: _whole, float: _number, bool: _truth, str: _text, Path: _path}
