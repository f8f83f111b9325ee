"""The results of a run as figures, which are compared, and as curves, which are drawn."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.synthetic.capo import bits_learned, losses_of
from data_pipeline.synthetic.causal_loops import KIND_STEP
from looplm.config import RunConfig
from looplm.evaluation.record import Evaluation, LevelAnswers, TaskAnswers
from tools.experiments.runs import Size

_POINTS = 50  # of a training curve
_SOLVED = 0.9  # accuracy from which on a level counts as solved

Curves = dict[str, tuple[float, ...]]


class Results(NamedTuple):
    """Figures and curves by name, see :class:`tools.experiments.rows.Row`."""

    figures: dict[str, float]
    curves: Curves


def figures_of(split: str, found: Evaluation, run: RunConfig) -> Results:
    """Return an evaluation as figures at the trained depth, and as curves.

    Args:
        split: the first part of each name.
        found: what was measured on the split.
        run: the run that was measured.
    """
    loops = run.model.num_loops
    gated = run.loss.trains_gate and loops > 1
    losses = {at.depth: at.loss for at in found.depths}
    figures = {"loss": losses[loops]} | {f"loss@depth={depth}": loss for depth, loss in losses.items()}
    curves: Curves = {
        "loss by depth": tuple(losses.values()),
        "exit probability by depth": found.exit_distribution,
    }
    if gated:
        curves["mean depths"] = tuple(at.mean_depth for at in found.exit_curve)
        curves["loss by mean depth"] = tuple(at.loss for at in found.exit_curve)
    figures |= _cache_figures(found)
    if found.answers is not None:
        answers = _answers(found.answers, loops, gated)
        figures, curves = figures | answers.figures, curves | answers.curves
        figures |= _capo_figures(answers.figures, run)
    if gated:
        figures |= _exit_figures(found, curves, run)
    return Results(
        {f"{split}.{name}": value for name, value in figures.items()},
        {f"{split}.{name}": value for name, value in curves.items()},
    )


def train_figures(metrics: Path) -> Results:
    """Return the last training loss, and the curve of the losses; a loss that was not finite is NaN."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if row.get("kind") == "train"]
    kept = steps[:: -(-len(steps) // _POINTS)]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in steps]
    curves = {"train.loss by step": tuple(losses[:: -(-len(steps) // _POINTS)])}
    curves["train.steps"] = tuple(float(row["step"]) for row in kept)
    return Results({"train.loss": losses[-1]}, curves)


def _cache_figures(found: Evaluation) -> dict[str, float]:
    """Return losses and accuracies through each cache, and the accuracy that sharing it between the loops loses."""
    figures, whole = dict[str, float](), dict[float, float]()
    for row in found.decoding or ():
        if row.kv_cache == "per_loop" and row.accuracy is not None:
            whole[row.exit_threshold] = row.accuracy
    for row in found.decoding or ():
        name = row.kv_cache if row.exit_threshold == 1 else f"{row.kv_cache},threshold={row.exit_threshold:g}"
        figures[f"loss@cache={name}"] = row.loss
        if row.accuracy is not None:
            figures[f"accuracy@cache={name}"] = row.accuracy
            if row.exit_threshold in whole and row.kv_cache != "per_loop":
                figures[f"accuracy_lost@cache={name}"] = whole[row.exit_threshold] - row.accuracy
    return figures


def _answers(answers: TaskAnswers, loops: int, gated: bool) -> Results:
    """Return what was answered at each depth and level, and along a trained gate's thresholds."""
    trained = answers.depths[loops - 1]
    figures = {"accuracy": trained.accuracy, "whole_samples": trained.whole_samples}
    levels = tuple(map(float, answers.levels.levels))
    curves: Curves = {"levels": levels, "accuracy by level": trained.accuracy_by_level}
    for at in answers.depths:
        figures[f"accuracy@depth={at.depth}"] = at.accuracy
        curves[f"accuracy@depth={at.depth} by level"] = at.accuracy_by_level
    for name, attribute in (
        ("accuracy", "accuracy"),
        ("whole samples", "whole_samples"),
        ("state change", "state_change"),
        ("state cosine", "state_cosine"),
        ("divergence", "divergence"),
        ("answers changed", "answers_changed"),
    ):
        curves[f"{name} by depth"] = tuple(getattr(at, attribute) for at in answers.depths)
    by_level = zip(answers.levels.levels, trained.accuracy_by_level, trained.loss_by_level, strict=True)
    for level, accuracy, loss in by_level:
        figures |= {f"accuracy@level={level}": accuracy, f"loss@level={level}": loss}
    if answers.attention_sink:
        curves["attention sink by depth"] = answers.attention_sink
        figures["attention_sink"] = sum(answers.attention_sink[:loops]) / loops
    if answers.loop_radius:
        curves["loop radius by depth"] = answers.loop_radius
    if answers.levels.latent_steps:
        curves["latent steps by level"] = answers.levels.latent_steps
    figures |= {f"solved@votes={voted.votes}": voted.solved for voted in answers.voted}
    if answers.refitted:
        curves["refitted accuracy by depth"] = answers.refitted
    if gated:
        curves["exit depth by level"] = answers.levels.expected_depth
        curves["accuracy by mean depth"] = tuple(at.accuracy for at in answers.exits)
    return Results(figures, curves)


def _exit_figures(found: Evaluation, curves: Curves, run: RunConfig) -> dict[str, float]:
    """Return how deep a trained gate thinks: on average, about each level, and at half of the compute.

    ``exit_depth_rise`` is the number of loops by which the expected exit depth rises with each level, and
    ``exit_depth_rise@solved`` the same over the levels that the model answers at its full depth (90 % right), if there
    are three: no depth helps beyond them, and a gate may give up early. Figures ``@half_depth`` are those at the
    threshold at which tokens leave after (1 + R) / 2 loops on average, halfway between one loop and all. They are left
    out if the gate sends no token out so early.
    """
    loops = run.model.num_loops
    depth = sum(depth * share for depth, share in enumerate(found.exit_distribution, start=1))
    figures = {"exit_depth": depth}
    for name in ("loss", "accuracy"):
        at_half = _interpolated((1 + loops) / 2, curves["mean depths"], curves.get(f"{name} by mean depth", ()))
        if at_half is not None:
            figures[f"{name}@half_depth"] = at_half
    if found.answers is None:
        return figures
    levels = found.answers.levels
    figures |= {
        f"exit_depth@level={level}": depth for level, depth in zip(levels.levels, levels.expected_depth, strict=True)
    }
    steps_only = run.data.task is not None and run.data.task.causal_loops is not None
    solved = [accuracy >= _SOLVED for accuracy in found.answers.depths[loops - 1].accuracy_by_level]
    rises = {"exit_depth_rise": depth_rise(levels, steps_only=steps_only)}
    if sum(solved) >= 3:
        rises["exit_depth_rise@solved"] = depth_rise(levels, solved, steps_only=steps_only)
    return figures | {name: rise for name, rise in rises.items() if rise is not None}


def depth_rise(levels: LevelAnswers, chosen: Sequence[bool] | None = None, *, steps_only: bool = False) -> float | None:
    """Return the slope of the expected exit depth over the level, by least squares over the labels.

    Args:
        levels: the levels of the labels, and the expected exit depth of each.
        chosen: True for levels that count, at least one; None for all.
        steps_only: take the reasoning steps out of the levels of causal loops, which also name the kind of program.

    Returns:
        Loops per level; None if fewer than two levels count.
    """
    level_L = np.array(levels.levels, dtype=float)
    level_L = level_L % KIND_STEP if steps_only else level_L
    weight_L, depth_L = np.array(levels.labels, dtype=float), np.array(levels.expected_depth)
    if chosen is not None:
        weight_L *= np.array(chosen)
    off_L = level_L - np.average(level_L, weights=weight_L)
    spread = float((weight_L * off_L**2).sum())
    return float((weight_L * off_L * depth_L).sum()) / spread if spread else None


def _interpolated(depth: float, mean_depths: Sequence[float], values: Sequence[float]) -> float | None:
    """Return the value at a mean depth, linear between the thresholds' mean depths; None beyond them."""
    if not values or not min(mean_depths) <= depth <= max(mean_depths):
        return None
    depths, indices = np.unique(np.array(mean_depths), return_index=True)
    return float(np.interp(depth, depths, np.array(values)[indices]))


def _capo_figures(answers: dict[str, float], run: RunConfig) -> dict[str, float]:
    """Return the bits that the model knows about the people of capo, also per parameter; nothing for other tasks.

    The logarithm turns a ratio of two arms into a difference: 10 % are 0.0953.
    """
    capo = run.data.task and run.data.task.capo
    if not capo:
        return {}
    start = "loss@level="
    by_level = {int(name.removeprefix(start)): loss for name, loss in answers.items() if name.startswith(start)}
    bits = bits_learned(capo, *losses_of(capo, by_level))
    figures = {"bits": bits, "bits_per_parameter": bits / Size.of(run).parameters}
    return figures | ({"log_bits_per_parameter": math.log(figures["bits_per_parameter"])} if bits > 0 else {})
