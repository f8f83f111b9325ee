"""Log of a run: JSON lines, TensorBoard curves, and a progress bar (plain lines if stderr is no terminal)."""

import dataclasses
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from looplm.accounting import training_flops_per_token
from looplm.config import RunConfig
from looplm.evaluation.dynamics import LoopDynamics
from looplm.failures import StorageFailure
from looplm.files import storage_failure, write_whole, writing
from looplm.megatron import device, process_groups
from pretrain.health import BadStep, finite_or_null
from pretrain.progress import Progress
from pretrain.spikes import Spike
from pretrain.step import StepStats
from pretrain.trainer import Step

ROLLED_BACK = "rolled_back.jsonl"  # lines of steps that a rollback has undone


class RunLog:
    """Writer of ``metrics.jsonl`` and ``tensorboard/`` in ``output_dir``, and progress display. Only rank 0 writes.

    Args:
        config: the run's.
        start: where the run starts or resumes; lines of metrics.jsonl after that step are dropped.

    Attributes:
        failure: of the disk, if something could not be written. Nothing is raised here: the other ranks would wait for
            this one. All ranks look at it together.
    """

    failure: StorageFailure | None = None

    def __init__(self, config: RunConfig, start: Progress) -> None:
        self.enabled, self._config, self._total = process_groups.is_rank_0(), config, config.optim.train_steps
        self._tokens = start.tokens
        self.restart_clock()
        if not self.enabled:
            return
        peak = config.logging.peak_tflops
        self._peak = (1e12 * peak if peak else device.peak_flops()) * dist.get_world_size()
        folder = Path(config.output_dir)
        self._path = folder / "metrics.jsonl"
        self._board: SummaryWriter | None = None
        with self._noted_failure():
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, start)
            _drop_rollbacks_after(self._path.with_name(ROLLED_BACK), start)
            self._open_board(start.step)
        self._bar = tqdm(total=self._total, initial=start.step, unit="step") if sys.stderr.isatty() else None

    def train(self, progress: Progress, done: Step, loops: int) -> None:
        """Record the training step of ``loops`` loops that led to ``progress``."""
        if not self.enabled:
            return
        self._window_flops += (progress.tokens - self._tokens) * self._flops_per_token(loops)
        step, stats, self._tokens = progress.step, done.stats, progress.tokens
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {stats.loss:.3f} depth {stats.mean_depth:.2f}")
        if step % self._config.logging.log_every and step != self._total:
            return
        seconds = time.perf_counter() - self._window_start
        speed, flops = (self._tokens - self._window_first) / seconds, self._window_flops / seconds
        self.restart_clock()
        row = {"kind": "train", "step": step, "samples": progress.samples, "objective": self._config.loss.objective}
        row |= dataclasses.asdict(stats) | dataclasses.asdict(done.norms) | {"tokens": self._tokens}
        row |= {"grad_norm": done.norms.grad_norm, "learning_rate": done.learning_rate}
        row |= {"skipped": progress.health.skipped, "tokens_per_second": speed, "seconds": seconds}
        if self._peak:
            row["mfu"] = flops / self._peak
        if self._config.loss.varies_loops:
            row["loops"] = loops
        self._write(row)
        if self._bar is None:
            self.say(
                f"step {step}/{self._total}  loss {stats.loss:.4f}  per loop {_format(stats.loss_per_loop)}  "
                f"mean depth {stats.mean_depth:.2f}  grad {done.norms.grad_norm:.2f}  lr {done.learning_rate:.2e}  "
                f"{speed:,.0f} tokens/s"
            )

    def skipped(self, bad: BadStep) -> None:
        """Record a step whose update was skipped."""
        if self.enabled:
            self._write({"kind": "skipped", "step": bad.step, "samples": bad.samples, "what": bad.what})

    def spike(self, spike: Spike) -> None:
        """Record a loss spike after which the run continues."""
        if self.enabled:
            self._write({"kind": "spike"} | dataclasses.asdict(spike))
            self.say(f"{spike}; training continues (health.max_rollbacks=0)")

    def roll_back(self, progress: Progress, spike: Spike) -> None:
        """Record the return to ``progress``: later lines move to rolled_back.jsonl, and their steps will come again."""
        self._tokens = progress.tokens
        if not self.enabled:
            return
        windows = progress.health.skipped_samples
        with self._noted_failure():
            dropped = _drop_lines_after(self._path, progress)
            with self._path.with_name(ROLLED_BACK).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"rollback": len(windows), **_parse(line)}) + "\n" for line in dropped)
            if self._board is not None:
                self._board.close()
            self._open_board(progress.step)
        row = {"kind": "rollback", "step": progress.step, "skipped_samples": windows[-1]}
        self._write(row | {"spike": dataclasses.asdict(spike)})
        if self._bar is not None:
            self._bar.update(progress.step - self._bar.n)
        self.restart_clock()

    def valid(self, progress: Progress, stats: StepStats, dynamics: LoopDynamics | None) -> None:
        """Record a validation."""
        if not self.enabled:
            return
        row = {"kind": "valid", "step": progress.step, **dataclasses.asdict(stats)}
        self._write(row if dynamics is None else row | dataclasses.asdict(dynamics))
        where = f"step {progress.step}/{self._total}"
        self.say(f"{where}  validation {stats.loss:.4f}  per loop {_format(stats.loss_per_loop)}")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last training line (a validation, a save) from the training speed."""
        self._window_start, self._window_first, self._window_flops = time.perf_counter(), self._tokens, 0.0

    def say(self, message: str) -> None:
        """Print one line on rank 0's stderr."""
        if self.enabled:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush TensorBoard and end the progress bar."""
        if self.enabled:
            for output in (self._board, self._bar):
                if output is not None:
                    with self._noted_failure():
                        output.close()

    def _flops_per_token(self, loops: int) -> float:
        config = self._config
        return training_flops_per_token(config.model, config.gate, config.loss, config.data.seq_length, loops)

    def _open_board(self, step: int) -> None:
        """Continue the curves after ``step``."""
        if self._config.logging.tensorboard:
            threading.excepthook = _hide_disk_failure
            folder = str(self._path.with_name("tensorboard"))
            self._board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    @contextmanager
    def _noted_failure(self) -> Iterator[None]:
        try:
            with writing(self._path):
                yield
        except StorageFailure as failure:
            self.failure = self.failure or failure

    def _write(self, row: dict[str, Any]) -> None:
        with self._noted_failure():
            self._write_row(finite_or_null(row))

    def _write_row(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._board is None:
            return
        for key, value in row.items():
            if isinstance(value, list):
                value = dict(enumerate(value, start=1))
            points = value if isinstance(value, dict) else {None: value}
            for part, item in points.items():
                if isinstance(item, float):
                    name = f"{row['kind']}/{key}" if part is None else f"{row['kind']}/{key}/{part}"
                    self._board.add_scalar(name, item, row["step"])


def _hide_disk_failure(arguments: threading.ExceptHookArgs) -> None:
    """Print no traceback for a full disk in TensorBoard's thread: its next call raises the same error again."""
    error = arguments.exc_value
    if error is None or storage_failure(error, Path()) is None:
        threading.__excepthook__(arguments)


