"""Which layouts of a recipe there are: every one that the configuration's own checks accept, and why others are refused."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import get_args

from looplm.cli import UserError, require
from looplm.config import ParallelConfig, Recompute, RunConfig
from pretrain.data import BatchSchedule
from tools.planning.planned_run import PlannedRun

MICRO_BATCHES = (1, 2, 4, 8, 16)
LEAST_POSITIONS = 512  # of a context-parallel rank: shorter parts starve a GPU


@dataclass
class Found:
    """What a search came across.

    Args:
        legal: the layouts.
        refused: how many were not, by the key that the refusal names.
        reasons: one refusal of each key, in its own words.
    """

    legal: list[PlannedRun] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)

    def refuse(self, error: UserError, count: int) -> None:
        """``count`` layouts for the reason that ``error`` names."""
        key = str(error).partition(":")[0]
        self.refused[key] += count
        self.reasons.setdefault(key, str(error))


def find_layouts(recipe: RunConfig, gpus: int, node: int) -> Found:
    """Try every division of ``gpus`` ranks.

    Tensor parallelism stays inside a node, and a context-parallel rank keeps at least 512 positions: beyond that the
    layouts are legal but never fast, and are not tried.
    """
    found = Found()
    modes: tuple[Recompute, ...] = get_args(Recompute)
    if recipe.loss.frozen_trunk:
        modes = ("none",)  # the trunk runs without autograd
    micros = sorted({*MICRO_BATCHES, recipe.data.micro_batch_size})
    for ranks, stages in product(_divisions(recipe, gpus, node), (None, *range(1, recipe.model.num_layers))):
        layout = _layout(recipe.parallel, ranks, stages)
        if layout is None or (stages is not None and not _spares_the_head(layout, recipe.model.num_layers)):
            continue
        replicas = gpus // layout.model_ranks
        shares = (False, True) if replicas * layout.context > 1 else (False,)
        variants = [
            replace(layout, recompute=mode, distributed_optimizer=share) for mode, share in product(modes, shares)
        ]
        for micro in micros:
            try:
                config = _checked(recipe, layout, micro, replicas)
            except UserError as error:
                found.refuse(error, len(variants))
                continue
            found.legal += [PlannedRun(replace(config, parallel=variant), replicas) for variant in variants]
    return found


def as_it_stands(recipe: RunConfig, gpus: int) -> PlannedRun:
    """The recipe in the layout that it names itself.

    Raises:
        UserError: the number of GPUs or the batch does not go with it.
    """
    layout = recipe.parallel
    replicas, rest = divmod(gpus, layout.model_ranks)
    require(rest == 0, "parallel.tensor x pipeline x context", layout.model_ranks, f"it must divide the number of ranks, {gpus}")  # fmt: skip
    return PlannedRun(_checked(recipe, layout, recipe.data.micro_batch_size, replicas), replicas)


def _divisions(recipe: RunConfig, gpus: int, node: int) -> Iterator[tuple[int, int, int]]:
    """Tensor, pipeline and context ranks whose product divides ``gpus``."""
    for tensor in _divisors(gpus, node):
        for pipeline in _divisors(gpus // tensor, recipe.model.num_layers):
            for context in _divisors(gpus // tensor // pipeline, max(1, recipe.data.seq_length // LEAST_POSITIONS)):
                yield tensor, pipeline, context


def _divisors(number: int, limit: int) -> list[int]:
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def _layout(given: ParallelConfig, ranks: tuple[int, int, int], last: int | None) -> ParallelConfig | None:
    """The recipe's own settings with other ranks; None where a last stage of its own makes no sense."""
    tensor, pipeline, context = ranks
    if last is not None and pipeline == 1:
        return None
    return replace(
        given, tensor=tensor, sequence=None, pipeline=pipeline, context=context, first_stage_layers=None,
        last_stage_layers=last, overlap_grad_reduce=True,
    )  # fmt: skip


def _spares_the_head(layout: ParallelConfig, num_layers: int) -> bool:
    """Whether the last rank, which computes the heads too, has fewer layers than the others, which share theirs evenly."""
    stages = layout.stage_layers(num_layers)
    return sum(stages) == num_layers and 0 < stages[-1] < stages[0]


def _checked(recipe: RunConfig, layout: ParallelConfig, micro: int, replicas: int) -> RunConfig:
    """The recipe in a layout, accepted by every check that a run of it passes."""
    config = replace(recipe, parallel=layout, data=replace(recipe.data, micro_batch_size=micro))
    BatchSchedule(config.data, replicas, layout.pipeline)
    return config
