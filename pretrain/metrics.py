"""What a run tells: JSON lines, TensorBoard curves, and a progress bar (plain lines where there is no terminal)."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from looplm.accounting import training_flops_per_token
from looplm.config import RunConfig
from looplm.megatron import device
from pretrain.step import StepStats


class RunLog:
    """Writes ``metrics.jsonl`` and ``tensorboard/`` of a run, and shows where it stands. Silent off rank 0.

    Args:
        config: of the run.
        folder: where it writes.
        speaks: whether this process is the one that writes.
        first_step: steps already done when the run resumed; later lines of metrics.jsonl are dropped.
        first_tokens: tokens read by then.
        world_size: devices, for utilisation.
    """

    def __init__(
        self, config: RunConfig, folder: Path, speaks: bool, first_step: int, first_tokens: int, world_size: int
    ) -> None:
        self.speaks, self.total = speaks, config.optim.train_steps
        self.every, self._tokens = config.logging.log_every, first_tokens
        self.restart_clock()
        self._objective = config.loss.objective
        self._flops_per_token = training_flops_per_token(
            config.model,
            config.gate,
            config.data.seq_length,
            config.model.num_loops,
            frozen_trunk=config.loss.frozen_trunk,
        )
        if not speaks:
            return
        peak = config.logging.peak_tflops
        self._peak = (1e12 * peak if peak else device.peak_flops()) * world_size
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / "metrics.jsonl"
        _drop_lines_after(self._lines, first_step)
        purge = first_step + 1 if first_step else None
        self._board = (
            SummaryWriter(str(folder / "tensorboard"), purge_step=purge) if config.logging.tensorboard else None
        )
        self._bar = tqdm(total=self.total, initial=first_step, unit="step") if sys.stderr.isatty() else None

    def train(self, step: int, samples: int, tokens: int, stats: StepStats, grad_norm: float, lr: float) -> None:
        """Record one training step; ``tokens`` counts every token read since the run began."""
        if not self.speaks:
            return
        self._tokens = tokens
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {stats.loss:.3f} depth {stats.mean_depth:.2f}")
        if step % self.every and step != self.total:
            return
        now = time.perf_counter()
        seconds, speed = now - self._window_start, (tokens - self._window_first) / (now - self._window_start)
        self.restart_clock()
        row: dict[str, Any] = {"kind": "train", "step": step, "samples": samples, "objective": self._objective}
        row |= dataclasses.asdict(stats) | {"tokens": tokens, "grad_norm": grad_norm, "learning_rate": lr}
        row |= {"tokens_per_second": speed, "seconds": seconds}
        if self._peak:
            row["mfu"] = speed * self._flops_per_token / self._peak
        self._write(row)
        if self._bar is None:
            self.say(
                f"step {step}/{self.total}  loss {stats.loss:.4f}  per loop {_numbers(stats.loss_per_loop)}  "
                f"mean depth {stats.mean_depth:.2f}  grad {grad_norm:.2f}  lr {lr:.2e}  {speed:,.0f} tokens/s"
            )

    def valid(self, step: int, stats: StepStats) -> None:
        """Record a validation."""
        if not self.speaks:
            return
        self._write({"kind": "valid", "step": step, **dataclasses.asdict(stats)})
        self.say(f"step {step}/{self.total}  validation {stats.loss:.4f}  per loop {_numbers(stats.loss_per_loop)}")
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last line (a validation, a save) out of the training speed."""
        self._window_start, self._window_first = time.perf_counter(), self._tokens

    def say(self, message: str) -> None:
        """One line for the person who watches; rank 0 only."""
        if self.speaks:
            tqdm.write(message, file=sys.stderr)

    def close(self) -> None:
        """Flush and end the bar."""
        if self.speaks:
            for part in (self._board, self._bar):
                if part is not None:
                    part.close()

    def _write(self, row: dict[str, Any]) -> None:
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self._board is None:
            return
        for key, value in row.items():
            if isinstance(value, list):
                for loop, item in enumerate(value, start=1):
                    self._board.add_scalar(f"{row['kind']}/{key}/{loop}", item, row["step"])
            elif isinstance(value, float):
                self._board.add_scalar(f"{row['kind']}/{key}", value, row["step"])


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def _drop_lines_after(path: Path, step: int) -> None:
    """A run that resumes repeats steps done since its checkpoint; each step stands once."""
    if not path.exists():
        return
    rows = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    path.write_text("".join(line + "\n" for line in rows), encoding="utf-8")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # cut off by a kill
        return float("inf")
