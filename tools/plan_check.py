"""Hold the planner's memory against real training steps on this machine's CPU, in layouts of one, two and four processes.

    python -m tools.plan_check

Weights, gradients and optimizer state are the storages that the engine holds; activations are what autograd saves between
forward and backward, at their peak (tools.bench.memory). Ends with status 1 where a part is off by more than 3 %.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.cli import UserError, parse_config, run_main
from looplm.config import (
    DataConfig,
    DataSource,
    GateConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
)
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from pretrain.data import Batch
from pretrain.optim import DTYPES
from pretrain.trainer import Trainer
from tools.bench.memory import saved_bytes
from tools.planning.memory import Memory, rank_memory
from tools.planning.planned_run import PlannedRun

TOLERANCE = 0.03
TIMEOUT_S = 600
PARTS = ("weights", "gradients", "optimizer", "activations")


class Case(NamedTuple):
    """A run that is measured."""

    ranks: int
    layout: ParallelConfig
    attention: str = "mla"
    sections: dict[str, dict[str, Any]] = {}  # noqa: RUF012 (of a NamedTuple, never changed)


BF16 = {"optim": {"precision": "bf16"}}
ONE_DOCUMENT = {"data": {"document_masking": False}}
CASES: dict[str, Case] = {
    "alone, none, MLA": Case(1, ParallelConfig()),
    "alone, none, MHA": Case(1, ParallelConfig(), "mha"),
    "alone, none, MLA, bf16": Case(1, ParallelConfig(), sections=BF16),
    "alone, selective, MLA": Case(1, ParallelConfig(recompute="selective")),
    "alone, full, MLA": Case(1, ParallelConfig(recompute="full")),
    "alone, loop, MHA, bf16": Case(1, ParallelConfig(recompute="loop"), "mha", BF16),
    "alone, loop, MLA": Case(1, ParallelConfig(recompute="loop")),
    "DP2 + distributed optimizer, MLA, bf16": Case(2, ParallelConfig(distributed_optimizer=True), sections=BF16),
    "TP2, none, MLA": Case(2, ParallelConfig(tensor=2)),
    "TP2, loop, MHA": Case(2, ParallelConfig(tensor=2, recompute="loop"), "mha"),
    "PP2, none, MLA": Case(2, ParallelConfig(pipeline=2)),
    "PP2, full, MHA, bf16": Case(2, ParallelConfig(pipeline=2, recompute="full"), "mha", BF16),
    "PP2, loop, MLA": Case(2, ParallelConfig(pipeline=2, recompute="loop")),
    "CP2, none, MLA": Case(2, ParallelConfig(context=2)),
    "CP2, none, MHA, one document": Case(2, ParallelConfig(context=2), "mha", ONE_DOCUMENT),
    "CP2, selective, MHA": Case(2, ParallelConfig(context=2, recompute="selective"), "mha"),
    "TP2 x PP2, loop, MLA": Case(4, ParallelConfig(tensor=2, pipeline=2, recompute="loop")),
    "CP2 x DP2 + distributed optimizer, MHA": Case(4, ParallelConfig(context=2, distributed_optimizer=True), "mha"),
}


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is measured.

    Args:
        only: names of the cases that hold this text; everything without it.
    """

    only: str = ""


def recipe_of(case: Case, width: int = 256) -> RunConfig:
    """A small model of ordinary proportions in the case's layout."""
    common: dict[str, Any] = {
        "vocab_size": 8 * width, "hidden_size": width, "ffn_hidden_size": 11 * width // 4, "num_layers": 4,
        "num_loops": 3, "num_attention_heads": 4, "max_sequence_length": 128,
    }  # fmt: skip
    if case.attention == "mha":
        model = ModelConfig(**common, attention="mha", num_query_groups=2)
    else:
        head = width // 4
        model = ModelConfig(**common, q_lora_rank=head * 3, kv_lora_rank=head * 2, qk_nope_head_dim=head, qk_rope_head_dim=head // 2, v_head_dim=head)  # fmt: skip
    layout = case.layout
    replicas = case.ranks // layout.model_ranks
    batch = 2 * replicas * (1 if layout.pipeline == 1 else 4)  # a pipeline with more than it has in flight
    config = RunConfig(
        output_dir="unused",
        model=model,
        gate=GateConfig(kind="lru" if case.attention == "mla" else "linear", state_size=32),
        loss=LossConfig(head_chunk_tokens=64),
        optim=OptimConfig(train_steps=2, precision="fp32"),
        data=DataConfig(
            train=(DataSource(prefix="unused"),), seq_length=128, micro_batch_size=2, global_batch_size=batch
        ),
        parallel=layout,
    )
    return replace(config, **{key: replace(getattr(config, key), **values) for key, values in case.sections.items()})


def candidate_of(config: RunConfig, ranks: int) -> PlannedRun:
    """The case as the planner sees it, with a CPU's composed norms."""
    return PlannedRun(config, ranks // config.parallel.model_ranks, fused_norms=False)


def measure(config: RunConfig, groups: ProcessGroupCollection) -> dict[str, int]:
    """Bytes of each part on this rank, after a first step and during a second one."""
    model = LoopLM(config.model, config.gate, groups, DTYPES[config.optim.precision], config.parallel)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    count = candidate_of(config, dist.get_world_size()).micro_batches
    batches = [_batch(config) for _ in range(count)]
    trainer.train(iter(batches), count)
    with saved_bytes(model) as saved:
        trainer.backward(iter(batches), count)
    return {**_held(trainer.ddp, trainer.optimizer), "activations": saved.peak}


def _batch(config: RunConfig) -> Batch:
    data = config.data
    ids_BS = torch.randint(config.model.vocab_size, (data.micro_batch_size, data.seq_length + 1), device=DEVICE)
    start_SB = torch.zeros(data.seq_length, data.micro_batch_size, dtype=torch.int64, device=DEVICE)
    mask_SB = torch.ones(data.seq_length, data.micro_batch_size, device=DEVICE)
    return Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), mask_SB, start_SB if data.document_masking else None)


