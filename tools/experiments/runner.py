"""Runs what is left of an experiment, several processes side by side; each run can be killed and continues later.

Runners may share a folder, as the tasks of a Slurm array do: a run that another process holds is passed over.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from looplm.checkpoint import check_fit, step_folder
from looplm.failures import UserError
from tools.experiments.rows import Row, merge_rows, read_row, read_rows
from tools.experiments.runs import ExperimentConfig, Size, Unit, config_of, final_units, settings_of, sweep_units
from tools.experiments.unit import BUSY, ORDER, ROW, Order

_LOOK_AGAIN = 0.5  # seconds between two looks at the processes


class Runner:
    """An experiment in a folder.

    Args:
        config: the experiment.
        folder: of its runs.
        record: the file of its records, docs/evidence/NAME.jsonl; runs that it has are not repeated.
    """

    def __init__(self, config: ExperimentConfig, folder: Path, record: Path) -> None:
        self.config, self.folder, self.record = config, folder, record
        self._read = dict[Path, Row]()
        self._checked = set[tuple[str, str, int, int]]()  # records that are of this experiment

    def rows(self) -> tuple[Row, ...]:
        """Return the records of the experiment's runs: those of the file, and those of the folder that it lacks.

        Those of retired arms are at the end.

        Raises:
            UserError: a record is of an arm that the experiment lacks, was made with other settings, or at another rate
                than the best, because the sweep has more rates now.
        """
        for path in sorted(self.folder.glob(f"*/{ROW}")):
            if path not in self._read:
                self._read[path] = read_row(path)
                self._check(self._read[path], path)
        recorded = read_rows(self.record) if self.record.exists() else ()
        for row in recorded:
            self._check(row, self.record)
        found = [*recorded, *self._read.values()]
        first = {Unit(row.trial, row.arm, row.seed, row.lr): row for row in reversed(found)}  # the file's own, if any
        known = [first[unit] for unit in sweep_units(self.config) if unit in first]
        self._refuse_other_rates(found, known)
        runs = [first[unit] for unit in final_units(self.config, known) if unit in first]
        retired = [row for unit, row in first.items() if unit.arm not in self.config.live_arms]
        return (*known, *runs, *retired)

    def merge(self) -> tuple[Row, ...]:
        """Add the folder's records to the file, and return those of :meth:`rows`."""
        rows = self.rows()
        merge_rows(self.record, rows)
        return rows

    def missing(self, rows: Sequence[Row]) -> list[Unit]:
        """Return the runs that can be started: without a record, and final ones only of arms whose rate is known."""
        units = [*sweep_units(self.config), *final_units(self.config, rows)]
        return [unit for unit in units if not any(unit.is_of(row) for row in rows)]

    @property
    def total(self) -> int:
        """Number of runs, without those of retired arms."""
        return len(sweep_units(self.config)) + len(self.config.seeds) * len(self.config.live_arms)

    def done(self, rows: Sequence[Row]) -> int:
        """Return how many of these runs have a record."""
        return sum(row.arm in self.config.live_arms for row in rows)

    def run(self, jobs: int) -> None:
        """Run everything that is missing, ``jobs`` processes at a time.

        Raises:
            UserError: the checkpoint that an arm begins with is missing or does not fit, before anything runs; or a run
                failed: the others are stopped, and continue when the command is repeated.
        """
        rows = self.rows()
        self._check_initial(self.missing(rows))
        before = signal.signal(signal.SIGTERM, _interrupted)  # as Ctrl-C: the runs are told, save, and continue later
        running, elsewhere = dict[Unit, subprocess.Popen[bytes]](), dict[Unit, float]()
        with tqdm(total=self.total, initial=self.done(rows), unit="run", disable=None) as bar:
            try:
                while True:
                    for unit, status in _ended(running):
                        del running[unit]
                        if status == BUSY:
                            elsewhere[unit] = time.monotonic()
                        elif status != 0:
                            log = self.folder / unit.name / "log.txt"
                            raise UserError(f"{unit.name} ended with status {status}; see {log}")
                        else:
                            rows = self.rows()
                            bar.update(self.done(rows) - bar.n)
                            _say(bar, unit, rows)
                    missing = self.missing(rows)
                    if not missing and not running:
                        return
                    for unit in missing:
                        waits = time.monotonic() - elsewhere.get(unit, -1e9) < 30
                        if len(running) < jobs and unit not in running and not waits:
                            running[unit] = self._start(unit)
                    time.sleep(_LOOK_AGAIN)
                    if elsewhere:
                        rows = self.rows()
            finally:
                _stop(list(running.values()))
                signal.signal(signal.SIGTERM, before)

    def _check(self, row: Row, path: Path) -> None:
        """Raise unless a record is one of the experiment as it is now."""
        key = row.label, row.settings, row.parameters, row.tokens
        if key in self._checked:
            return
        fix = "restore the experiment's file, or remove the record"
        if row.arm not in self.config.arms:
            raise UserError(f"{path}: {row.label}: the experiment has no such arm; {fix}")
        same = row.settings == settings_of(self.config, row.arm)
        if same and row.arm in self.config.live_arms:
            size = Size.of(config_of(self.config, Unit(row.trial, row.arm, row.seed, row.lr), self.folder))
            same = (row.parameters, row.tokens) == (size.parameters, size.trained_tokens)
        if not same:
            raise UserError(f"{path}: {row.label}: was made with other settings than the experiment has now; {fix}")
        self._checked.add(key)

    def _check_initial(self, units: Sequence[Unit]) -> None:
        """Raise unless the checkpoints that runs begin with are whole and fit their arms."""
        for arm in {unit.arm: None for unit in units}:
            run = self.config.run_config(arm)
            try:
                if run.checkpoint.initial is not None:
                    check_fit(step_folder.locate(run.checkpoint.initial), run.model, run.gate)
            except UserError as error:
                raise UserError(f"arms.{arm}: checkpoint.initial: {error}") from error

    def _refuse_other_rates(self, found: Sequence[Row], trials: Sequence[Row]) -> None:
        """Raise if a final run was made at another rate than the best: a run at the best would be its double."""
        for unit in final_units(self.config, trials):
            for row in found:
                if (row.trial, row.arm, row.seed) == (unit.trial, unit.arm, unit.seed) and not unit.is_of(row):
                    fix = f"remove the run's record and its folder, or the rates that made {unit.lr:g} the best"
                    raise UserError(f"{self.record}: {row.label}: the best of the sweep's rates is {unit.lr:g}; {fix}")

    def _start(self, unit: Unit) -> subprocess.Popen[bytes]:
        folder = self.folder / unit.name
        folder.mkdir(parents=True, exist_ok=True)
        run, settings = config_of(self.config, unit, folder), settings_of(self.config, unit.arm)
        order = Order(trial=unit.trial, arm=unit.arm, measure=self.config.measure, run=run, settings=settings)
        if (folder / ORDER).exists():
            try:
                begun = Order.read(folder).settings
            except UserError as error:
                raise UserError(f"{folder}: was begun by another release; remove the folder ({error})") from error
            if begun != settings:
                raise UserError(f"{folder}: was begun with other settings ({begun}, now {settings}); remove the folder")
        order.write(folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tools.experiments.unit", str(folder)]
        with (folder / "log.txt").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        keep_niceness(process.pid, os.nice(0))
        return process


def keep_niceness(pid: int, niceness: int) -> None:
    """Give the session of a process the niceness of its runner.

    Linux shares its cores among sessions, and a new one starts at 0: without this, runs of a runner at ``nice -n 19``
    take as much time as whatever else the machine does. Does nothing where sessions are not scheduled so.
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness), encoding="ascii")


def _interrupted(number: int, _: object) -> None:
    sys.exit(128 + number)


def _ended(running: dict[Unit, subprocess.Popen[bytes]]) -> Iterator[tuple[Unit, int]]:
    for unit, process in list(running.items()):
        status = process.poll()
        if status is not None:
            yield unit, status


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask all to save and end, and wait for them."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _say(bar: "tqdm[Any]", unit: Unit, rows: Sequence[Row]) -> None:
    row = next(row for row in rows if unit.is_of(row))
    shown = [f"{name} {row.figures[name]:.4f}" for name in ("valid.loss", "test.accuracy") if name in row.figures]
    shown += ["diverged"] * row.diverged
    bar.write(f"{unit.name:<40} {', '.join(shown)}  {row.seconds / 60:.1f} min")
