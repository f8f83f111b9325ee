"""Bounds of config fields, declared on the field and checked in one place.

::

    @dataclass(frozen=True, kw_only=True)
    class OptimConfig:
        train_steps: int = positive()                # required, above 0
        lr: float = positive(3e-4)                   # above 0, with a default
        warmup_steps: int = at_least(0, 0)           # 0 or more; the second number is the default
        beta2: float = at_least(0, 0.95, below=1)
        horizon: int | None = positive(None)         # null, or above 0
        depths: tuple[int, ...] = positive(())       # every element above 0
        train: tuple[DataSource, ...] = non_empty()  # a tuple or string with something in it
        output_dir: str = path_field()               # a path or a tuple of them; a field of type Path always is one

        def __post_init__(self) -> None:
            check_bounds(self, "optim")              # "" for keys without a section
            require(self.warmup_steps <= self.train_steps, "optim.warmup_steps", ...)  # rules that cross fields

A value out of bounds is the one-line error ``optim.lr: 0.0 is not allowed; give a number above 0``.
"""

import operator
import os
import re
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, get_args

from looplm.failures import UserError

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")
_COMPARISONS = {"above": operator.gt, "of at least": operator.ge, "below": operator.lt, "at most": operator.le}


def require(condition: bool, key: str, value: object, fix: str) -> None:
    """Raise the one-line :class:`UserError` ``key: value is not allowed; fix`` unless ``condition`` holds."""
    if not condition:
        raise UserError(f"{key}: {value!r} is not allowed; {fix}")


def positive(default: Any = MISSING, *, below: float | None = None, at_most: float | None = None) -> Any:
    """Return a dataclass field for numbers above 0, required if it has no default."""
    return _number(default, {"above": 0, "below": below, "at most": at_most})


def at_least(low: float, default: Any = MISSING, *, below: float | None = None, at_most: float | None = None) -> Any:
    """Return a dataclass field for numbers of ``low`` or more, required if it has no default."""
    return _number(default, {"of at least": low, "below": below, "at most": at_most})


def non_empty(default: Any = MISSING, *, fix: str = "name at least one") -> Any:
    """Return a dataclass field for a string or tuple that is not empty, required if it has no default."""
    return field(default=default, metadata={"non_empty": fix})


def path_field(default: Any = MISSING, *, fix: str = "name a path") -> Any:
    """Return a dataclass field for a path or a tuple of paths, required if it has no default.

    On a command line and in a file, ``~`` and ``$NAME`` in it are replaced by :func:`expand_path`.
    """
    return field(default=default, metadata={"path": fix})


def is_path(spec: Field[Any], hint: Any) -> bool:
    """Return True if a field holds paths."""
    return "path" in spec.metadata or hint is Path or Path in get_args(hint)


def expand_path(text: str, key: str) -> str:
    """Replace a leading ``~`` or ``~USER`` by a home directory, and ``$NAME`` or ``${NAME}`` by the variable's value.

    Relative paths stay relative, to the working directory.

    Raises:
        UserError: there is no such user or variable, or the path has spaces at an end or control characters.
    """
    require(text == text.strip(), key, text, "remove the spaces around it")
    require(text != "", key, text, "name a path")
    require(not _CONTROL.search(text), key, text, "a path holds no control characters")
    if text.startswith("~"):
        home = os.path.expanduser(text)
        require(not home.startswith("~"), key, text, "there is no such user; write ./~... for a name that begins so")
        text = home

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2] or ""
        fix = f"the environment variable {name!r} is not set; set it, or write the whole path"
        require(os.environ.get(name, "") != "", key, match.string, fix)
        return os.environ[name]

    return _VARIABLE.sub(value_of, text)


def require_file_place(path: str | None, key: str) -> None:
    """Raise a :class:`UserError` if no file can be written at ``path``, before the work that makes it; None passes."""
    if path is None:
        return
    place, folder = Path(path), Path(path).parent
    require(folder.is_dir(), key, path, "its directory does not exist; create it first")
    require(not place.is_dir(), key, path, "it is a directory; name a file")
    # A whole file takes the place of what is there: of a link, or of /dev/null if root asks for it.
    replaceable = not os.path.lexists(place) or (place.is_file() and not place.is_symlink())
    require(replaceable, key, path, "it is a link or a device; name a file")
    require(os.access(folder, os.W_OK), key, path, "its directory cannot be written; name another")


def require_absent(path: str | Path, key: str) -> None:
    """Raise a :class:`UserError` if anything is at ``path``, where a directory is to be made; a dangling link is."""
    require(not os.path.lexists(path), key, str(path), "it exists already; name a new directory")


def check_bounds(config: Any, section: str) -> None:
    """Raise a :class:`UserError` for the first field of ``config`` whose value is out of bounds.

    None passes for fields whose default is None. ``section`` precedes the field's name in the message.
    """
    for spec in fields(config):
        value, key = getattr(config, spec.name), f"{section}.{spec.name}" if section else spec.name
        if value is None and spec.default is None:
            continue
        if "path" in spec.metadata:
            for text in value if isinstance(value, tuple) else (value,):
                require(text != "", key, text, spec.metadata["path"])
        if "non_empty" in spec.metadata:
            shown = list(value) if isinstance(value, tuple) else value
            require(len(value) > 0, key, shown, spec.metadata["non_empty"])
        limits: dict[str, float] = spec.metadata.get("limits", {})
        wanted = " and ".join(f"{word} {limit}" for word, limit in limits.items())
        fix = f"give {'null or ' if spec.default is None else ''}a number {wanted}"
        for number in (value if isinstance(value, tuple) else [value]) if limits else ():
            require(all(_COMPARISONS[word](number, limit) for word, limit in limits.items()), key, number, fix)


def _number(default: Any, limits: dict[str, float | None]) -> Any:
    return field(
        default=default, metadata={"limits": {word: limit for word, limit in limits.items() if limit is not None}}
    )