def _held(ddp: DistributedDataParallel, optimizer: MegatronOptimizer) -> dict[str, int]:
    """Bytes of the storages behind weights, gradient buffers, and what else Adam has."""
    weights = _storages(ddp.module.parameters())
    gradients = _storages(one.main_grad for one in ddp.module.parameters() if one.requires_grad)
    adam: list[Tensor] = []
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam += [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        adam += [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x) and x.dim()]
    own = {place: size for place, size in _storages(adam).items() if place not in weights}
    return {name: sum(part.values()) for name, part in zip(PARTS, (weights, gradients, own), strict=False)}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def measure_cases(names: list[str], width: int = 256) -> dict[str, list[dict[str, int]]]:
    """In a started job, each case's bytes on the first tensor- and context-parallel rank of every pipeline rank; rank 0
    has them all."""
    found = {}
    for name in names:
        config = recipe_of(CASES[name], width)
        groups = process_groups.start(0, config.parallel)
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, (groups.pp.rank(), measure(config, groups)))
        found[name] = [dict(ranks)[rank] for rank in range(config.parallel.pipeline)]
        process_groups.reset()
    return found


def compare(name: str, measured: list[dict[str, int]], width: int = 256) -> list[tuple[str, int, str, float, float]]:
    """(case, pipeline rank, part, predicted, measured) of every part, in bytes."""
    case = CASES[name]
    candidate = candidate_of(recipe_of(case, width), case.ranks)
    rows = []
    for rank, found in enumerate(measured):
        predicted: Memory = rank_memory(candidate, rank)
        rows += [(name, rank, part, asdict(predicted)[part], float(found[part])) for part in PARTS]
    return rows


def main(argv: list[str]) -> None:
    """``python -m tools.plan_check``; each of its processes runs the same command under torchrun."""
    if "RANK" in os.environ:
        worker(Path(argv[0]), argv[1:])
        return
    config = parse_config(CheckConfig, argv, prog="python -m tools.plan_check", description=str(__doc__))
    names = [name for name in CASES if config.only in name]
    print(f"{'layout':<42}{'stage':>5}  {'part':<12}{'predicted':>12}{'measured':>12}{'off':>8}")
    worst = 0.0
    for ranks in sorted({CASES[name].ranks for name in names}):
        for name, measured in launch(ranks, [name for name in names if CASES[name].ranks == ranks]).items():
            for _, rank, part, predicted, found in compare(name, measured):
                off = predicted / found - 1
                worst = max(worst, abs(off))
                print(
                    f"{name:<42}{rank:>5}  {part:<12}{predicted / 2**20:>8.2f} MiB{found / 2**20:>8.2f} MiB{off:>8.1%}"
                )
    print(f"largest difference {worst:.1%}, allowed {TOLERANCE:.0%}")
    if worst > TOLERANCE:
        sys.exit(1)


def launch(ranks: int, names: list[str]) -> dict[str, list[dict[str, int]]]:
    """Measure the cases in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += ["-m", "tools.plan_check", str(output), *names]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, timeout=TIMEOUT_S, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            raise UserError(f"{' '.join(command)}: ended with status {done.returncode}; what it printed stands above")
        found: dict[str, list[dict[str, int]]] = json.loads(output.read_text())
        return found


def worker(output: Path, names: list[str], width: int = 256) -> None:
    """What each process does: measure the cases; rank 0 writes ``output``."""
    found = measure_cases(names, width)
    if process_groups.is_rank_0():
        output.write_text(json.dumps(found))
    process_groups.stop()


if __name__ == "__main__":
    run_main(main)
