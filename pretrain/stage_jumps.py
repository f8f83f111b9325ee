"""Table of a run's stages, with the jump of the loss where one stage ends and the next begins.

    python -m pretrain.stage_jumps runs/ouro-tiny --max_jump 0.3

A jump is measured at the deepest loop that both stages run: the highest mean of a few of the new stage's first steps,
minus the mean of the previous stage's last steps. Means, because a single batch is too noisy. A jump above --max_jump
is an error, unless the training data change: another text has another loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looplm.accounting import parameter_counts
from looplm.cli import parse_config, positional, run_main
from looplm.failures import UserError
from pretrain.report.data import Stage, read_stages

LAST, FIRST, WINDOW = 10, 20, 10  # steps: at the end of one stage; at the start of the next, in means of so many
NEW_DATA = " *"  # follows the jump of a stage that trains on other data


@dataclass(frozen=True, kw_only=True)
class StageJumpsConfig:
    """A run and the limit on its jumps.

    Args:
        run: directory with a training directory per stage.
        max_jump: highest jump of the loss in nats that is not an error; null allows any.
    """

    run: Path = positional("RUN_DIR")
    max_jump: float | None = None


@dataclass(frozen=True, kw_only=True)
class StageJump:
    """Jump of the loss between a stage and the one that it starts from."""

    before: str  # name of the earlier stage
    after: str  # name of the later one
    loop: int  # at which the losses are compared, counted from 1; both stages run it
    nats: float  # negative if the loss fell
    same_data: bool  # both train on the same sources in the same mix


def main(argv: list[str]) -> None:
    """``python -m pretrain.stage_jumps RUN_DIR [--max_jump 0.3]``"""
    config = parse_config(StageJumpsConfig, argv, prog="python -m pretrain.stage_jumps", description=str(__doc__))
    stages = read_stages(config.run) if config.run.is_dir() else []
    if not stages:
        raise UserError(f"{config.run}: no stage with a metrics.jsonl here; give the directory of a run")
    jumps = find_jumps(stages)
    rows = table(stages, jumps)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    print("jump: in nats, at a loop that both run; * other training data")
    limit = config.max_jump
    for jump in jumps:
        if limit is not None and jump.same_data and not jump.nats <= limit:  # NaN is above every limit
            where = f"{config.run}: from {jump.before} to {jump.after} the loss of loop {jump.loop}"
            jumped = f"jumps by {jump.nats:.3f} nats, more than --max_jump {limit:g}"
            raise UserError(f"{where} {jumped}; look at the first steps of {jump.after}")


def find_jumps(stages: Sequence[Stage]) -> list[StageJump]:
    """Return the jump of each stage that starts from another of ``stages``."""
    named = {stage.name: stage for stage in stages}
    return [_jump(named[stage.origin], stage) for stage in stages if stage.origin in named]


def _jump(before: Stage, after: Stage) -> StageJump:
    loop = min(before.loops, after.loops)
    last_N, first_N = (_losses(stage, loop) for stage in (before, after))
    first_N = first_N[:FIRST]
    window = min(WINDOW, len(first_N))
    means_N = np.convolve(first_N, np.ones(window) / window, mode="valid")  # NaN if one of its values is not finite
    nats = float(means_N.max() - last_N[-LAST:].mean())
    data = [None if stage.run is None else (stage.run.data.train, stage.run.data.task) for stage in (before, after)]
    same = data[0] is not None and data[0] == data[1]
    return StageJump(before=before.name, after=after.name, loop=loop, nats=nats, same_data=same)


def _losses(stage: Stage, loop: int) -> np.ndarray:
    """Return the losses of a loop in the logged steps that ran it (``loss.loop_onset``, ``loss.sampled_loops``)."""
    ran_N = stage.train["exit_distribution"][:, loop - 1] != 0
    losses_N: np.ndarray = stage.train["loss_per_loop"][:, loop - 1]
    return losses_N[ran_N] if ran_N.any() else losses_N


def table(stages: Sequence[Stage], jumps: Sequence[StageJump]) -> list[list[str]]:
    """Return a row of headings, and a row per stage."""
    marked = {jump.after: f"{jump.nats:+.3f}" + ("" if jump.same_data else NEW_DATA) for jump in jumps}
    heads = ["stage", "layers x loops", "parameters", "sequence", "RoPE base", "beta", "learning rate"]
    rows = [[*heads, "steps", "tokens", "loss", "validation", "jump"]]
    for stage in stages:
        steps, rates_N = stage.train["step"][-1], stage.train["learning_rate"]
        loss = f"{_losses(stage, stage.loops)[-LAST:].mean():.3f}"
        valid = f"{stage.valid['loss_per_loop'][-1, -1]:.3f}" if stage.valid["step"].size else ""
        cells = [f"{steps:.0f}", f"{stage.train['tokens'][-1]:,.0f}", loss, valid, marked.get(stage.name, "")]
        rows.append([stage.name, *_settings(stage), f"{np.nanmax(rates_N):.0e} → {rates_N[-1]:.0e}", *cells])
    return rows


def _settings(stage: Stage) -> list[str]:
    run = stage.run
    if run is None:
        return [f"? x {stage.loops}", "", "", "", ""]
    model, beta = run.model, f"{run.loss.beta:g}" if run.loss.objective == "entropy_regularised" else "gate alone"
    count, layers = sum(parameter_counts(model, run.gate).values()), f"{model.num_layers} x {model.num_loops}"
    return [layers, f"{count:,}", str(run.data.seq_length), f"{model.rope_base:,.0f}", beta]


if __name__ == "__main__":
    run_main(main)
