"""Measure a pipeline's bubble: loops as virtual stages against loop by loop, both compared with their formulas.

    torchrun --nproc-per-node 2 -m tools.bench.pipeline
    torchrun --nproc-per-node 4 -m tools.bench.pipeline --micro_batches "[4,8]"

Each rank is a process with one thread. Both schedules run the same views of the same model on the same micro-batches,
and are timed in turns; tests check that their losses and gradients are equal. The bubble is the time that a step takes
beyond the busiest rank's work, as a share of that work. Megatron's own timers measure both.
"""

import inspect
import os
import statistics
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

from looplm.bounds import check_bounds, positive, require
from looplm.cli import parse_config, run_main
from looplm.config import GateConfig, LossConfig, ModelConfig, OptimConfig, ParallelConfig
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.pipeline import LoopView
from pretrain.data import Batch
from pretrain.trainer import Trainer
from tools.bench.timing import in_turns
from tools.local_ranks import run_module
from tools.planning.schedule import interleaved_bubble, loop_by_loop_bubble

RANKS, TIMEOUT_S, VOCABULARY = 2, 900, 256
COMMAND = "torchrun --nproc-per-node 2 -m tools.bench.pipeline"


@dataclass(frozen=True, kw_only=True)
class PipelineBenchConfig:
    """Size of the measurement. The vocabulary is small, so that the head does not make the last rank much slower.

    Args:
        repeats: timed steps of each schedule, in turns.
        micro_batches: micro-batches in a step; each number is measured.
        num_loops: loops of the stack.
        layers_per_rank: layers on each rank.
        hidden_size: width of the model.
        seq_length: tokens of a micro-batch.
    """

    repeats: int = positive(5)
    micro_batches: tuple[int, ...] = positive((2, 4, 8))
    num_loops: int = positive(4)
    layers_per_rank: int = positive(2)
    hidden_size: int = positive(256)
    seq_length: int = positive(256)

    def __post_init__(self) -> None:
        check_bounds(self, "")


def loop_by_loop(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: list[Iterator[Batch]],
    model: list[LoopView],
    num_microbatches: int,
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    group: dist.ProcessGroup,
) -> list[Tensor]:
    """Run the loops as a pipeline without virtual stages must; called as Megatron's schedules are.

    All micro-batches pass the pipeline once for the first loop. The last rank then sends its results, in one message,
    back to the first rank for the second loop. Backward does the same in reverse. All activations are kept.

    Returns:
        the report of ``forward_step_func``'s loss function for each micro-batch, on the last rank.
    """
    config = model[0].config
    # Megatron-core 0.17 and later do not take the model's type.
    model_type = [model[0].model_type] if "model_type" in inspect.signature(backward_step).parameters else []
    ring = _Ring(group, (seq_length, micro_batch_size, config.hidden_size), config.params_dtype)
    passes: list[list[tuple[Tensor | None, Tensor]]] = []  # input and output of each micro-batch in each loop
    reports: list[Tensor] = []
    tokens = torch.zeros((), dtype=torch.int, device=DEVICE)
    if config.timers is not None:
        config.timers("forward-backward", log_level=1).start(barrier=True)
    with config.no_sync_func():
        for loop, view in enumerate(model):
            outputs = [output for _, output in passes[-1]] if passes else []
            returned = ring.hand_over(outputs, num_microbatches, backward=False)
            passes.append([])
            is_last_stage = ring.last and view is model[-1]
            step = partial(forward_step, cp_group_size=1, vp_stage=loop, is_last_stage=is_last_stage)
            for number in range(num_microbatches):
                if ring.first:
                    received = returned[number].requires_grad_() if loop else None
                else:
                    received = ring.receive(-1).requires_grad_()
                batches = data_iterator[loop]
                output, count = step(forward_step_func, batches, view, num_microbatches, received, reports, config)
                tokens += count
                passes[-1].append((received, output))
                if not ring.last:
                    ring.send(output, +1)
            ring.flush()
        grads: list[Tensor] = []
        for view in reversed([] if forward_only else model):
            returned = ring.hand_over(grads, num_microbatches, backward=True) if view is not model[-1] else []
            grads = []
            for number, (received, output) in enumerate(passes.pop()):
                grad = (returned[number] if returned else None) if ring.last else ring.receive(+1)
                input_grad = backward_step(received, output, grad, *model_type, config)
                grads.append(input_grad)
                if not ring.first:
                    ring.send(input_grad, -1)
            ring.flush()
    if config.finalize_model_grads_func is not None and not forward_only:
        config.finalize_model_grads_func(model, tokens)
    if config.timers is not None:
        config.timers("forward-backward").stop()
    return reports


