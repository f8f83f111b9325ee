"""Compare the planner's memory estimates with real training steps on this machine's CPU, in one to four processes.

    python -m tools.plan_check

Weights, gradients and optimizer state are measured as the storages that the trainer holds, activations as what autograd
saves between forward and backward, at its peak (tools.bench.memory). The command ends with status 1 if any part is off
by more than 3 %.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from looplm.bounds import require
from looplm.cli import from_dict, parse_config, run_main
from looplm.config import ParallelConfig, RunConfig
from looplm.megatron import process_groups
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain.trainer import Trainer
from tools.bench.memory import random_batch, saved_bytes
from tools.local_ranks import run_module
from tools.planning.memory import rank_memory
from tools.planning.planned_run import PlannedRun

TOLERANCE = 0.03
TIMEOUT_S = 600
PARTS = ("weights", "gradients", "optimizer", "activations")
Sections = dict[str, dict[str, Any]]


class MemoryCheck(NamedTuple):
    """A run whose memory is measured; ``sections`` changes its recipe."""

    ranks: int
    layout: ParallelConfig
    attention: str = "mla"
    sections: Sections = {}  # noqa: RUF012 (of a NamedTuple, never changed)


BF16: Sections = {"optim": {"precision": "bf16"}}
AROUND = {"model": {"prelude_layers": 1, "coda_layers": 1}}
PLAIN_LATENT = {"model": {"kv_latent_norm": False}}
REASONING: Sections = {"model": {"latent_iterations": 3, "latent_halting": True}}
ONE_DOCUMENT = {"data": {"document_masking": False}}
LAST_LOSS: Sections = {"loss": {"weights": "last"}}
PENALIZED: Sections = {"loss": {"stability": 0.1}}
ADDED = {"model": {"injection": "additive"}}
INJECTED = {"model": {"injection": "linear"}}
BY_CHANNEL = {"model": {"injection": "diagonal"}}
STEPS = {"model": {"step_embedding": "learned", "num_layers": 1, "num_loops": 6, "ffn_hidden_size": 32}}
HEAD_GATE = {"model": {"attention_gate": "head"}}
ELEMENT_GATE = {"model": {"attention_gate": "element"}}
CHECKS: dict[str, MemoryCheck] = {
    "alone, none, MLA": MemoryCheck(1, ParallelConfig()),
    "alone, none, MHA": MemoryCheck(1, ParallelConfig(), "mha"),
    "alone, none, MLA, bf16": MemoryCheck(1, ParallelConfig(), sections=BF16),
    "alone, selective, MLA": MemoryCheck(1, ParallelConfig(recompute="selective")),
    "alone, full, MLA": MemoryCheck(1, ParallelConfig(recompute="full")),
    "alone, loop, MHA, bf16": MemoryCheck(1, ParallelConfig(recompute="loop"), "mha", BF16),
    "alone, loop, MLA": MemoryCheck(1, ParallelConfig(recompute="loop")),
    "alone, none, MLA, prelude and coda": MemoryCheck(1, ParallelConfig(), sections=AROUND),
    "alone, none, MLA, plain latent": MemoryCheck(1, ParallelConfig(), sections=PLAIN_LATENT),
    "alone, none, MLA, latent reasoning": MemoryCheck(1, ParallelConfig(), sections=REASONING),
    "alone, none, MLA, latent reasoning, bf16": MemoryCheck(1, ParallelConfig(), sections=REASONING | BF16),
    "alone, none, MLA, linear injection": MemoryCheck(1, ParallelConfig(), sections=INJECTED),
    "alone, none, MHA, additive injection": MemoryCheck(1, ParallelConfig(), "mha", ADDED),
    "alone, loop, MLA, linear injection": MemoryCheck(1, ParallelConfig(recompute="loop"), sections=INJECTED),
    "alone, loop, MHA, diagonal injection": MemoryCheck(1, ParallelConfig(recompute="loop"), "mha", BY_CHANNEL),
    "PP2, none, MHA, diagonal injection": MemoryCheck(2, ParallelConfig(pipeline=2), "mha", BY_CHANNEL),
    "PP2, loop, MLA, linear injection": MemoryCheck(2, ParallelConfig(pipeline=2, recompute="loop"), sections=INJECTED),
    "alone, none, MHA, last loop's loss, bf16": MemoryCheck(1, ParallelConfig(), "mha", LAST_LOSS | BF16),
    "alone, none, MHA, penalized states, bf16": MemoryCheck(1, ParallelConfig(), "mha", PENALIZED | BF16),
    "alone, none, MHA, step embedding": MemoryCheck(1, ParallelConfig(), "mha", STEPS),
    "alone, none, MHA, head gate": MemoryCheck(1, ParallelConfig(), "mha", HEAD_GATE),
    "alone, selective, MLA, element gate": MemoryCheck(1, ParallelConfig(recompute="selective"), sections=ELEMENT_GATE),
    "TP2, none, MLA, element gate": MemoryCheck(2, ParallelConfig(tensor=2), sections=ELEMENT_GATE),
    "alone, full, MHA, prelude and coda": MemoryCheck(1, ParallelConfig(recompute="full"), "mha", AROUND),
    "PP2, loop, MLA, prelude and coda": MemoryCheck(2, ParallelConfig(pipeline=2, recompute="loop"), sections=AROUND),
    "DP2 + distributed optimizer, MLA, bf16": MemoryCheck(2, ParallelConfig(distributed_optimizer=True), sections=BF16),
    "TP2, none, MLA": MemoryCheck(2, ParallelConfig(tensor=2)),
    "TP2, loop, MHA": MemoryCheck(2, ParallelConfig(tensor=2, recompute="loop"), "mha"),
    "PP2, none, MLA": MemoryCheck(2, ParallelConfig(pipeline=2)),
    "PP2, none, MLA, one loop": MemoryCheck(2, ParallelConfig(pipeline=2), sections={"model": {"num_loops": 1}}),
    "PP2, full, MHA, bf16": MemoryCheck(2, ParallelConfig(pipeline=2, recompute="full"), "mha", BF16),
    "PP2, loop, MLA": MemoryCheck(2, ParallelConfig(pipeline=2, recompute="loop")),
    "CP2, none, MLA": MemoryCheck(2, ParallelConfig(context=2)),
    "CP2, none, MHA, one document": MemoryCheck(2, ParallelConfig(context=2), "mha", ONE_DOCUMENT),
    "CP2, selective, MHA": MemoryCheck(2, ParallelConfig(context=2, recompute="selective"), "mha"),
    "TP2 x PP2, loop, MLA": MemoryCheck(4, ParallelConfig(tensor=2, pipeline=2, recompute="loop")),
    "CP2 x DP2 + distributed optimizer, MHA": MemoryCheck(
        4, ParallelConfig(context=2, distributed_optimizer=True), "mha"
    ),
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """The selection of checks.

    Args:
        only: run the checks whose names contain this text; all by default.
    """

    only: str = ""


def recipe_of(check: MemoryCheck, width: int = 256) -> RunConfig:
    """Return a small model of ordinary proportions in the check's layout, each attention with another gate."""
    head, layout = width // 4, check.layout
    ranks: dict[str, Any] = {"q_lora_rank": head * 3, "kv_lora_rank": head * 2}
    mla = ranks | {"qk_nope_head_dim": head, "qk_rope_head_dim": head // 2, "v_head_dim": head}
    mha: dict[str, Any] = {"attention": "mha", "num_query_groups": 2}
    attention = {"mla": mla, "mha": mha}[check.attention]
    sizes = {"vocab_size": 8 * width, "hidden_size": width, "ffn_hidden_size": 11 * width // 4, "num_layers": 4}
    heads = {"num_loops": 3, "num_attention_heads": 4, "max_sequence_length": 128}
    # One micro-batch per replica, or more than a pipeline has in flight.
    batch = 2 * (check.ranks // layout.model_ranks) * (1 if layout.pipeline == 1 else 4)
    data = {"train": [{"prefix": "unused"}], "seq_length": 128, "micro_batch_size": 2, "global_batch_size": batch}
    recipe: dict[str, Any] = {
        "output_dir": "unused",
        "model": {**sizes, **heads, **attention},
        "gate": {"kind": {"mla": "lru", "mha": "linear"}[check.attention], "state_size": 32},
        "optim": {"train_steps": 2, "precision": "fp32"},
        "data": data,
        "parallel": asdict(layout),
    }
    recipe |= {key: recipe.get(key, {}) | values for key, values in check.sections.items()}
    return from_dict(RunConfig, recipe, where="tools.plan_check")


def planned_run(config: RunConfig, ranks: int) -> PlannedRun:
    """Return the run for the planner, with a CPU's unpadded heads."""
    return PlannedRun(config, ranks // config.parallel.model_ranks, padded_heads=False)


def measure(config: RunConfig, groups: ProcessGroupCollection) -> dict[str, int]:
    """Return the bytes of each part on this rank, measured in a second step."""
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], config.parallel)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    count = planned_run(config, dist.get_world_size()).micro_batches
    batches = [random_batch(config, config.data.micro_batch_size, documents=True) for _ in range(count)]
    trainer.train(iter(batches), count)
    with saved_bytes(model) as saved:
        trainer.backward(iter(batches), count)
    return {**_held_bytes(trainer), "activations": saved.peak}


def _held_bytes(trainer: Trainer) -> dict[str, int]:
    """Return the bytes of the storages behind weights, gradient buffers, and the rest of Adam's state."""
    weights = _storages(trainer.model.parameters())
    gradients = _storages(one.main_grad for one in trainer.model.parameters() if one.requires_grad)
    adam: list[Tensor] = []
    for one in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        adam += [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        adam += [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    own = {address: size for address, size in _storages(adam).items() if address not in weights}
    return {name: sum(part.values()) for name, part in zip(PARTS, (weights, gradients, own), strict=False)}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def worker(output: Path, names: list[str], width: int = 256) -> None:
    """Measure the checks as one process of a job.

    Rank 0 writes ``output``: each check's bytes on the first tensor- and context-parallel rank of every pipeline rank.
    """
    results = {}
    for name in names:
        config = recipe_of(CHECKS[name], width)
        groups = process_groups.start(0, config.parallel)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (groups.pp.rank(), measure(config, groups)))
        results[name] = [dict(gathered)[rank] for rank in range(config.parallel.pipeline)]
        process_groups.reset()
    if process_groups.is_rank_0():
        output.write_text(json.dumps(results))
    process_groups.stop()


def compare(name: str, measured: list[dict[str, int]], width: int = 256) -> list[tuple[str, int, str, float, float]]:
    """Return (check, pipeline rank, part, predicted bytes, measured bytes) for every part."""
    check = CHECKS[name]
    run = planned_run(recipe_of(check, width), check.ranks)
    rows = []
    for rank, parts in enumerate(measured):
        predicted = rank_memory(run, rank)
        rows += [(name, rank, part, getattr(predicted, part), float(parts[part])) for part in PARTS]
    return rows


def main(argv: list[str]) -> None:
    """``python -m tools.plan_check``; each of its processes runs the same command under torchrun."""
    if "RANK" in os.environ:
        worker(Path(argv[0]), argv[1:])
        return
    config = parse_config(CheckConfig, argv, prog="python -m tools.plan_check", description=str(__doc__))
    names = [name for name in CHECKS if config.only in name]
    require(bool(names), "only", config.only, f"no check's name contains it; there are {' | '.join(CHECKS)}")
    print(f"{'layout':<42}{'rank':>5}  {'part':<12}{'predicted':>12}{'measured':>12}{'off':>8}")
    worst = 0.0
    for ranks in tqdm(sorted({CHECKS[name].ranks for name in names}), unit="job", disable=None):
        for name, measured in launch(ranks, [name for name in names if CHECKS[name].ranks == ranks]).items():
            for _, rank, part, predicted, found in compare(name, measured):
                off = predicted / found - 1
                worst = max(worst, abs(off))
                sizes = f"{predicted / 2**20:>8.2f} MiB{found / 2**20:>8.2f} MiB"
                print(f"{name:<42}{rank:>5}  {part:<12}{sizes}{off:>8.1%}")
    print(f"largest difference {worst:.1%}, allowed {TOLERANCE:.0%}")
    if worst > TOLERANCE:
        sys.exit(1)


def launch(ranks: int, names: list[str]) -> dict[str, list[dict[str, int]]]:
    """Return the measurements of checks that run in ``ranks`` new processes."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        run_module("tools.plan_check", [str(output), *names], ranks=ranks, seconds=TIMEOUT_S, shown=False)
        measured: dict[str, list[dict[str, int]]] = json.loads(output.read_text())
        return measured


if __name__ == "__main__":
    run_main(main)
