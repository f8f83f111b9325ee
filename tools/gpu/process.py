"""Run a part in a process of its own, and say how it ended. This file imports no torch: its absence is a result too."""

import faulthandler
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from tools.gpu.parts import PARTS, DeviceName, Job, Part
from tools.gpu.record import PartRecord, read_rows, short, status_of

_BEFORE_KILL_S = 2.0  # a part that hangs writes its stack to the log so long before it is killed
_ON_A_CPU = 4  # times the limit: many things may run beside a rehearsal
_MEASURING = 0.85  # of its limit, after which a part begins no further measurement


def run_part(part: Part, device: DeviceName, folder: Path) -> PartRecord:
    """Run a part and return its record; whatever it does, this returns within the part's limit and a few seconds.

    Args:
        part: is started unless a package that it needs is missing.
        device: where it must run.
        folder: of this check's logs; the part's own files are removed again.
    """
    if part.missing:
        missing = " and ".join(part.missing)
        note = f"{missing}: not installed here (setup.py, [gpu])"
        return PartRecord(
            name=part.name, title=part.title, status="not run", seconds=0, limit_s=part.limit_s, note=note
        )
    log, work = folder / f"{part.name}.log", folder / f"{part.name}.work"
    work.mkdir(parents=True)
    start = time.monotonic()
    limit_s = part.limit_s * (_ON_A_CPU if device == "cpu" else 1)
    job = Job(
        part=part.name,
        variant=part.variant,
        device=device,
        rows=work / "rows.jsonl",
        folder=work,
        deadline=start + _MEASURING * limit_s,
    )
    process = _context(device).Process(target=child, args=(part, job, log, limit_s))
    process.start()
    process.join(limit_s)
    fault = _fault(process, limit_s, log)
    rows = read_rows(job.rows)
    shutil.rmtree(work, ignore_errors=True)
    reasons = [fault, *(row.note for row in rows if row.status == "failed")]
    unmet = [row.note for row in rows if row.status == "not run"]
    status = status_of(rows, fault)
    note = next(filter(None, reasons if status == "failed" else unmet), "")
    return PartRecord(
        name=part.name,
        title=part.title,
        status=status,
        seconds=round(time.monotonic() - start, 1),
        limit_s=limit_s,
        note=note,
        log=log.name,
        rows=rows,
    )


def _context(device: DeviceName) -> SpawnContext | ForkServerContext:
    """Return how processes start: on a GPU each from nothing; on a CPU from a server that has imported everything once.

    A process that was forked after CUDA was asked for cannot use it.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({part.module for part in PARTS.values()}))
    return context


def child(part: Part, job: Job, log: Path, limit_s: float) -> None:
    """Run a part as its process does: everything that it prints, from the first import on, goes to ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # it is a text file by now
    os.setsid()  # so that whatever it starts is killed with it
    os.environ.update(part.environment)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(limit_s - _BEFORE_KILL_S, 0.1))
    # By name, so that a missing package fails one part and lands in its log.
    importlib.import_module(part.module).run(job)
    faulthandler.cancel_dump_traceback_later()


def _fault(process: multiprocessing.process.BaseProcess, limit_s: float, log: Path) -> str:
    """Return what went wrong with a part's process, or an empty string; afterwards it has ended."""
    if process.exitcode is None:
        _kill(process)
        return f"stopped after its limit of {limit_s:g} s; the log ends with where it was"
    if process.exitcode < 0:
        return f"ended by {signal.Signals(-process.exitcode).name}; last line: {last_line(log)}"
    return last_line(log) if process.exitcode else ""


def _kill(process: multiprocessing.process.BaseProcess) -> None:
    assert process.pid is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not made a group of its own yet
        process.kill()
    process.join()


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty: of a traceback, the error."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return short(lines[-1]) if lines else "it printed nothing"
