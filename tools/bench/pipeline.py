"""Measure a pipeline's bubble: loops as virtual stages against loop by loop, both against the formula.

Each rank is a process with one thread. Both schedules run the same views of the same model on the same micro-batches and
are timed in turns; tests hold their losses and gradients equal. The bubble is what a step takes beyond the work of the
busiest rank, as a share of that work; Megatron's own timers take both.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import backward_step, forward_step
from megatron.core.timers import Timers
from torch import Tensor

from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import GateConfig, LossConfig, ModelConfig, OptimConfig, ParallelConfig
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.pipeline import LoopStage
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tools.planning.schedule import loop_by_loop_bubble, interleaved_bubble

RANKS, TIMEOUT_S = 2, 900


@dataclass(frozen=True, kw_only=True)
class PipelineBenchConfig:
    """What is measured. The vocabulary is small, so that the last rank, which has the head, is not the slowest by far.

    Args:
        repeats: timed steps of each schedule, in turns.
        micro_batches: of a step; each number is measured.
        num_loops: passes of the stack.
        layers_per_rank: blocks on each rank.
        hidden_size: width of the model.
        seq_length: tokens of a micro-batch.
    """

    repeats: int = 5
    micro_batches: tuple[int, ...] = (2, 4, 8)
    num_loops: int = 4
    layers_per_rank: int = 2
    hidden_size: int = 256
    seq_length: int = 256

    def __post_init__(self) -> None:
        require(self.repeats > 0, "repeats", self.repeats, "give a number above 0")


def loop_by_loop(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: list[Iterator[Batch]],
    model: list[LoopStage],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """What a pipeline without virtual stages does with loops; called as Megatron's schedules are.

    All micro-batches go through the pipeline once for the first loop. The last rank then hands its results, in one
    message, back to the first rank for the second loop. Backward does the same in reverse. Keeps every activation.

    Returns:
        what ``forward_step_func``'s loss function reports of each micro-batch, on the last rank.
    """
    config = model[0].config
    wire = _Wire(group, (seq_length, micro_batch_size, config.hidden_size), config.params_dtype)
    made: list[list[tuple[Tensor | None, Tensor]]] = []  # input and output of each micro-batch in each loop
    reports: list[Tensor] = []
    tokens = torch.zeros((), dtype=torch.int, device=DEVICE)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=True)
    with config.no_sync_func():
        for loop, stage in enumerate(model):
            last_stage = wire.last and stage is model[-1]
            handed = wire.hand_over([output for _, output in made[-1]] if made else [], num_microbatches, back=False)
            made.append([])
            for number in range(num_microbatches):
                if wire.first:
                    received = handed[number].requires_grad_() if loop else None
                else:
                    received = wire.receive(-1).requires_grad_()
                output, count = forward_step(
                    forward_step_func, data_iterator[loop], stage, num_microbatches, received, reports, config,
                    cp_group_size=1, vp_stage=loop, is_last_stage=last_stage,
                )  # fmt: skip
                tokens += count
                made[-1].append((received, output))
                if not wire.last:
                    wire.send(output, +1)
            wire.flush()
        grads: list[Tensor] = []
        for stage in reversed([] if forward_only else model):
            handed = wire.hand_over(grads, num_microbatches, back=True) if stage is not model[-1] else []
            grads = []
            for number, (received, output) in enumerate(made.pop()):
                grad = (handed[number] if handed else None) if wire.last else wire.receive(+1)
                input_grad = backward_step(received, output, grad, stage.model_type, config)
                grads.append(input_grad)
                if not wire.first:
                    wire.send(input_grad, -1)
            wire.flush()
    if config.finalize_model_grads_func is not None and not forward_only:
        config.finalize_model_grads_func(model, tokens)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return reports


class _Wire:
    """Messages of one shape between neighbours of a pipeline; the last rank and the first are neighbours too."""

    def __init__(self, group: dist.ProcessGroup, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.group, self.shape, self.dtype = group, shape, dtype
        self.rank, self.size = group.rank(), group.size()
        self.first, self.last = self.rank == 0, self.rank == self.size - 1
        self._sending: list[Any] = []

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.group, (self.rank + step) % self.size)

    def send(self, x: Tensor, step: int) -> None:
        """To the rank ``step`` further on, without waiting."""
        self._sending.append(dist.isend(x.detach().contiguous(), self._peer(step), group=self.group))

    def receive(self, step: int, messages: int | None = None) -> Tensor:
        """From the rank ``step`` further on."""
        shape = self.shape if messages is None else (messages, *self.shape)
        x = torch.empty(shape, dtype=self.dtype, device=DEVICE)
        dist.recv(x, self._peer(step), group=self.group)
        return x

    def flush(self) -> None:
        """Wait until everything that was sent is received."""
        for work in self._sending:
            work.wait()
        self._sending.clear()

    def hand_over(self, results: list[Tensor], count: int, back: bool) -> list[Tensor]:
        """Carry a finished pass's results from where it ended to where the next one starts; there, return them."""
        ends, starts, step = (self.first, self.last, -1) if back else (self.last, self.first, +1)
        if not results:
            return []
        if ends:
            self.send(torch.stack([x.detach() for x in results]), step)
            self.flush()
        return list(self.receive(-step, count)) if starts else []


