"""Stages of a run that start from one another: their order, their figures, and what happens to the loss where one ends and
the next begins.

python -m pretrain.stage_jumps RUN_DIR [--max_jump 0.3]

A jump is measured at the deepest loop that both stages run: the highest mean of a few steps among the first of a stage,
above the mean of the last steps of the stage before it; means, because one batch is no measure. With --max_jump a higher one is an error, but not where the training
data change: another text has another loss.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looplm.accounting import parameter_counts
from looplm.cli import UserError, run_main
from pretrain.report.data import Stage, read_stages

BEFORE, WATCHED, WINDOW = 10, 20, 10  # steps: at the end of the one; at the start of the other, in means of so many
NEW_DATA = " *"  # stands beside the jump of a stage that trains on other data


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """Where a stage goes on from another.

    Args:
        before: name of the one.
        after: name of the other.
        loop: which both run, and at which the losses are compared; counted from 1.
        jump: in nats; below 0 where the loss fell.
        same_data: whether both train on the same sources in the same mix.
    """

    before: str
    after: str
    loop: int
    jump: float
    same_data: bool


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m pretrain.stage_jumps", description=__doc__.partition("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="with a training directory per stage")
    parser.add_argument("--max_jump", type=float, metavar="NATS", help="the highest jump of the loss that is no error")
    arguments = parser.parse_args(argv)
    stages = read_stages(arguments.run) if arguments.run.is_dir() else []
    if not stages:
        raise UserError(f"{arguments.run}: no stage with a metrics.jsonl here; give the directory of a run")
    found = boundaries(stages)
    rows = table(stages, found)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("jump: in nats, at a loop that both run; * other training data")
    for one in found if arguments.max_jump is not None else []:
        if one.same_data and not one.jump <= arguments.max_jump:  # NaN is above every limit
            raise UserError(
                f"{arguments.run}: from {one.before} to {one.after} the loss of loop {one.loop} jumps by {one.jump:.3f} "
                f"nats, more than --max_jump {arguments.max_jump:g}; look at the first steps of {one.after}"
            )


def boundaries(stages: Sequence[Stage]) -> list[Boundary]:
    """One for each stage that goes on from another of them."""
    named = {stage.name: stage for stage in stages}
    return [_boundary(named[stage.origin], stage) for stage in stages if stage.origin in named]


def _boundary(before: Stage, after: Stage) -> Boundary:
    loop = min(before.loops, after.loops)
    ended_N, begun_N = (stage.train["loss_per_loop"][:, loop - 1] for stage in (before, after))
    begun_N = begun_N[:WATCHED]
    window = min(WINDOW, len(begun_N))
    means_N = np.convolve(begun_N, np.ones(window) / window, mode="valid")  # one that is not finite makes its mean so
    jump = float(means_N.max() - ended_N[-BEFORE:].mean())
    same = before.run is not None and after.run is not None and before.run.data.train == after.run.data.train
    return Boundary(before=before.name, after=after.name, loop=loop, jump=jump, same_data=same)


def table(stages: Sequence[Stage], found: Sequence[Boundary]) -> list[list[str]]:
    """A row per stage below a row of headings."""
    jumps = {one.after: f"{one.jump:+.3f}" + ("" if one.same_data else NEW_DATA) for one in found}
    heads = ["stage", "layers x loops", "parameters", "sequence", "RoPE base", "beta", "learning rate"]
    rows = [[*heads, "steps", "tokens", "loss", "validation", "jump"]]
    for stage in stages:
        steps, rates_N = stage.train["step"][-1], stage.train["learning_rate"]
        loss = f"{stage.train['loss_per_loop'][-BEFORE:, -1].mean():.3f}"
        valid = f"{stage.valid['loss_per_loop'][-1, -1]:.3f}" if stage.valid["step"].size else ""
        cells = [f"{steps:.0f}", f"{stage.train['tokens'][-1]:,.0f}", loss, valid, jumps.get(stage.name, "")]
        rows.append([stage.name, *_settings(stage), f"{np.nanmax(rates_N):.0e} → {rates_N[-1]:.0e}", *cells])
    return rows


def _settings(stage: Stage) -> list[str]:
    run = stage.run
    if run is None:
        return [f"? x {stage.loops}", "", "", "", ""]
    model, beta = run.model, f"{run.loss.beta:g}" if run.loss.objective == "entropy_regularised" else "gate alone"
    count = sum(parameter_counts(model, run.gate).values())
    return [f"{model.num_layers} x {model.num_loops}", f"{count:,}", str(run.data.seq_length), f"{model.rope_base:,.0f}", beta]  # fmt: skip


if __name__ == "__main__":
    run_main(main)
