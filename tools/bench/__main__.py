"""Measure this machine: the engine against plain torch, the memory of the chunked head, decoding, a pipeline's bubble.

    python -m tools.bench
    python -m tools.bench --checkpoint runs/quickstart/gate --repeats 9

Everything that is compared is measured in one run, in turns: machines are noisy, ratios are not. The plain-torch model is
the oracle of ``looplm/reference.py`` with torch's fused attention, its own parameters and torch's AdamW.
"""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.accounting import training_flops_per_token
from looplm.cli import parse_config, require, run_main
from looplm.config import ParallelConfig, RunConfig
from looplm.megatron import device, process_groups
from looplm.model import LoopLM
from looplm.model.losses import token_losses
from looplm.reference import ReferenceLM
from pretrain.data import Batch
from pretrain.optim import DTYPES
from pretrain.trainer import Trainer
from tools.bench import pipeline
from tools.bench.early_exit import bench_exit, drawn_setting, trained_setting
from tools.bench.generation import bench_decode
from tools.bench.memory import bench_recompute

# A head of Ouro's vocabulary over 1,024 tokens and 4 loops; narrow, so that the logits are what is measured.
HEAD_TOKENS, HEAD_VOCAB, HEAD_LOOPS, HEAD_WIDTH = 1024, 49_152, 4, 256


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Args:
        recipe: training recipe whose model and batch are timed.
        repeats: timed steps of each contender, in turns.
        batch: sequences in a step.
        checkpoint: a trained model whose gate decides when tokens leave; without one depths are drawn.
    """

    recipe: str = "configs/quickstart/pretrain.yaml"
    repeats: int = 5
    batch: int = 4
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        require(self.repeats > 0, "repeats", self.repeats, "give a number above 0")
        require(self.batch > 0, "batch", self.batch, "give a number above 0")


def main(argv: list[str]) -> None:
    """``python -m tools.bench``"""
    config = parse_config(BenchConfig, argv, prog="python -m tools.bench", description=str(__doc__))
    recipe = parse_config(RunConfig, ["--config", config.recipe], prog="", description="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {_processor()}")
    bench_head()
    groups = process_groups.start(recipe.seed)
    try:
        for precision in ("fp32", "bf16"):
            bench_training(replace(recipe, optim=replace(recipe.optim, precision=precision)), config, groups)
        bench_recompute(recipe, config.batch, groups)
        if config.checkpoint is None:
            setting = drawn_setting(recipe.model, recipe.gate, groups)
        else:
            setting = trained_setting(config.checkpoint, groups)
        bench_exit(setting, config.repeats)
        bench_decode(setting, config.repeats)
    finally:
        process_groups.stop()
    pipeline.launch(config.repeats)


def bench_head() -> None:
    """Peak memory of a head's forward and backward, each way in a process of its own."""
    peaks = {}
    for name, chunk in (("all logits at once", None), ("chunks of 256 tokens", 256)):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks[name] = pool.apply(_head_peak_bytes, (chunk,))
    naive = peaks["all logits at once"]
    print(f"\nhead: {HEAD_TOKENS:,} tokens, V = {HEAD_VOCAB:,}, R = {HEAD_LOOPS}, forward and backward, fp32")
    for name, peak in peaks.items():
        print(f"  {name:<24}{peak / 2**20:>10,.0f} MiB above the start{peak / naive:>8.1%}")


def _head_peak_bytes(chunk_tokens: int | None) -> int:
    torch.manual_seed(0)
    hidden = [torch.randn(HEAD_TOKENS, 1, HEAD_WIDTH, requires_grad=True) for _ in range(HEAD_LOOPS)]
    weight = torch.randn(HEAD_VOCAB, HEAD_WIDTH).mul_(0.02).requires_grad_()
    labels = torch.randint(HEAD_VOCAB, (HEAD_TOKENS, 1))
    before = _resident_peak()
    losses = [_head_loss(h, weight, labels, chunk_tokens) for h in hidden]
    torch.stack(losses).mean().backward()
    return _resident_peak() - before


def _head_loss(hidden_SBD: Tensor, weight_VD: Tensor, labels_SB: Tensor, chunk_tokens: int | None) -> Tensor:
    if chunk_tokens is not None:
        return token_losses(hidden_SBD, weight_VD, labels_SB, chunk_tokens)
    logits = F.linear(hidden_SBD.flatten(0, 1), weight_VD)
    return F.cross_entropy(logits, labels_SB.flatten(), reduction="none").view_as(labels_SB)


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bench_training(recipe: RunConfig, config: BenchConfig, groups: ProcessGroupCollection) -> None:
    """Training steps of the engine and of plain torch in turns; speed from the median step."""
    model, length, tokens = recipe.model, recipe.data.seq_length, config.batch * recipe.data.seq_length
    ids = torch.randint(model.vocab_size, (config.batch, length + 1), device=device.DEVICE)
    batch = Batch(
        ids[:, :-1], ids[:, 1:].t().contiguous(), torch.ones(length, config.batch, device=device.DEVICE), None
    )
    contenders = {"engine": _engine_step(recipe, batch, groups), "plain torch": _plain_step(recipe, batch)}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(config.repeats + 1):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            device.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start)
    dtype = DTYPES[recipe.optim.precision]
    peak = device.matmul_flops(1024, dtype)
    flops = training_flops_per_token(model, recipe.gate, length, model.num_loops)
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    print(f"\ntraining, {recipe.optim.precision}: {config.batch} x {length} tokens a step, {model.num_loops} loops")
    for name, rate in speed.items():
        print(f"  {name:<24}{rate:>10,.0f} tokens/s{rate * flops / peak:>8.1%} of the measured matmul rate")
    print(f"  {'engine / plain torch':<24}{speed['engine'] / speed['plain torch']:>10.2f} x")


def _engine_step(recipe: RunConfig, batch: Batch, groups: ProcessGroupCollection) -> Callable[[], Any]:
    model = LoopLM(recipe.model, recipe.gate, groups, DTYPES[recipe.optim.precision])
    trainer = Trainer(model, recipe.loss, recipe.optim, ParallelConfig(), groups)
    batches: Iterator[Batch] = repeat(batch)
    return lambda: trainer.train(batches, 1)


def _plain_step(recipe: RunConfig, batch: Batch) -> Callable[[], Any]:
    optim = recipe.optim
    model = ReferenceLM(recipe.model, recipe.gate).to(device.DEVICE, DTYPES[optim.precision])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(batch.ids_BS, batch.labels_SB, recipe.loss.beta, batch.mask_SB).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad)
        optimizer.step()

    return step


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


if __name__ == "__main__":
    run_main(main)
