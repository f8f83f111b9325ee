"""JSON files of one object, which may come from anyone. Keys that are given twice are refused, as in YAML."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from looplm.failures import UserError

MAX_BYTES = 1 << 26  # json.loads takes several times the size of the text


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """Return the content of a JSON file.

    Args:
        path: a file; a device or a pipe, which may never end, is not read.
        fix: what the user can do, for the error message.

    Raises:
        UserError: it cannot be read, is not JSON, gives a key twice, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; {fix}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than such a file can need; {fix}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error}); {fix}") from error
    return parse_object(text, str(path), fix)


def parse_object(text: str, where: str, fix: str) -> dict[str, Any]:
    """Return the content of a JSON text; ``where`` names it in error messages.

    Raises:
        UserError: it is not JSON, gives a key twice, or holds something else than an object.
    """
    try:
        values = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, where, fix))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read as JSON in UTF-8 ({error}); {fix}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: holds a {type(values).__name__}, not a JSON object; {fix}")
    return values


def _object(pairs: list[tuple[str, Any]], where: str, fix: str) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise UserError(f"{where}: has the key {key!r} twice; {fix}")
    return values
