"""Execution of data steps by datatrove, on this machine or as Slurm job arrays.

Both look the same to the caller: :meth:`StepRunner.run` returns when every task is done. datatrove records finished
tasks in the log folder, so an interrupted run continues where it stopped.
"""

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from datatrove.utils.logging import setup_default_logger
from loguru import logger
from tqdm import tqdm

from data_pipeline.config import ExecutorConfig
from data_pipeline.folders import Folder
from data_pipeline.local_executor import FINISHED, LocalExecutor
from data_pipeline.slurm import run_on_slurm
from looplm.failures import UserError

_PLAIN_PATH = re.compile(r"[A-Za-z0-9_./+=,@~-]*")  # what datatrove's job scripts can hold without quotes


class StepRunner:
    """Runner of one datatrove pipeline after the other.

    Args:
        config: number of tasks and workers, and where they run.
        logs: folder that gets one folder per step, WORK/final/logs.
        verbose: let datatrove write to the terminal too.
    """

    def __init__(self, config: ExecutorConfig, logs: Path, verbose: bool = False) -> None:
        odd = "".join(sorted(set(_PLAIN_PATH.sub("", str(logs.resolve())))))
        if config.slurm is not None and odd:
            fix = "choose an output_dir of letters, digits and ./_+=,@~-"
            raise UserError(f"executor.slurm: {logs.resolve()} holds {odd!r}, which job scripts cannot carry; {fix}")
        self.config, self.logs, self.verbose = config, logs.resolve(), verbose
        self._reported = time.time()

    def run(self, name: str, pipeline: Sequence[Callable], tasks: int | None = None) -> list[Counter[str]]:
        """Run ``pipeline`` in ``tasks`` tasks, and return the counters of each datatrove step in it.

        Counters are summed over the tasks: "total", "forwarded", "dropped", "dropped_REASON".

        Raises:
            UserError: the data is at fault.
            StepFailed: a task's process was killed, or a Slurm job ended without finishing.
        """
        folder, tasks = self.logs / name, tasks or self.config.tasks
        folder.mkdir(parents=True, exist_ok=True)
        with _progress_bar(name, folder, tasks), nullcontext() if self.verbose else _log_to_file(folder):
            if self.config.slurm is None:
                executor = LocalExecutor if self.verbose else _QuietExecutor
                workers, work = min(self.config.workers, tasks), str(self.logs.parents[1])
                executor(list(pipeline), tasks, workers, Folder(str(folder)), work=work).run()
            else:
                run_on_slurm(self.config.slurm, name, list(pipeline), tasks, self.config.workers, folder)
        (folder / FINISHED).touch()
        return _counters(folder)

    def counts_by_task(self, name: str) -> list[list[Counter[str]]]:
        """Return the counters of each task of a step that has run."""
        return [_task_counters(path) for path in sorted((self.logs / name).glob("stats/*.json"))]

    def report(self, what: str, amount: int, note: str, unit: str = "documents") -> None:
        """Print one line: the amount that a step produced, the seconds since the previous line, and a note."""
        previous, self._reported = self._reported, time.time()
        print(f"{what:<24} {amount:>12,} {unit:<10} {self._reported - previous:7.1f} s  {note}", flush=True)


class _QuietExecutor(LocalExecutor):
    """datatrove's executor with the logs of its tasks in the step's folder: tasks reset loguru to write to stderr."""

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with _log_to_file(Path(self.logging_dir.path)):
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextmanager
def _log_to_file(folder: Path) -> Iterator[None]:
    """Send loguru's messages and datatrove's progress bars to a file; afterwards only warnings reach the terminal."""
    terminal = sys.stderr
    with (folder / "console.log").open("a", encoding="utf-8") as log, redirect_stderr(log):
        setup_default_logger()
        try:
            yield
        finally:
            logger.remove()
            logger.add(terminal, level="WARNING")


@contextmanager
def _progress_bar(name: str, folder: Path, tasks: int) -> Iterator[None]:
    """Show the number of finished tasks if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    done, terminal = threading.Event(), sys.stderr

    def watch() -> None:
        with tqdm(desc=name, total=tasks, unit="task", leave=False, file=terminal) as bar:
            while not done.wait(0.5):
                bar.n = sum(1 for _ in folder.glob("completions/*"))
                bar.refresh()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _counters(folder: Path) -> list[Counter[str]]:
    tasks = [_task_counters(path) for path in sorted(folder.glob("stats/*.json"))]
    return [sum(counters, Counter()) for counters in zip(*tasks, strict=True)]


def _task_counters(path: Path) -> list[Counter[str]]:
    counters = []
    for part in json.loads(path.read_text()):
        # A counter is a plain number, or an object with mean and more if it has a unit.
        stats = part["stats"].items()
        counters.append(Counter({key: value["total"] if isinstance(value, dict) else value for key, value in stats}))
    return counters
