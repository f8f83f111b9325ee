"""Steps whose losses or gradients are not finite: counted, examined, written down for a replay, and limited.

The trainer skips their update on every rank. Here the ranks gather what each of them has seen; nothing of that runs on
a healthy step.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.checkpoint import Health, TrainingState, optimizer_state, step_folder
from looplm.config import HealthConfig, RunConfig
from looplm.failures import NumericalFailure
from looplm.files import write_whole
from looplm.megatron import process_groups
from pretrain import spikes
from pretrain.norms import module_of
from pretrain.trainer import Step, Trainer

FAILURES = "failures"  # folder of a run


@dataclass(frozen=True, kw_only=True)
class MicroBatchFinding:
    """Loops (from 1) of one micro-batch whose numbers are not finite, and its samples (first, end), end excluded."""

    samples: tuple[int, int]
    losses: tuple[int, ...]
    exits: tuple[int, ...]  # exit probabilities
    hidden_states: tuple[int, ...]
    gradients: tuple[int, ...]  # of the hidden states

    @property
    def forward(self) -> tuple[tuple[int, str], ...]:
        """Loops and what is not finite in their forward pass, in the order of computation."""
        named = (("hidden state", self.hidden_states), ("loss", self.losses), ("exit probability", self.exits))
        return tuple(sorted(((loop, what) for what, loops in named for loop in loops), key=lambda entry: entry[0]))


@dataclass(frozen=True, kw_only=True)
class RankFinding:
    """Everything on one rank that is not finite."""

    rank: int
    tensor: int
    pipeline: int
    context: int
    data: int
    micro_batches: tuple[MicroBatchFinding, ...]
    parameters: tuple[str, ...]  # those with a gradient that is not finite


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step that failed: its position in the data, its numbers over all ranks, and each rank's findings.

    ``samples`` counts in the order of the data: (first, end), end excluded. ``weights`` is a checkpoint of the weights
    that the step started from, if the run ended with it.
    """

    step: int
    samples: tuple[int, int]
    what: str
    loss: float
    loss_per_loop: list[float]
    hidden_rms: list[float]
    hidden_grad_norm: list[float]
    hidden_cosine: list[float]
    grad_norms: dict[str, float]
    ranks: tuple[RankFinding, ...] = ()
    weights: str | None = None


def count(health: Health, done: Step, config: HealthConfig) -> Health:
    """Return the state of the run's health after one more step."""
    if done.healthy:
        return spikes.watch(replace(health, skipped_in_a_row=0), done.stats.loss, config)
    return replace(
        health,
        skipped=health.skipped + 1,
        skipped_in_a_row=health.skipped_in_a_row + 1,
        skipped_above=health.skipped_above + (health.losses_above > 0),
    )


def examine(trainer: Trainer, done: Step, step: int, samples: tuple[int, int], micro_batch_size: int) -> BadStep:
    """Return what is not finite in the last step, on which ranks; collective.

    Args:
        trainer: has just run the step.
        done: its result.
        step: its number.
        samples: its samples over all ranks: (first, end), end excluded.
        micro_batch_size: consecutive micro-batches of that many samples went to the data-parallel ranks in turn.
    """
    groups, found = trainer.groups, list[MicroBatchFinding]()
    sums, hidden, gradient = trainer.micro_batch_sums, trainer.loop_norms.hidden, trainer.loop_norms.gradient
    loops = [loop for loop, norms in enumerate(hidden, start=1) if norms]  # those that the step ran
    for index in range(len(hidden[0])):
        first = samples[0] + (index * groups.dp.size() + groups.dp.rank()) * micro_batch_size
        losses, exits = sums[index][3:].view(2, -1).isfinite().tolist()
        finding = MicroBatchFinding(
            samples=(first, first + micro_batch_size),
            losses=tuple(loop for loop in loops if not losses[loop - 1]),
            exits=tuple(loop for loop in loops if not exits[loop - 1]),
            hidden_states=tuple(loop for loop in loops if not hidden[loop - 1][index].isfinite()),
            gradients=tuple(loop for loop in loops if not _finite(gradient[loop - 1].get(index))),
        )
        if finding.forward or finding.gradients:
            found.append(finding)
    own = RankFinding(
        rank=dist.get_rank(),
        tensor=groups.tp.rank(),
        pipeline=groups.pp.rank(),
        context=groups.cp.rank(),
        data=groups.dp.rank(),
        micro_batches=tuple(found),
        parameters=tuple(trainer.gradient_norms.not_finite()),
    )
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    seen = tuple(finding for finding in ranks if finding.micro_batches or finding.parameters)
    stats, norms = done.stats, done.norms
    return BadStep(
        step=step,
        samples=samples,
        what=summarize(seen),
        loss=stats.loss,
        loss_per_loop=stats.loss_per_loop,
        ranks=seen,
        **vars(norms),
    )


