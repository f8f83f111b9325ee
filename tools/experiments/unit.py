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

from data_pipeline.synthetic.capo import bits_learned, losses_of
from looplm.checkpoint import git_revision
from looplm.cli import UserError, from_dict, parse_config, positional_paths, run_main, to_dict
from looplm.config import DataConfig, RunConfig
from looplm.evaluation.record import Evaluation
from looplm.files import write_whole
from looplm.json_file import read_object
from looplm.lock import FolderLock
from pretrain import evaluate, train
from tools.experiments.rows import Row, write_row
from tools.experiments.runs import MeasureConfig, Size, merged

ORDER, ROW, TIMES = "unit.json", "row.json", "seconds.txt"
BUSY = 75  # exit status if another process has the folder
_POINTS = 50  # of a training curve


@dataclass(frozen=True, kw_only=True)
class UnitConfig:
    """The run.

    Args:
        folder: of the run, with its unit.json.
    """

    folder: Path = positional_paths("FOLDER")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to run, train and measure.

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
    own, run = folder / "run.yaml", order.run
    write_whole(own, yaml.safe_dump(to_dict(run), sort_keys=False))
    begin = time.monotonic()
    try:
        train.main(["--config", str(own)])
    finally:  # a stopped training leaves its time for the one that continues it
        with (folder / TIMES).open("a") as times:
            times.write(f"{time.monotonic() - begin:.1f}\n")
    seconds = sum(map(float, (folder / TIMES).read_text().split()))
    figures, curves = _train_figures(Path(run.output_dir) / "metrics.jsonl")
    for split, evaluation in _evaluations(order, folder):
        own_figures, own_curves = _figures(split, evaluation, run.model.num_loops)
        own_figures |= _capo_figures(split, own_figures, run)
        figures, curves = figures | own_figures, curves | own_curves
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
        machine=f"{_processor()}, {torch.get_num_threads()} threads",
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
            "output": str(output),
        }
        if split == "test" and measure.kv_caches:
            config |= {"kv_caches": ",".join(measure.kv_caches), "prompt_tokens": measure.prompt_tokens}
        path = folder / f"{split}.yaml"
        write_whole(path, yaml.safe_dump(config, sort_keys=False))
        evaluate.main(["--config", str(path)])
        yield split, Evaluation.read(output)


def _figures(split: str, found: Evaluation, loops: int) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Return an evaluation as figures at the trained depth, and as curves."""
    losses = {at.depth: at.loss for at in found.depths}
    figures = {f"{split}.loss": losses[loops]}
    curves: dict[str, tuple[float, ...]] = {
        f"{split}.loss by depth": tuple(losses.values()),
        f"{split}.exit probability by depth": found.exit_distribution,
    }
    for row in found.decoding or ():
        name = f"{row.kv_cache}" if row.exit_threshold == 1 else f"{row.kv_cache},threshold={row.exit_threshold:g}"
        figures[f"{split}.loss@cache={name}"] = row.loss
        if row.accuracy is not None:
            figures[f"{split}.accuracy@cache={name}"] = row.accuracy
    answers = found.answers
    if answers is None:
        return figures, curves
    for at in answers.depths:
        figures[f"{split}.accuracy@depth={at.depth}"] = at.accuracy
        curves[f"{split}.accuracy@depth={at.depth} by level"] = at.accuracy_by_level
    trained = answers.depths[loops - 1]
    figures |= {f"{split}.accuracy": trained.accuracy, f"{split}.whole_samples": trained.whole_samples}
    for name, attribute in (
        ("accuracy", "accuracy"),
        ("whole samples", "whole_samples"),
        ("state change", "state_change"),
        ("state cosine", "state_cosine"),
        ("divergence", "divergence"),
        ("answers changed", "answers_changed"),
    ):
        curves[f"{split}.{name} by depth"] = tuple(getattr(at, attribute) for at in answers.depths)
    levels = tuple(map(float, answers.levels.levels))
    curves |= {f"{split}.levels": levels, f"{split}.accuracy by level": trained.accuracy_by_level}
    curves[f"{split}.exit depth by level"] = answers.levels.expected_depth
    for level, accuracy, loss in zip(
        answers.levels.levels, trained.accuracy_by_level, trained.loss_by_level, strict=True
    ):
        figures |= {f"{split}.accuracy@level={level}": accuracy, f"{split}.loss@level={level}": loss}
    if answers.refitted:
        curves[f"{split}.refitted accuracy by depth"] = answers.refitted
    curves[f"{split}.mean depths"] = tuple(at.mean_depth for at in answers.exits)
    curves[f"{split}.accuracy by mean depth"] = tuple(at.accuracy for at in answers.exits)
    return figures, curves


def _capo_figures(split: str, figures: dict[str, float], run: RunConfig) -> dict[str, float]:
    """Return the bits that the model knows about the people of capo, also per parameter; nothing for other tasks."""
    capo = run.data.task and run.data.task.capo
    if not capo:
        return {}
    start = f"{split}.loss@level="
    by_level = {int(name.removeprefix(start)): loss for name, loss in figures.items() if name.startswith(start)}
    bits = bits_learned(capo, *losses_of(capo, by_level))
    return {f"{split}.bits": bits, f"{split}.bits_per_parameter": bits / Size.of(run).parameters}


def _train_figures(metrics: Path) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """Return the last training loss, and the curve of the losses."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if row.get("kind") == "train"]
    kept = steps[:: -(-len(steps) // _POINTS)]
    curves = {"train.loss by step": tuple(row["loss"] for row in kept)}
    curves["train.steps"] = tuple(float(row["step"]) for row in kept)
    return {"train.loss": steps[-1]["loss"]}, curves


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


if __name__ == "__main__":
    run_main(main)
