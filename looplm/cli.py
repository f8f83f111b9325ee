"""Every command's edge: YAML files and command-line values in, one frozen dataclass out, mistakes in one line.

jsonargparse does the typing, ``--help`` and ``--print_config``. What it does not do is done here: name the file a wrong
key stands in, suggest the key that was meant, and end a user's mistake in a single line with exit status 2.
"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

ConfigType = TypeVar("ConfigType")


class UserError(Exception):
    """A mistake of the person at the terminal: one line that says what, where, the bad value and the fix."""


def require(condition: bool, key: str, value: object, fix: str) -> None:
    """Raise the one-line :class:`UserError` ``key: value is not allowed; fix`` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: {value!r} is not allowed; {fix}")


def parse_config(cls: type[ConfigType], argv: Sequence[str], *, prog: str, description: str) -> ConfigType:
    """Build ``cls`` from ``--config FILE`` (repeatable, later files win) and ``--section.key value``.

    Args:
        cls: a frozen dataclass whose fields are scalars, tuples, or dataclasses themselves.
        argv: the arguments without the program's name.
        prog: the command as the user types it, for ``--help``.
        description: the first lines of ``--help``.

    Raises:
        UserError: a file that cannot be read, an unknown key, a value of the wrong type or out of range.
    """
    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with these keys; give it several times to stack files"
    )
    parser.add_class_arguments(cls)
    for path in _config_files(argv):
        _check_keys(cls, _load_yaml(path), where=path)
    try:
        values = parser.parse_args(list(argv))
        values.pop("config", None)
        return cls(**vars(parser.instantiate(values)))
    except UserError:
        raise
    except Exception as error:  # jsonargparse raises several kinds; each is the user's mistake at this point
        raise UserError(_explain(cls, str(error))) from error


def run_main(main: Callable[[list[str]], None]) -> NoReturn:
    """Run ``main(argv)`` and exit: 0 when done, 2 with one line on rank 0's stderr on a :class:`UserError`."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain YAML-able values (tuples become lists)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[ConfigType], values: dict[str, Any], *, where: str) -> ConfigType:
    """The inverse of :func:`to_dict`; ``where`` names the source in error messages."""
    _check_keys(cls, values, where=where)
    parser = _parser_of(cls)  # type: ignore[arg-type]  # a class is hashable
    try:
        return cls(**vars(parser.instantiate(parser.parse_object(values))))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: {_explain(cls, str(error))}") from error


@cache
def _parser_of(cls: type) -> ArgumentParser:
    """Of the fields of ``cls``: to read its hints takes most of the time that a small file takes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    return parser


def _config_files(argv: Sequence[str]) -> list[str]:
    files = [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    return files + [value for flag, value in pairwise(argv) if flag == "--config"]


def _load_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(
            f"{path}: holds {type(loaded).__name__}, not a mapping of keys; see --print_config for the form"
        )
    return loaded


def _dataclasses_in(annotation: Any) -> list[type]:
    """The dataclasses inside an annotation such as ``Optional[X]`` or ``tuple[X, ...]``."""
    if dataclasses.is_dataclass(annotation):
        return [annotation]  # type: ignore[list-item]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, tuple):
        return [found for inner in typing.get_args(annotation) for found in _dataclasses_in(inner)]
    return []


def _check_keys(cls: type, values: Any, *, where: str, prefix: str = "") -> None:
    """Refuse a key that no dataclass field answers to, and suggest the one that was probably meant."""
    if isinstance(values, list):
        for index, value in enumerate(values):
            _check_keys(cls, value, where=where, prefix=f"{prefix[:-1]}[{index}].")
    if not isinstance(values, dict):
        return
    annotations = typing.get_type_hints(cls)
    known = {field.name: annotations[field.name] for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{where}: {prefix}{key}: unknown key; {_suggest(str(key), list(known), prefix)}")
        for inner in _dataclasses_in(known[key]):
            _check_keys(inner, value, where=where, prefix=f"{prefix}{key}.")


def _suggest(key: str, known: list[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {prefix}{close[0]}?" if close else f"the keys here are {', '.join(known)}"


def _all_keys(cls: type, prefix: str = "") -> list[str]:
    annotations = typing.get_type_hints(cls)
    keys = []
    for field in dataclasses.fields(cls):
        inner = annotations[field.name]
        nested = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        keys += _all_keys(inner, f"{prefix}{field.name}.") if nested else [prefix + field.name]
    return keys


def _explain(cls: type, message: str) -> str:
    """jsonargparse's message on one line, with a suggestion for a misspelt ``--key``."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message)
    if unknown:
        return f"--{unknown[1]}: unknown key; {_suggest(unknown[1], _all_keys(cls))}"
    missing = re.search(r"the following arguments are required: (.*)", message)
    if missing:
        return f"{missing[1]}: required and not given; set it in a --config file or on the command line"
    typed = re.search(r'Parser key "([\w.]+)": (.*)', message)
    return f"{typed[1]}: {typed[2]}" if typed else message