class _Ring:
    """Messages of one shape between neighboring pipeline ranks; the last rank and the first are neighbors too."""

    def __init__(self, group: dist.ProcessGroup, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.group, self.shape, self.dtype = group, shape, dtype
        self.rank, self.size = group.rank(), group.size()
        self.first, self.last = self.rank == 0, self.rank == self.size - 1
        self._sending: list[Any] = []

    def _peer(self, step: int) -> int:
        return dist.get_global_rank(self.group, (self.rank + step) % self.size)

    def send(self, x: Tensor, step: int) -> None:
        """Send to the rank ``step`` further on, without waiting."""
        self._sending.append(dist.isend(x.detach().contiguous(), self._peer(step), group=self.group))

    def receive(self, step: int, messages: int | None = None) -> Tensor:
        """Receive from the rank ``step`` further on."""
        shape = self.shape if messages is None else (messages, *self.shape)
        x = torch.empty(shape, dtype=self.dtype, device=DEVICE)
        dist.recv(x, self._peer(step), group=self.group)
        return x

    def flush(self) -> None:
        """Wait until everything that was sent has been received."""
        for work in self._sending:
            work.wait()
        self._sending.clear()

    def hand_over(self, results: list[Tensor], count: int, backward: bool) -> list[Tensor]:
        """Send a pass's results from the rank where it ended to the rank where the next pass starts.

        Returns the results on that rank, and an empty list on all others.
        """
        ends, starts, step = (self.first, self.last, -1) if backward else (self.last, self.first, +1)
        if not results:
            return []
        if ends:
            self.send(torch.stack([x.detach() for x in results]), step)
            self.flush()
        return list(self.receive(-step, count)) if starts else []


def main(argv: list[str]) -> None:
    """``torchrun --nproc-per-node 2 -m tools.bench.pipeline``"""
    config = parse_config(PipelineBenchConfig, argv, prog=COMMAND, description=str(__doc__))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    require(ranks > 1, "WORLD_SIZE", ranks, f"a pipeline has at least 2 ranks: {COMMAND}")
    for count in config.micro_batches:
        require(count % ranks == 0, "micro_batches", count, f"give multiples of the {ranks} ranks")
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
    """Return one model with a trainer for each schedule."""
    width, layout = config.hidden_size, ParallelConfig(pipeline=ranks)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": width, "ffn_hidden_size": 4 * width}
    sizes |= {"num_layers": config.layers_per_rank * ranks, "num_loops": config.num_loops}
    sizes |= {"num_attention_heads": 4, "num_query_groups": 4, "max_sequence_length": config.seq_length}
    model, optim = ModelConfig(attention="mha", **sizes), OptimConfig(train_steps=1, precision="fp32")
    groups = process_groups.start(0, layout)
    trainer = Trainer(LoopLM(model, GateConfig(), groups, layout=layout), LossConfig(), optim, layout, groups)
    other = copy(trainer)
    other.schedule = partial(loop_by_loop, group=groups.pp)
    return {"virtual stages": trainer, "loop by loop": other}


def random_batches(config: PipelineBenchConfig, count: int) -> list[Batch]:
    """Return micro-batches that are the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (count, 1, config.seq_length + 1), generator=generator).to(DEVICE)
    mask_SB = torch.ones(config.seq_length, 1, device=DEVICE)
    return [Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), mask_SB, None) for ids_BS in ids]


def measure(trainers: dict[str, Trainer], config: PipelineBenchConfig, ranks: int, count: int) -> list[str]:
    """Return lines on both schedules with ``count`` micro-batches."""
    batches, sizes = random_batches(config, count), (ranks, config.num_loops, count)
    contenders = {name: partial(_time_step, trainer, batches) for name, trainer in trainers.items()}
    formulas = {"virtual stages": interleaved_bubble(*sizes), "loop by loop": loop_by_loop_bubble(*sizes)}
    lines, medians = [], {}
    for name, times in in_turns(contenders, config.repeats).items():
        step, work = (statistics.median(column) for column in zip(*times, strict=True))
        bubble = statistics.median(step / work - 1 for step, work in times)
        medians[name] = step
        milliseconds = f"{1e3 * step:>6.0f} ms{1e3 * work:>6.0f} ms"
        lines.append(f"  {count:<15}{name:<16}{milliseconds}{bubble:>9.1%}{formulas[name]:>9.1%}")
    ratio = medians["virtual stages"] / medians["loop by loop"]
    expected = (1 + formulas["virtual stages"]) / (1 + formulas["loop by loop"])
    return [*lines, f"  {'':<15}{'virtual stages / loop by loop':<34}{ratio:>9.2f}{expected:>9.2f}"]


def _time_step(trainer: Trainer, batches: list[Batch]) -> tuple[float, float]:
    """Return the seconds of the slowest rank's schedule, and of the busiest rank's work in it."""
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
    """Measure in new processes, on the CPU even if the machine has a GPU; rank 0 prints."""
    print(flush=True)
    run_module("tools.bench.pipeline", ["--repeats", str(repeats)], ranks=RANKS, seconds=TIMEOUT_S, shown=True)


if __name__ == "__main__":
    run_main(main)
