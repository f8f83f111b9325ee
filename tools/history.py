"""Record what the repeated commands took in docs/history.csv, and plot it.

``HISTORY=1 make test`` (``faults``, ``quickstart``, ``bench``) appends a row and redraws docs/history.svg if the
command succeeds. Without ``HISTORY`` nothing is recorded. ``python -m tools.history plot`` redraws the plot alone.
"""

import csv
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from looplm.bounds import require
from looplm.checkpoint import git_revision
from looplm.cli import run_main
from looplm.failures import StorageFailure, UserError
from looplm.files import sha256_of, write_whole

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE, PLOT = DOCS / "history.csv", DOCS / "history.svg"
EVALUATION = Path("runs/quickstart/evaluation.json")
RECORDED = ("test", "faults", "quickstart", "bench")
COLUMNS = ("date", "revision", "command", "seconds", "result", "machine")


def main(argv: list[str]) -> None:
    """``python -m tools.history plot`` or ``python -m tools.history NAME -- COMMAND...``"""
    if argv == ["plot"]:
        write_whole(PLOT, plot())
        print(PLOT)
    elif len(argv) > 2 and argv[1] == "--":
        sys.exit(record(argv[0], argv[2:]))
    else:
        raise UserError(f"{' '.join(argv)}: not understood; give plot, or NAME -- COMMAND, such as test -- pytest")


def record(name: str, command: list[str]) -> int:
    """Run ``command``, append its time and result if it succeeds, and return its exit status.

    Raises:
        UserError: nothing is recorded under this name; the command has not run.
    """
    require(name in RECORDED, "NAME", name, f"give one of {', '.join(RECORDED)}")
    start, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    seconds = time.monotonic() - start
    if process.returncode == 0 and (found := result(name, "".join(lines))):
        machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
        row = (date.today(), git_revision()[:7], f"make {name}", f"{seconds:.0f}", found, machine)
        try:
            append(row)
            write_whole(PLOT, plot())
        except (OSError, StorageFailure) as error:  # a read-only checkout is no reason to fail
            print(f"{TABLE}: not recorded ({error})", file=sys.stderr)
    return process.returncode


def append(row: Sequence[object]) -> None:
    """Add a row to the table, with a header to a new one."""
    with TABLE.open("a+", newline="", encoding="utf-8") as stream:
        stream.seek(0)
        before = stream.read()
        if before and not before.endswith("\n"):
            stream.write("\n")
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([row] if before else [COLUMNS, row])


def result(name: str, output: str) -> str:
    """Return the figures of a complete run from what it printed, or "" if it was not complete."""
    if name in ("test", "faults"):
        return "".join(re.findall(r"\d+ passed(?:, \d+ skipped)?", output)[-1:])
    if name == "quickstart":  # skipped phases would make its time meaningless
        depths = json.loads(EVALUATION.read_text())["depths"] if "quickstart 1/6" in output else []
        return " ".join(f"{row['loss']:.3f}" for row in depths)
    return "".join(re.findall(r"\d+ of \d+ aims met", output)[-1:])


def read_rows() -> list[dict[str, str]]:
    """Return the rows of the table, oldest first."""
    with TABLE.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def plot() -> str:
    """Return the minutes of each command over its runs as SVG; the table's hash in it shows whether it is stale.

    Rows whose seconds are no whole number are left out.

    Raises:
        UserError: no row is left.
    """
    rows = [row for row in read_rows() if (row.get("seconds") or "").isdecimal() and row.get("command")]
    if not rows:
        raise UserError(f"{TABLE}: has no row with seconds; restore it from git")
    commands = list(dict.fromkeys(row["command"] for row in rows))
    figure = Figure(figsize=(8, 2.4 * len(commands)), layout="constrained")
    for axes, command in zip(figure.subplots(len(commands), squeeze=False)[:, 0], commands, strict=True):
        runs = [row for row in rows if row["command"] == command]
        minutes = [int(row["seconds"]) / 60 for row in runs]
        axes.plot(minutes, "o-")
        axes.set_xticks(range(len(runs)), [f"{row['date'][5:]}\n{row['revision']}" for row in runs], fontsize=7)
        axes.set(title=command, ylabel="minutes", ylim=(0, 1.15 * max(minutes) or 1))
        axes.grid(alpha=0.3)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "history"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Description": sha256_of(TABLE)})
    return stream.getvalue()


if __name__ == "__main__":
    run_main(main)
