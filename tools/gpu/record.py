"""Findings of a part of the check: rows that are written as they are measured, so that a crash keeps the earlier ones.

A part's process appends each row to a file of JSON lines. The process that started it reads them afterwards, and adds
how the part ended.
"""

import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any, Literal

from looplm.failures import UserError, printable

Status = Literal["ok", "failed", "not run"]
Value = str | int | float | None
LONGEST = 240  # characters of a reason in a table
# The folders of an absolute path, but not the start of a URL: they say who ran the check, and where.
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[^\s/:,;'\"()\[\]]+/)+(?=[^\s/:,;'\"()\[\]])")


class NotRun(Exception):
    """A measurement that cannot be made here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement of a part.

    Args:
        name: what was measured.
        status: ok, failed, or not run.
        values: figures by column.
        note: the reason, if it failed or was not run.
    """

    name: str
    status: Status = "ok"
    values: dict[str, Value] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """How a part ended, with its rows.

    Args:
        name: of the part.
        title: what it measures.
        status: failed if its process or one of its rows failed; not run if no row was measured.
        seconds: time of its process, the imports included.
        limit_s: seconds after which it is stopped.
        note: the reason, if it failed or was not run.
        log: file with everything that its process printed, below the folder of the record.
        rows: in the order of measurement.
    """

    name: str
    title: str
    status: Status
    seconds: float
    limit_s: float
    note: str = ""
    log: str = ""
    rows: tuple[Row, ...] = ()


class Rows:
    """Writes the rows of a part.

    Args:
        path: file of JSON lines that the rows are appended to.
        deadline: time.monotonic() after which no further measurement begins.
    """

    def __init__(self, path: Path, deadline: float = inf) -> None:
        self._path, self._deadline = path, deadline

    def add(self, row: Row) -> None:
        """Append a row, and print it to the part's log."""
        line = json.dumps(asdict(row))
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def measure(self, name: str, measurement: Callable[[], Mapping[str, Value]]) -> None:
        """Add a row with the values that ``measurement`` returns; if it raises, a row that says why.

        A :class:`NotRun` or a user error (a machine without FP8, say) is a measurement that cannot be made here. A
        failed one leaves its traceback in the log, and the part goes on.
        """
        if time.monotonic() > self._deadline:
            self.add(Row(name=name, status="not run", note="the time of the part is over"))
            return
        try:
            self.add(Row(name=name, values=dict(measurement())))
        except (NotRun, UserError) as reason:
            self.add(Row(name=name, status="not run", note=short(str(reason))))
        except Mismatch as found:
            self.add(Row(name=name, status="failed", values=dict(found.values), note=short(str(found))))
        except Exception as error:
            traceback.print_exc()
            self.add(Row(name=name, status="failed", note=short(f"{type(error).__name__}: {error}")))


class Mismatch(Exception):
    """A measurement that was made, and whose values are wrong.

    Args:
        message: what is wrong.
        values: the row's values.
    """

    def __init__(self, message: str, values: Mapping[str, Value]) -> None:
        super().__init__(message)
        self.values = values


def read_rows(path: Path) -> tuple[Row, ...]:
    """Return the rows of a part; a line that a kill cut short is left out."""
    if not path.exists():
        return ()
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return tuple(Row(**json.loads(line)) for line in lines)


def status_of(rows: tuple[Row, ...], fault: str) -> Status:
    """Return a part's status from its rows and what went wrong with its process."""
    if fault or any(row.status == "failed" for row in rows):
        return "failed"
    return "ok" if any(row.status == "ok" for row in rows) else "not run"


def short(text: str) -> str:
    """Return a message as one line that fits into a table, with paths reduced to their last names."""
    line = printable(_FOLDERS.sub("", " ".join(text.split())))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"


def as_dict(record: PartRecord) -> dict[str, Any]:
    """Return a record as plain values for a JSON file."""
    return asdict(record)