def main(argv: list[str]) -> None:
    """``torchrun --nproc-per-node 2 -m tools.bench.pipeline``"""
    command = "torchrun --nproc-per-node 2 -m tools.bench.pipeline"
    config = parse_config(PipelineBenchConfig, argv, prog=command, description=str(__doc__))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    require(ranks > 1, "WORLD_SIZE", ranks, f"a pipeline has at least 2 ranks: {command}")
    for count in config.micro_batches:
        require(count > 0 and count % ranks == 0, "micro_batches", count, f"give multiples of the {ranks} ranks")
    trainers = build(config, ranks)
    try:
        lines = [
            f"pipeline: {ranks} ranks, {config.num_loops} loops of {config.layers_per_rank} layers a rank, "
            f"{config.seq_length} x {config.hidden_size}, fp32, {torch.get_num_threads()} thread a rank",
            f"  {'micro-batches':<15}{'schedule':<16}{'step':>9}{'work':>9}{'bubble':>9}{'formula':>9}",
        ]
        for count in config.micro_batches:
            lines += measure(trainers, config, ranks, count)
        if process_groups.is_rank_0():
            print("\n".join(lines), flush=True)
    finally:
        process_groups.stop()


def build(config: PipelineBenchConfig, ranks: int) -> dict[str, Trainer]:
    """One model under both schedules."""
    layout = ParallelConfig(pipeline=ranks)
    width = config.hidden_size
    model = ModelConfig(
        vocab_size=256, hidden_size=width, ffn_hidden_size=4 * width, num_layers=config.layers_per_rank * ranks,
        num_loops=config.num_loops, num_attention_heads=4, attention="mha", num_query_groups=4,
        max_sequence_length=config.seq_length,
    )  # fmt: skip
    loss, optim = LossConfig(), OptimConfig(train_steps=1, precision="fp32")
    groups = process_groups.start(0, layout)
    trainer = Trainer(LoopLM(model, GateConfig(), groups, layout=layout), loss, optim, layout, groups)
    other = copy(trainer)
    other.schedule = partial(loop_by_loop, group=groups.pp)
    return {"virtual stages": trainer, "loop by loop": other}


def random_batches(config: PipelineBenchConfig, count: int) -> list[Batch]:
    """The same on every rank."""
    ids = torch.randint(256, (count, 1, config.seq_length + 1), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask_SB = torch.ones(config.seq_length, 1, device=DEVICE)
    return [Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), mask_SB, None) for ids_BS in ids]


def measure(trainers: dict[str, Trainer], config: PipelineBenchConfig, ranks: int, count: int) -> list[str]:
    """Lines on both schedules with ``count`` micro-batches."""
    batches = random_batches(config, count)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for turn in range(config.repeats + 1):
        for name, trainer in trainers.items():
            took = _timed(trainer, batches)
            if turn:  # the first turn warms up
                seconds[name].append(took)
    sizes, lines, medians = (ranks, config.num_loops, count), [], {}
    formulas = {"virtual stages": interleaved_bubble(*sizes), "loop by loop": loop_by_loop_bubble(*sizes)}
    for name, runs in seconds.items():
        step, work = (statistics.median(column) for column in zip(*runs, strict=True))
        bubble = statistics.median(step / work - 1 for step, work in runs)
        medians[name] = step
        lines.append(
            f"  {count:<15}{name:<16}{1e3 * step:>6.0f} ms{1e3 * work:>6.0f} ms{bubble:>9.1%}{formulas[name]:>9.1%}"
        )
    ratio = medians["virtual stages"] / medians["loop by loop"]
    expected = (1 + formulas["virtual stages"]) / (1 + formulas["loop by loop"])
    return [*lines, f"  {'':<15}{'virtual stages / loop by loop':<34}{ratio:>9.2f}{expected:>9.2f}"]


def _timed(trainer: Trainer, batches: list[Batch]) -> tuple[float, float]:
    """Seconds of the slowest rank's schedule, and of the busiest rank's work in it."""
    config = trainer.ddp.module.config
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None  # the schedule alone
    config.timers = Timers(log_level=2, log_option="max")
    trainer.backward(iter(batches), len(batches))
    step = config.timers("forward-backward").elapsed()
    work = sum(config.timers(f"{way}-compute").elapsed() for way in ("forward", "backward"))
    config.finalize_model_grads_func, config.timers = finalize, None
    slowest = torch.tensor([step, work], dtype=torch.float64, device=DEVICE)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest[0]), float(slowest[1])


def launch(repeats: int) -> None:
    """Measure in processes of their own, on the processor whatever else the machine has, and let rank 0 print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command += ["-m", "tools.bench.pipeline", "--repeats", str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    print(flush=True)
    if subprocess.run(command, env=environment, timeout=TIMEOUT_S).returncode:
        raise UserError("tools.bench.pipeline: failed, see above")


if __name__ == "__main__":
    run_main(main)
