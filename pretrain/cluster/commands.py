"""Check of a command between two trainings: its words are parsed when the recipe is submitted, not days later."""

import importlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from looplm.bounds import require

_PARSERS = ("parse_config", "parse_command")  # of looplm.cli; a command's main calls one of them first


class _Parsed(Exception):
    """The words were parsed, and the command itself shall not run."""


def check_command(words: Sequence[str], made: Iterable[str]) -> None:
    """Parse a command's words with its own configuration, and run no more of it.

    A file in a directory that an earlier stage makes may be missing. A command that reads its words in another way is
    not checked, nor one that cannot be imported here, for want of an optional package that the job may have.

    Args:
        words: those after ``python -m``.
        made: directories that earlier stages make.

    Raises:
        UserError: the module is no command, or the words are not what it takes.
    """
    try:
        module = importlib.import_module(words[0])
    except ImportError:
        return
    parsers = {name: vars(module)[name] for name in _PARSERS if name in vars(module)}
    require("main" in vars(module), "run", words[0], "it is a module, but not a command")
    places = [Path(folder).resolve() for folder in made]
    awaited = {word: path for word in words[1:] if (path := _path_in(word, places)) is not None}
    if not parsers or any(path.suffix in (".yaml", ".yml") for path in awaited.values()):  # keys are not known yet
        return
    try:
        vars(module).update({name: partial(_parse_and_stop, parse) for name, parse in parsers.items()})
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            stand_ins = {
                word: f"{word.removesuffix(_value(word))}{folder}/{path.name}" for word, path in awaited.items()
            }
            module.main([stand_ins.get(word, word) for word in words[1:]])
    except _Parsed:
        return
    except SystemExit:
        pass
    finally:
        vars(module).update(parsers)
    require(False, "run", " ".join(words), "it prints its help or its keys and does nothing; give the words of a task")


def _path_in(word: str, places: Sequence[Path]) -> Path | None:
    """Return the missing file that a word names in one of the directories; None if it names no such file."""
    path = Path(os.path.expandvars(os.path.expanduser(_value(word)))).absolute()
    folder = path.resolve().parent
    # An output may also be the first beside such a directory, which is then made with all that it lies in.
    made = any(
        place in (folder, *folder.parents) or (folder in place.parents and not folder.exists()) for place in places
    )
    return path if made and not path.exists() else None


def _value(word: str) -> str:
    return word.partition("=")[2] if word.startswith("--") else word


def _parse_and_stop(parse: Callable[..., Any], *arguments: Any, **keywords: Any) -> NoReturn:
    parse(*arguments, **keywords)
    raise _Parsed
