"""One run of an experiment in a process of its own: training, measurements, and at last its record.

    python -m tools.experiments.unit FOLDER

The folder holds ``unit.json``, which says what to do (:class:`Order`). A repeated command continues the training. The
record, ``row.json``, is written at the very end: a folder that has it is complete.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from looplm.bounds import non_empty
from looplm.checkpoint import git_revision
from looplm.cli import from_dict, parse_config, positional_paths, run_main, to_dict
from looplm.config import RunConfig
from looplm.evaluation.record import Evaluation
from looplm.failures import NumericalFailure, UserError
from looplm.files import write_whole
from looplm.json_file import read_object
from looplm.lock import FolderLock
from pretrain import evaluate, train
from tools.experiments.figures import Results, figures_of, train_figures
from tools.experiments.measure import MeasureConfig, Trial, evaluations
from tools.experiments.rows import Row, write_row
from tools.experiments.runs import Size
from tools.machine import processor

ORDER, ROW, TIMES, MEASURED = "unit.json", "row.json", "seconds.txt", "measured"
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
        settings: fingerprint of the keys that make the run.
    """

    trial: Trial
    arm: str
    measure: MeasureConfig
    run: RunConfig
    settings: str = non_empty()

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
    """Train, measure, and write the record. A training that diverges is recorded too, without figures."""
    config_file, run = folder / "run.yaml", order.run
    write_whole(config_file, yaml.safe_dump(to_dict(run), sort_keys=False))
    begin, diverged = time.monotonic(), False
    try:
        train.main(["--config", str(config_file)])
    except NumericalFailure as failure:
        print(failure, file=sys.stderr)
        diverged = True
    finally:  # a stopped training leaves its time for the one that continues it
        with (folder / TIMES).open("a") as times:
            times.write(f"{time.monotonic() - begin:.1f}\n")
    seconds = sum(map(float, (folder / TIMES).read_text().split()))
    found = Results({}, {}) if diverged else _measured(order, folder)
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
        figures=found.figures,
        curves=found.curves,
        settings=order.settings,
        diverged=diverged,
    )
    write_row(folder / ROW, row)


def _measured(order: Order, folder: Path) -> Results:
    """Measure the checkpoint on each split, and return figures and curves."""
    figures, curves = train_figures(Path(order.run.output_dir) / "metrics.jsonl")
    (folder / MEASURED).mkdir(exist_ok=True)
    for split, config in evaluations(order.measure, order.run, order.trial).items():
        path = folder / MEASURED / f"{split}.json"
        config_file = path.with_suffix(".yaml")
        write_whole(config_file, yaml.safe_dump(to_dict(replace(config, output=str(path))), sort_keys=False))
        evaluate.main(["--config", str(config_file)])
        own = figures_of(split, Evaluation.read(path), order.run)
        figures, curves = figures | own.figures, curves | own.curves
    return Results(figures, curves)


if __name__ == "__main__":
    run_main(main)
