"""One run of an experiment in a process of its own: training, measurements, and at last its record.

    python -m tools.experiments.unit FOLDER

The folder holds ``unit.json``, which says what to do (:class:`Order`). A repeated command continues the training. The
record, ``row.json``, is written at the very end: a folder that has it is complete.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from looplm.checkpoint import git_revision
from looplm.cli import UserError, from_dict, parse_config, positional_paths, run_main, to_dict
from looplm.config import DataConfig, RunConfig
from looplm.evaluation.record import Evaluation
from looplm.files import write_whole
from looplm.json_file import read_object
from looplm.lock import FolderLock
from pretrain import evaluate, train
from tools.experiments.figures import figures_of, train_figures
from tools.experiments.rows import Row, write_row
from tools.experiments.runs import MeasureConfig, Size, merged
from tools.machine import processor

ORDER, ROW, TIMES = "unit.json", "row.json", "seconds.txt"
BUSY = 75  # exit status if another process has the folder


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """The run.

    Args:
        folder: of the run, with its unit.json.
    """

    folder: Path = positional_paths("FOLDER")


@dataclass(frozen=True, kw_only=True)
class Order:
    """The work of one process: a training, and what is measured after it.

    Args:
        trial: a run of the sweep, or one whose figures count.
        arm: name of the arm.
        measure: what is measured.
        run: what pretrain.train gets.
    """

    trial: Literal["sweep", "final"]
    arm: str
    measure: MeasureConfig
    run: RunConfig

    def write(self, folder: Path) -> None:
        """Write the order."""
        write_whole(folder / ORDER, json.dumps(to_dict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> "Order":
        """Read the order."""
        values = read_object(folder / ORDER, "remove the folder and repeat tools.experiment run")
        return from_dict(cls, values, where=str(folder / ORDER))


def main(argv: list[str]) -> None:
    """``python -m tools.experiments.unit FOLDER``"""
    folder = parse_config(UnitConfig, argv, prog="python -m tools.experiments.unit", description=str(__doc__)).folder
    order, lock = Order.read(folder), FolderLock(folder, str(folder), say=print)
    try:
        lock.acquire()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(BUSY)
    try:
        if not (folder / ROW).exists():
            _complete(folder, order)
    finally:
        lock.release()


def _complete(folder: Path, order: Order) -> None:
    """Train, measure, and write the record."""
    config_file, run = folder / "run.yaml", order.run
    write_whole(config_file, yaml.safe_dump(to_dict(run), sort_keys=False))
    begin = time.monotonic()
    try:
        train.main(["--config", str(config_file)])
    finally:  # a stopped training leaves its time for the one that continues it
        with (folder / TIMES).open("a") as times:
            times.write(f"{time.monotonic() - begin:.1f}\n")
    seconds = sum(map(float, (folder / TIMES).read_text().split()))
    figures, curves = train_figures(Path(run.output_dir) / "metrics.jsonl")
    for split, evaluation in _evaluations(order, folder):
        own = figures_of(split, evaluation, run)
        figures, curves = figures | own.figures, curves | own.curves
    size = Size.of(run)
    row = Row(
        arm=order.arm,
        seed=run.seed,
        trial=order.trial,
        lr=run.optim.lr,
        parameters=size.parameters,
        flops_per_token=size.flops_per_token,
        steps=run.optim.train_steps,
        tokens=size.trained_tokens,
        seconds=round(seconds, 1),
        machine=f"{processor()}, {torch.get_num_threads()} threads",
        commit=git_revision() or "unknown",
        figures=figures,
        curves=curves,
    )
    write_row(folder / ROW, row)


def _evaluations(order: Order, folder: Path) -> Iterator[tuple[str, Evaluation]]:
    """Measure the checkpoint; yield the name of each split and its results. A trial is measured on validation only."""
    measure, run = order.measure, order.run
    splits: dict[str, dict[str, Any]] = {"valid": {}}
    if order.trial == "final":
        splits |= {"test": {}, **measure.tests}
    for split, changes in splits.items():
        output = folder / f"{split}.json"
        data = from_dict(DataConfig, merged(to_dict(run.data), changes), where=f"measure.tests.{split}")
        loops = run.model.num_loops
        depth = loops if split == "valid" else measure.depth_factor * loops
        config: dict[str, Any] = {
            "checkpoint": run.output_dir,
            "depths": ",".join(map(str, range(1, depth + 1))),
            "samples": measure.samples,
            "batch_size": min(measure.batch_size, measure.samples),
            "seq_length": data.seq_length,
            "task": to_dict(data.task) if data.task is not None else None,
            "valid": data.valid[0].prefix if data.valid else None,
            "split": "valid" if split == "valid" or data.task is None else "test",
            "refit_steps": measure.refit_steps if split == "test" else 0,
            "votes": ",".join(map(str, measure.votes)) if split == "test" else "",
            "output": str(output),
        }
        if split == "test" and measure.kv_caches:
            config |= {"kv_caches": ",".join(measure.kv_caches), "prompt_tokens": measure.prompt_tokens}
        path = folder / f"{split}.yaml"
        write_whole(path, yaml.safe_dump(config, sort_keys=False))
        evaluate.main(["--config", str(path)])
        yield split, Evaluation.read(output)


if __name__ == "__main__":
    run_main(main)
