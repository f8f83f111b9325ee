"""Stages of work on datatrove's executors: this machine by default, a Slurm job array by config.

Both look the same from here: :meth:`Stages.run` returns when every task is done. datatrove remembers finished tasks in
the log folder, so an interrupted run goes on where it stopped.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import setup_default_logger
from loguru import logger
from tqdm import tqdm

from data_pipeline.config import ExecutorConfig
from looplm.cli import UserError


class StageFailed(UserError):
    """A stage stopped for a reason outside the data; what is done stays on disk and the next run goes on from it."""


class Stages:
    """Runs pipelines one after the other.

    Args:
        config: where and in how many pieces.
        logs: folder that gets one folder per stage.
        verbose: let datatrove write to the terminal too.
    """

    def __init__(self, config: ExecutorConfig, logs: Path, verbose: bool = False) -> None:
        self.config, self.logs, self.verbose = config, logs.resolve(), verbose

    def run(self, name: str, steps: Sequence[PipelineStep], tasks: int | None = None) -> list[Counter[str]]:
        """Run ``steps`` as a pipeline in ``tasks`` pieces.

        Returns:
            Per step, datatrove's counters summed over the tasks ("total", "forwarded", "dropped", "dropped_REASON").

        Raises:
            UserError: the data was at fault.
            StageFailed: a Slurm job ended without finishing.
        """
        folder, tasks = self.logs / name, tasks or self.config.tasks
        folder.mkdir(parents=True, exist_ok=True)
        with _progress(name, folder, tasks), _chatter(folder / "console.log", self.verbose):
            if self.config.slurm is None:
                _LocalExecutor(
                    list(steps), tasks, min(self.config.workers, tasks), str(folder), verbose=self.verbose
                ).run()
            else:
                self._run_on_slurm(name, list(steps), tasks, folder)
        return _counters(folder)

    def _run_on_slurm(self, name: str, steps: list[PipelineStep], tasks: int, folder: Path) -> None:
        slurm = self.config.slurm
        assert slurm is not None
        root = Path(__file__).resolve().parents[1]  # jobs must find this package and this interpreter's scripts
        executor = SlurmPipelineExecutor(
            steps,
            tasks=tasks,
            time=slurm.time,
            partition=slurm.partition,
            cpus_per_task=slurm.cpus_per_task,
            mem_per_cpu_gb=slurm.mem_per_cpu_gb,
            workers=self.config.workers,
            job_name=f"looplm-{name}",
            qos=slurm.qos,
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{root}:$PYTHONPATH"',
            max_array_size=slurm.max_array_size,
            logging_dir=str(folder),
        )
        executor.run()
        while executor.get_incomplete_ranks():
            time.sleep(slurm.poll_seconds)
            waiting = subprocess.run(["squeue", "-h", "-j", str(executor.job_id)], capture_output=True, text=True)
            if not waiting.stdout.strip() and executor.get_incomplete_ranks():
                raise _failure(name, folder)


class _LocalExecutor(LocalPipelineExecutor):
    """datatrove's; its tasks log INFO to stderr whatever one sets, so that goes to the stage's folder."""

    def __init__(self, steps: list[PipelineStep], tasks: int, workers: int, logs: str, *, verbose: bool) -> None:
        super().__init__(steps, tasks=tasks, workers=workers, logging_dir=logs)
        self.verbose = verbose

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        with _chatter(Path(self.logging_dir.path) / "console.log", self.verbose):
            return super()._run_for_rank(rank, local_rank, node_rank)


@contextmanager
def _chatter(log: Path, verbose: bool) -> Iterator[None]:
    """Send loguru and datatrove's own progress bars to ``log``; only warnings reach the terminal afterwards."""
    if verbose:
        yield
        return
    terminal = sys.stderr
    with log.open("a", encoding="utf-8") as sink, redirect_stderr(sink):
        setup_default_logger()
        try:
            yield
        finally:
            logger.remove()
            logger.add(terminal, level="WARNING")


@contextmanager
def _progress(name: str, folder: Path, tasks: int) -> Iterator[None]:
    """A bar of finished tasks on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()

    def watch() -> None:
        with tqdm(desc=name, total=tasks, unit="task", leave=False, file=terminal) as bar:
            while not done.wait(0.5):
                bar.n = sum(1 for _ in folder.glob("completions/*"))
                bar.refresh()

    terminal = sys.stderr
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _counters(folder: Path) -> list[Counter[str]]:
    totals: list[Counter[str]] = []
    for path in sorted(folder.glob("stats/*.json")):
        steps = json.loads(path.read_text())
        totals = totals or [Counter() for _ in steps]
        for total, step in zip(totals, steps, strict=True):
            # a counter is a plain number, or an object with mean and more where it has a unit
            for key, value in step["stats"].items():
                total[key] += value["total"] if isinstance(value, dict) else value
    return totals


def _failure(name: str, folder: Path) -> UserError:
    """The mistake that a task on another machine reported, or where to look."""
    for log in sorted(folder.glob("logs/task_*.log")):
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if "UserError: " in line:
                return UserError(line.split("UserError: ", 1)[1])
    return StageFailed(f"stage {name}: its Slurm job ended before all tasks were done; see {folder} and run again")


def say(what: str, amount: int, note: str, started: float, unit: str = "documents") -> None:
    """One line on what a stage made of how much, and in what time."""
    print(f"{what:<24} {amount:>12,} {unit:<10} {time.time() - started:7.1f} s  {note}", flush=True)


def check_slurm() -> None:
    """Refuse a Slurm run where Slurm is not installed."""
    for command in ("sbatch", "squeue"):
        if shutil.which(command) is None:
            raise UserError(f"executor.slurm: {command} is not on this machine; start on a login node or leave it null")
