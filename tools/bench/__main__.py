"""Measure this machine: training against plain torch, the head, decoding, and a pipeline's bubble.

    python -m tools.bench --checkpoint runs/quickstart/gate

Everything that is compared is measured in turns in one run: machines are noisy, ratios are not. The plain-torch model
is ``looplm/reference.py`` with torch's fused attention, its own parameters and torch's AdamW.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.accounting import training_flops_per_token
from looplm.bounds import check_bounds, path_field, positive
from looplm.cli import parse_config, run_main
from looplm.config import ParallelConfig, RunConfig
from looplm.megatron import device, process_groups
from looplm.model import LoopLM
from looplm.reference import ReferenceLM
from pretrain.data import Batch
from pretrain.optim import DTYPES
from pretrain.trainer import Trainer
from tools.bench import pipeline
from tools.bench.early_exit import bench_exit, random_workload, trained_workload
from tools.bench.generation import bench_decode
from tools.bench.head import bench_head
from tools.bench.memory import bench_recompute, random_batch
from tools.bench.timing import tokens_per_s


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Size of the measurements.

    Args:
        recipe: training recipe whose model and batch are timed.
        repeats: timed steps of each contender, in turns.
        batch: sequences in a step.
        checkpoint: a trained model, whose gate decides when tokens exit; null uses an untrained one and random depths.
    """

    recipe: str = path_field("configs/quickstart/pretrain.yaml")
    repeats: int = positive(5)
    batch: int = positive(4)
    checkpoint: str | None = path_field(None)

    def __post_init__(self) -> None:
        check_bounds(self, "")


def main(argv: list[str]) -> None:
    """``python -m tools.bench``"""
    config = parse_config(BenchConfig, argv, prog="python -m tools.bench", description=str(__doc__))
    recipe = parse_config(RunConfig, ["--config", config.recipe], prog="", description="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {_processor()}")
    bench_head(config.repeats)
    groups = process_groups.start(recipe.seed)
    try:
        for precision in ("fp32", "bf16"):
            bench_training(replace(recipe, optim=replace(recipe.optim, precision=precision)), config, groups)
        bench_recompute(recipe, config.batch, groups)
        if config.checkpoint is None:
            workload = random_workload(recipe.model, recipe.gate, groups)
        else:
            workload = trained_workload(config.checkpoint, groups)
        bench_exit(workload, config.repeats)
        bench_decode(workload, config.repeats)
    finally:
        process_groups.stop()
    pipeline.launch(config.repeats)


def bench_training(recipe: RunConfig, config: BenchConfig, groups: ProcessGroupCollection) -> None:
    """Print the training speed of our trainer and of plain torch, from the median step."""
    model, length, dtype = recipe.model, recipe.data.seq_length, DTYPES[recipe.optim.precision]
    batch = random_batch(recipe, config.batch)
    steps = {"engine": _our_step(recipe, batch, groups), "plain torch": _plain_step(recipe, batch)}
    contenders = {name: lambda step=step: step for name, step in steps.items()}
    speeds = tokens_per_s(contenders, config.batch * length, config.repeats)
    peak = device.matmul_flops(1024, dtype)
    flops = training_flops_per_token(model, recipe.gate, length, model.num_loops)
    print(f"\ntraining, {recipe.optim.precision}: {config.batch} x {length} tokens a step, {model.num_loops} loops")
    for name, speed in speeds.items():
        print(f"  {name:<24}{speed:>10,.0f} tokens/s{speed * flops / peak:>8.1%} of the measured matmul rate")
    print(f"  {'engine / plain torch':<24}{speeds['engine'] / speeds['plain torch']:>10.2f} x")


def _our_step(recipe: RunConfig, batch: Batch, groups: ProcessGroupCollection) -> Callable[[], Any]:
    model = LoopLM(recipe.model, recipe.gate, groups, DTYPES[recipe.optim.precision])
    trainer = Trainer(model, recipe.loss, recipe.optim, ParallelConfig(), groups)
    return lambda: trainer.train(repeat(batch), 1)


def _plain_step(recipe: RunConfig, batch: Batch) -> Callable[[], Any]:
    optim = recipe.optim
    model = ReferenceLM(recipe.model, recipe.gate).to(device.DEVICE, DTYPES[optim.precision])
    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=betas, eps=optim.eps, weight_decay=optim.weight_decay
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch.ids_BS, batch.labels_SB, recipe.loss.beta, batch.mask_SB).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()

    return step


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "unknown processor")


if __name__ == "__main__":
    run_main(main)
