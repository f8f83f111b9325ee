"""JSON files of one object, which may come from anyone."""

import json
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
        UserError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a regular file; {fix}")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(f"{path}: has {size:,} bytes, more than such a file can need; {fix}")
        values = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error}); {fix}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not a JSON object; {fix}")
    return values