def report(
    bad: BadStep,
    health: Health,
    config: RunConfig,
    save_weights: Callable[[Path], None],
    say: Callable[[str], None],
) -> None:
    """Write down a skipped step and say so; collective.

    Args:
        bad: from :func:`examine`.
        health: the run's, with this step counted.
        config: the run's.
        save_weights: writes the weights to a new folder; collective.
        say: prints a line.

    Raises:
        NumericalFailure: more steps in a row were skipped than ``health.max_skipped`` allows.
    """
    allowed, folder = config.health.max_skipped, Path(config.output_dir) / FAILURES
    path = folder / f"{step_folder.step_name(bad.step)}.json"
    _write(path, bad)
    if health.skipped_in_a_row <= allowed:
        say(f"step {bad.step}  skipped: {bad.what}; {health.skipped_in_a_row} in a row, {health.skipped} in total")
        return
    weights = path.with_suffix("")
    save_weights(weights)
    _write(path, replace(bad, weights=str(weights)))
    raise NumericalFailure(
        f"step {bad.step}: {bad.what}; health.max_skipped={allowed} allows no further step without an update "
        f"({health.skipped_in_a_row} in a row); look at the batch with: python -m tools.replay {path}"
    )


@torch.no_grad()
def require_finite(state: TrainingState, step: int) -> None:
    """Raise if any rank holds a weight or a moment of Adam's that is not finite; collective.

    A checkpoint of them would be worthless, and would push a healthy one off the disk.

    Raises:
        NumericalFailure: the message names the first of them.
    """
    values = dict(state.model.named_parameters()) | optimizer_state.own_state(state.optimizer, state.model)
    largest = torch._foreach_norm(list(values.values()), math.inf)
    finite = torch.stack([value.float() for value in largest]).isfinite().tolist()
    own = next((name for name, good in zip(values, finite, strict=True) if not good), None)
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    for rank, name in enumerate(found):
        if name is not None:
            raise NumericalFailure(
                f"step {step}: {name} is not finite on rank {rank}; no checkpoint is written, the earlier ones stay; "
                "lower optim.lr and resume"
            )


def _write(path: Path, bad: BadStep) -> None:
    text = json.dumps(finite_or_null(dataclasses.asdict(bad)), indent=1, allow_nan=False)
    process_groups.on_rank_0(lambda: write_whole(path, text))


def finite_or_null(value: Any) -> Any:
    """Return ``value`` with null for each number that is not finite, for which JSON has no word."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(norm: Tensor | None) -> bool:
    return norm is None or bool(norm.isfinite())


def summarize(ranks: Sequence[RankFinding]) -> str:
    """Return in one line what is not finite and where: the loop in which it arose, its ranks and its samples."""
    micro_batches = [(rank.rank, found) for rank in ranks for found in rank.micro_batches]
    forward = [(rank, found) for rank, found in micro_batches if found.forward]
    backward = [(rank, found) for rank, found in micro_batches if found.gradients]
    if forward:
        loop, part = first = min((found.forward[0] for _, found in forward), key=lambda entry: entry[0])
        what, seen = f"the {part} of loop {loop}", [entry for entry in forward if first in entry[1].forward]
    elif backward:  # it passes the last loop first
        loop = max(loop for _, found in backward for loop in found.gradients)
        what = f"the gradient of loop {loop}'s hidden state"
        seen = [entry for entry in backward if loop in entry[1].gradients]
    else:
        names = list(dict.fromkeys(name for rank in ranks for name in rank.parameters))
        if not names:
            return "the gradient's norm is too large for fp32"
        modules = ", ".join(dict.fromkeys(map(module_of, names)))
        shown = names[0] if len(names) == 1 else f"{len(names)} parameters ({modules})"
        return f"the norm of the gradient of {shown} is not finite (on {_ranks(rank.rank for rank in ranks)})"
    where = f"on {_ranks(rank for rank, _ in seen)}, samples {_spans(sorted({found.samples for _, found in seen}))}"
    return f"{what} is not finite ({where})"


def _ranks(ranks: Iterable[int]) -> str:
    numbers = sorted(set(ranks))
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _spans(spans: Sequence[tuple[int, int]]) -> str:
    """Return sorted half-open spans as text, with neighbors joined: [(4, 6), (6, 8)] → 4-7."""
    starts = [spans[0], *(after for before, after in pairwise(spans) if before[1] != after[0])]
    ends = [*(before for before, after in pairwise(spans) if before[1] != after[0]), spans[-1]]
    return ", ".join(f"{first[0]}-{last[1] - 1}" for first, last in zip(starts, ends, strict=True))
