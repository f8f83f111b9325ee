"""The check's record as JSON, and as tables for a terminal and for a page."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from looplm.bounds import require
from looplm.files import write_whole
from tools.gpu.parts import TOTAL_S
from tools.gpu.record import PartRecord, Row, Value

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Check:
    """A whole check.

    Args:
        device: cuda, or cpu for a rehearsal that says nothing about GPUs.
        machine: the device's name.
        date: day of the check, 2026-11-29.
        revision: of the code.
        seconds: time of all parts.
        logs: name of the folder with a log of each part.
        parts: in the order in which they ran.
    """

    device: str
    machine: str
    date: str
    revision: str
    seconds: float
    logs: str
    parts: tuple[PartRecord, ...]

    @property
    def failed(self) -> list[PartRecord]:
        """The parts that failed."""
        return [part for part in self.parts if part.status == "failed"]

    @property
    def title(self) -> str:
        """Headline of the record."""
        return f"GPU check: {self.machine}, {self.date}" if self.device == "cuda" else f"CPU rehearsal, {self.date}"


def value_of(parts: Sequence[PartRecord], row: str, column: str) -> Value:
    """Return a value of the part ``environment``; None if it was not measured."""
    rows = [one for part in parts if part.name == "environment" for one in part.rows if one.name == row]
    return rows[0].values.get(column) if rows else None


def free_stem(folder: Path, machine: str, date: str) -> Path:
    """Return the path of a new record without its suffix: the machine and the day, and a number from the second on."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") or "unknown"
    stem, number = folder / f"{slug}-{date}", 1
    while stem.with_name(f"{stem.name}.json").exists():
        number += 1
        stem = folder / f"{slug}-{date}-{number}"
    return stem


def write(check: Check, stem: Path) -> list[Path]:
    """Write the record and its page, and return their paths."""
    values = {"format": FORMAT, **asdict(check)}
    paths = [stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.md")]
    write_whole(paths[0], json.dumps(values, indent=1) + "\n")
    write_whole(paths[1], page(check))
    return paths


def read(path: Path) -> Check:
    """Return a record that :func:`write` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    found = values.pop("format", None)
    require(found == FORMAT, f"{path}: format", found, f"this release reads {FORMAT}")
    parts = [PartRecord(**{**part, "rows": tuple(Row(**row) for row in part["rows"])}) for part in values.pop("parts")]
    return Check(**values, parts=tuple(parts))


def page(check: Check) -> str:
    """Return the record as a Markdown page."""
    if check.device == "cuda":
        about = f"Made by `make gpu-check` of revision {check.revision}, in {check.seconds:.0f} of {TOTAL_S} seconds."
    else:
        about = f"A rehearsal on a CPU with tiny sizes, revision {check.revision}: its figures mean nothing."
    lines = [f"# {check.title}", "", about, "", *markdown([PART_COLUMNS, *map(_part_cells, check.parts)])]
    for part in check.parts:
        if part.rows:
            lines += ["", f"## {part.name}: {part.title}", "", *markdown(table_of(part.rows))]
    return "\n".join(lines) + "\n"


def text(check: Check, logs: Path) -> str:
    """Return the record for a terminal: each part's rows, then the parts, with the logs of those that failed."""
    lines = []
    for part in check.parts:
        if part.rows:
            lines += ["", f"{part.name}: {part.title}", *aligned(table_of(part.rows))]
    lines += ["", check.title, *aligned([PART_COLUMNS, *map(_part_cells, check.parts)])]
    for part in check.failed:
        lines.append(f"{part.name} failed: {part.note}")
        lines.append(f"  its log: {logs / part.log}")
    return "\n".join(lines)


PART_COLUMNS = ["part", "status", "seconds", "limit", "reason"]


def _part_cells(part: PartRecord) -> list[str]:
    return [part.name, part.status, f"{part.seconds:.1f}", f"{part.limit_s:g}", part.note]


def table_of(rows: Sequence[Row]) -> list[list[str]]:
    """Return rows as cells under their columns: name, values, and where a row was not measured or failed, the reason.

    Rows of one part may have different values, as those about the machine: they are then listed in words.
    """
    shapes = {tuple(row.values) for row in rows if row.values}
    if len(shapes) > 1 and not _nested(shapes):
        return [["what", "found"], *([row.name, _in_words(row)] for row in rows)]
    columns = list(_widest(shapes))
    noted = any(row.note for row in rows)
    cells = [["what", *columns, *(["reason"] if noted else [])]]
    for row in rows:
        values = [_cell(row.values.get(column)) if column in row.values else "" for column in columns]
        cells.append([row.name, *values, *([_reason(row)] if noted else [])])
    return cells


def _nested(shapes: set[tuple[str, ...]]) -> bool:
    """Return True if the columns of every row are among those of the widest."""
    widest = set(_widest(shapes))
    return all(set(shape) <= widest for shape in shapes)


def _widest(shapes: set[tuple[str, ...]]) -> tuple[str, ...]:
    return sorted(shapes, key=len)[-1] if shapes else ()


def _in_words(row: Row) -> str:
    values = ", ".join(f"{key} {_cell(value)}" for key, value in row.values.items())
    return " ".join(filter(None, [values, _reason(row)]))


def _reason(row: Row) -> str:
    return "" if row.status == "ok" else f"{row.status}: {row.note}"


def _cell(value: Value) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else value


def markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return cells, the first row of which are headings, as a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(cells[0]) + "|", *lines[1:]]


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """Return cells in columns; the last may be long."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]) - 1)]
    return ["  " + "  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in cells]
