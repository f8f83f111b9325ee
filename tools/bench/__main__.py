"""Measure this machine: training against plain torch, the head, data and checkpoints, decoding, a pipeline's bubble.

    python -m tools.bench --checkpoint runs/quickstart/gate
    python -m tools.bench --parts "[training,storage]" --repeats 9

Everything that is compared is measured in turns in one run: machines are noisy, ratios are not. Each figure that has an
aim ends in a verdict.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.bounds import check_bounds, non_empty, path_field, positive, require
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.megatron import process_groups
from tools.bench import pipeline
from tools.bench.early_exit import bench_exit, check_workload, random_workload, trained_workload
from tools.bench.generation import bench_decode
from tools.bench.head import bench_head
from tools.bench.memory import bench_recompute
from tools.bench.storage import bench_storage
from tools.bench.training import bench_training, small_recipe
from tools.bench.verdicts import Figure, print_verdicts
from tools.machine import processor

Part = Literal["training", "memory", "storage", "decoding", "pipeline"]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Size of the measurements.

    Args:
        parts: what is measured.
        recipe: training recipe whose model and batch are timed, besides a small and a tiny model.
        repeats: timed steps of each contender, in turns.
        checkpoint: a trained model, whose gate decides when tokens exit; null uses an untrained one and random depths.
    """

    parts: tuple[Part, ...] = non_empty(("training", "memory", "storage", "decoding", "pipeline"))
    recipe: str = path_field("configs/quickstart/pretrain.yaml")
    repeats: int = positive(5)
    checkpoint: str | None = path_field(None)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        fix = "only decoding reads it; add decoding to parts, or leave it out"
        require(self.checkpoint is None or "decoding" in self.parts, "checkpoint", self.checkpoint, fix)


def main(argv: list[str]) -> None:
    """``python -m tools.bench``"""
    config = parse_config(BenchConfig, argv, prog="python -m tools.bench", description=str(__doc__))
    recipe = parse_config(RunConfig, ["--config", config.recipe], prog="", description="")
    if config.checkpoint is not None:
        check_workload(config.checkpoint)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {processor()}")
    groups = process_groups.start(recipe.seed)
    figures = list[Figure]()
    try:
        try:
            figures.extend(_measured(config, recipe, groups))
        finally:
            process_groups.stop()
        if "pipeline" in config.parts:
            pipeline.launch(config.repeats)
    finally:  # a part that fails does not cost the verdicts of those before it
        if figures:
            print_verdicts(figures)


def _measured(config: BenchConfig, recipe: RunConfig, groups: ProcessGroupCollection) -> Iterator[Figure]:
    if "training" in config.parts:
        yield from bench_training(recipe, config.repeats)
    if "memory" in config.parts:
        yield from bench_head(config.repeats)
        bench_recompute(recipe, recipe.data.micro_batch_size, groups)
    if "storage" in config.parts:
        yield from bench_storage(small_recipe(recipe), config.repeats)
    if "decoding" in config.parts:
        if config.checkpoint is None:
            workload = random_workload(recipe.model, recipe.gate, groups)
        else:
            workload = trained_workload(config.checkpoint, groups)
        bench_exit(workload, config.repeats)
        bench_decode(workload, config.repeats)


if __name__ == "__main__":
    run_main(main)