def last_validation(path: Path) -> int:
    """Return the last step for which a metrics.jsonl holds a validation; -1 if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [_step_of(line) for line in lines if '"kind": "valid"' in line]
    return max((int(step) for step in steps if step < math.inf), default=-1)


def _format(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _drop_lines_after(path: Path, progress: Progress) -> list[str]:
    """Keep the lines up to a position, because a run repeats the later steps; return those that were dropped.

    A rollback that the position does not know of is dropped too: the run will repeat it.
    """
    known = [None, *map(list, progress.health.skipped_samples)]

    def is_kept(line: str) -> bool:
        row = _parse(line)
        return _step_of(line) <= progress.step and row.get("skipped_samples") in known

    return _keep_lines(path, is_kept)


def _drop_rollbacks_after(path: Path, progress: Progress) -> None:
    _keep_lines(path, lambda line: _parse(line).get("rollback", math.inf) <= len(progress.health.skipped_samples))


def _keep_lines(path: Path, is_kept: Callable[[str], bool]) -> list[str]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if is_kept(line)]
    if len(kept) < len(lines):
        write_whole(path, "".join(line + "\n" for line in kept))
    return [line for line in lines if not is_kept(line)]


def _parse(line: str) -> dict[str, Any]:
    """Return a line's object; an empty one for a line that a killed process left half written."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _step_of(line: str) -> float:
    return float(_parse(line).get("step", math.inf))
