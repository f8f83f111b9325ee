"""All legal layouts of a recipe: those that the configuration's own checks accept, and why the others are refused."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product
from typing import get_args

from looplm.config import ParallelConfig, Recompute, RunConfig
from looplm.failures import UserError
from pretrain.batch_schedule import BatchSchedule
from tools.planning.planned_run import PlannedRun

MICRO_BATCHES = (1, 2, 4, 8, 16)
LEAST_POSITIONS = 512  # of a context-parallel rank: shorter chunks starve a GPU


@dataclass
class LayoutSearch:
    """Layouts that were tried."""

    legal: list[PlannedRun] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)  # how many, by the key that the refusal names
    reasons: dict[str, str] = field(default_factory=dict)  # one refusal for each key, in its own words

    def refuse(self, error: UserError) -> None:
        """Record that a layout was refused because of ``error``."""
        key = str(error).partition(":")[0]
        self.refused[key] += 1
        self.reasons.setdefault(key, str(error))


def find_layouts(recipe: RunConfig, gpus: int, node: int) -> LayoutSearch:
    """Try every division of ``gpus`` ranks, ``node`` of which share a node.

    Tensor parallelism stays inside a node, and a context-parallel rank keeps at least 512 positions. Layouts beyond
    these limits are legal but never fast, so they are not tried.
    """
    search, given = LayoutSearch(), recipe.parallel
    base = replace(given, sequence=None, first_stage_layers=None, last_stage_layers=None)
    # Weights of loops that a step does not run have no gradients to wait for, and some layouts have nothing to gather.
    base = replace(base, overlap_grad_reduce=not recipe.loss.varies_loops, overlap_param_gather=False)
    # A frozen trunk runs without autograd, so there is nothing to recompute.
    modes: tuple[Recompute, ...] = ("none",) if recipe.loss.frozen_trunk else get_args(Recompute)
    micro_batches = sorted({*MICRO_BATCHES, recipe.data.micro_batch_size})
    for ranks, last in product(_divisions(recipe, gpus, node), (None, *range(1, recipe.model.num_layers))):
        tensor, pipeline, context = ranks
        if last is not None and pipeline == 1:
            continue
        layout = replace(base, tensor=tensor, pipeline=pipeline, context=context, last_stage_layers=last)
        if last is not None and not _last_rank_has_fewer_layers(layout, recipe.model.num_layers):
            continue
        replicas = gpus // layout.model_ranks
        shards = (False, True) if replicas * layout.context > 1 else (False,)
        variants = [
            replace(layout, recompute=mode, distributed_optimizer=shard) for mode, shard in product(modes, shards)
        ]
        for micro_batch, variant in product(micro_batches, variants):
            try:
                config = _with_layout(recipe, variant, micro_batch, replicas)
            except UserError as error:
                search.refuse(error)
            else:
                search.legal.append(PlannedRun(config, replicas))
    return search


def own_layout(recipe: RunConfig, gpus: int) -> PlannedRun:
    """Return the recipe in the layout that it names itself.

    Raises:
        UserError: the layout does not fit the number of GPUs or the batch.
    """
    replicas = recipe.parallel.replicas(gpus)
    return PlannedRun(_with_layout(recipe, recipe.parallel, recipe.data.micro_batch_size, replicas), replicas)


def _divisions(recipe: RunConfig, gpus: int, node: int) -> Iterator[tuple[int, int, int]]:
    """Yield tensor, pipeline and context sizes whose product divides ``gpus``."""
    for tensor in _divisors(gpus, node):
        for pipeline in _divisors(gpus // tensor, recipe.model.num_layers):
            for context in _divisors(gpus // tensor // pipeline, max(1, recipe.data.seq_length // LEAST_POSITIONS)):
                yield tensor, pipeline, context


def _divisors(number: int, limit: int) -> list[int]:
    return [size for size in range(1, min(number, limit) + 1) if number % size == 0]


def _last_rank_has_fewer_layers(layout: ParallelConfig, num_layers: int) -> bool:
    """Return True if the last rank, which also computes the heads, has fewer layers than each of the others."""
    layers = layout.layers_per_rank(num_layers)
    return sum(layers) == num_layers and 0 < layers[-1] < layers[0]


def _with_layout(recipe: RunConfig, layout: ParallelConfig, micro_batch: int, replicas: int) -> RunConfig:
    """Return the recipe in a layout, after every check that a run of it must pass."""
    config = replace(recipe, parallel=layout, data=replace(recipe.data, micro_batch_size=micro_batch))
    BatchSchedule(config.data, replicas, layout.pipeline)
    return config
