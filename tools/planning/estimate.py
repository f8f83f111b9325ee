"""Time of a step, and of a whole training stage, in one layout on a cluster.

A rank's pass takes the time of its matrix products, of attention, of the memory traffic between them, and of the
messages it waits for; none of these overlap. A step is M micro-batches of R passes on the busiest rank, the pipeline's
bubble, the part of data parallelism's messages that backward does not hide, and the optimizer.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, cycle, islice, repeat
from math import ceil
from typing import Any, NamedTuple

from looplm.config import DataConfig, RunConfig
from pretrain.batch_schedule import BatchSchedule
from pretrain.loops import loops_of_step
from tools.planning import communication
from tools.planning.activations import core_bytes, written_bytes
from tools.planning.flops import backward_flops, forward_flops, fp8_share, model_flops_per_token
from tools.planning.hardware import ADAM_BYTES, LOGIT_BYTES, LOGIT_GRADIENT_BYTES, Cluster
from tools.planning.memory import FP32, Memory, fullest_rank_memory, optimizer_shards
from tools.planning.planned_run import Amounts, PlannedRun

DAY_S = 86400
DRAWS = 20_000  # sampled numbers of loops, drawn in a third of a second; their mean has a standard error of 0.4 %


@dataclass(frozen=True, kw_only=True)
class PassTime(Amounts):
    """Seconds of one pass on one rank."""

    matmul: float  # matrix products
    attention: float  # fused attention
    traffic: float  # memory traffic between the products
    tensor: float  # waiting for tensor-parallel messages
    context: float  # waiting for keys and values


@dataclass(frozen=True, kw_only=True)
class StepTime(PassTime):
    """Seconds of one step: all passes of the busiest rank, and what is added to them."""

    bubble: float  # filling and emptying of the pipeline, with its messages
    gradients: float  # the part of their reduction that backward does not hide
    weights: float  # gathering them from the distributed optimizer's shards
    optimizer: float  # the update


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted time and memory of a run on a cluster."""

    run: PlannedRun
    time: StepTime  # of a full step
    memory: Memory  # of the pipeline rank that uses most
    sent: dict[str, float]  # bytes that a rank moves in a step, by kind

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the whole job at the full batch."""
        data = self.run.config.data
        return data.global_batch_size * data.seq_length / self.time.total

    def utilization(self, cluster: Cluster) -> float:
        """Return model FLOPs utilization: the share of the dense bf16 peak, without recomputation."""
        flops = self.tokens_per_s * model_flops_per_token(self.run)
        return flops / (cluster.gpus * cluster.gpu.bf16_tflops * 1e12)

    def as_dict(self, cluster: Cluster) -> dict[str, Any]:
        """Return plain values for a JSON file: seconds, bytes, tokens per second."""
        config = self.run.config
        return {
            "parallel": asdict(config.parallel),
            "micro_batch_size": config.data.micro_batch_size,
            "replicas": self.run.replicas,
            "micro_batches": self.run.micro_batches,
            "step_seconds": self.time.total,
            "tokens_per_s": self.tokens_per_s,
            "utilisation": self.utilization(cluster),
            "memory_bytes": self.memory.total,
            "memory": asdict(self.memory),
            "time": asdict(self.time),
            "sent_bytes": self.sent,
        }


class Budget(NamedTuple):
    """Steps of a training stage by their batch size in samples and their loops, and the tokens that they consume."""

    steps: Counter[tuple[int, int]]
    tokens: int

    @property
    def mean_loops(self) -> float:
        """Loops of a step on average."""
        return sum(loops * count for (_, loops), count in self.steps.items()) / self.steps.total()


def budget_of(recipe: RunConfig) -> Budget:
    """Return the steps and tokens of a recipe, whose batch may grow and whose loops may be sampled."""
    steps = Counter(islice(zip(_batch_sizes(recipe.data), _loops(recipe), strict=False), recipe.optim.train_steps))
    samples = sum(size * count for (size, _), count in steps.items())
    return Budget(steps, samples * recipe.data.seq_length)


def _batch_sizes(data: DataConfig) -> Iterator[int]:
    """Yield the samples of each step, without end."""
    schedule, consumed = BatchSchedule(data, 1), 0
    while data.rampup is not None and consumed < data.rampup.samples:
        size = schedule.at(consumed)[1]
        consumed += size
        yield size
    yield from repeat(data.global_batch_size)


def _loops(recipe: RunConfig) -> Iterator[int]:
    """Return the loops of each step: those that training samples, which a long run repeats from :data:`DRAWS` on."""
    steps = recipe.optim.train_steps
    onset = round(recipe.loss.loop_onset * steps)
    drawn = [loops_of_step(recipe, step) for step in range(onset, min(steps, onset + DRAWS))]
    return chain(repeat(recipe.loss.onset_loops, onset), cycle(drawn))


def days(run: PlannedRun, cluster: Cluster, budget: Budget) -> float:
    """Return the days of training alone, without validation, checkpoints, failures and queues."""
    seconds = (
        count * step_time(replace(run, loops=loops), cluster, size).total
        for (size, loops), count in budget.steps.items()
    )
    return sum(seconds) / DAY_S


def pass_time(run: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> PassTime:
    """Return the time of one forward pass, or of one backward pass with its recomputation."""
    assume, peak = cluster.assume, cluster.gpu.bf16_tflops * 1e12
    flops = (backward_flops if backward else forward_flops)(run, rank)
    in_fp8 = flops.layers * fp8_share(run, rank, backward) if cluster.fp8 else 0.0
    fp8_peak = cluster.gpu.fp8_tflops * 1e12 if cluster.fp8 else peak
    return PassTime(
        matmul=(in_fp8 / fp8_peak + (flops.layers - in_fp8 + flops.head) / peak) / assume.matmul,
        attention=flops.attention / peak / assume.attention,
        traffic=_memory_traffic_bytes(run, rank, assume.traffic, backward) / (cluster.gpu.hbm_gbs * 1e9),
        tensor=communication.tensor_traffic(run, rank, cluster, backward).seconds,
        context=communication.context_traffic(run, rank, cluster, backward).seconds,
    )


def _memory_traffic_bytes(run: PlannedRun, rank: int, traffic: float, backward: bool) -> float:
    """Return the memory traffic of one pass: a multiple of what layers write, and in forward that of the head.

    Backward has twice that of forward, and that of what it recomputes.
    """
    layers, written = run.layers_in_a_pass(rank, backward) * traffic / 3, written_bytes(run)
    if not backward:
        return layers * written + (_head_traffic_bytes(run) if run.is_last(rank) else 0.0)
    if run.frozen:
        return 0.0
    again = {"none": 0.0, "selective": core_bytes(run), "full": written, "loop": written}
    return layers * (2 * written + again[run.config.parallel.recompute])


def _head_traffic_bytes(run: PlannedRun) -> float:
    """Return the memory traffic of the head's one pass: the logits, and in stage 1 their and the weight's gradients."""
    # Each chunk's product is written, read, and added to a sum in fp32 that is read and written.
    chunks = ceil(run.tokens / run.head_chunk)
    weight = chunks * run.head_rows * run.config.model.hidden_size * 2 * (run.number_bytes + FP32)
    gradients = run.tokens * run.head_rows * LOGIT_GRADIENT_BYTES + weight
    return run.tokens * run.head_rows * LOGIT_BYTES + gradients * run.loops_with_head_gradients / run.num_loops


def step_time(run: PlannedRun, cluster: Cluster, batch: int) -> StepTime:
    """Return the time of a step of ``batch`` samples."""
    layout, ranks = run.config.parallel, range(run.config.parallel.pipeline)
    times = {rank: [pass_time(run, rank, cluster, backward) for backward in (False, True)] for rank in ranks}
    busiest = max(ranks, key=lambda rank: sum(time.total for time in times[rank]))
    forward, backward = times[busiest]
    passes = run.num_loops * run.micro_batches_of(batch)
    # A pass of each other rank, forward while the pipeline fills and backward while it empties. For equal ranks this is
    # (P - 1) / (R M) of the work (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2, with R for its v).
    bubble = sum(time.total for rank in ranks if rank != busiest for time in times[rank])
    bubble += 2 * (layout.pipeline - 1) * communication.pipeline_message(run, cluster).seconds
    reduction = communication.gradient_traffic(run, busiest, cluster).seconds
    hidden = backward.total if layout.overlap_grad_reduce and not run.frozen else 0.0
    updated = run.trained(busiest) / optimizer_shards(run)
    return StepTime(
        **vars((forward + backward).times(passes)),
        bubble=bubble,
        gradients=max(0.0, reduction - hidden),
        weights=communication.weight_traffic(run, busiest, cluster).seconds,
        optimizer=updated * ADAM_BYTES / (cluster.gpu.hbm_gbs * 1e9),
    )


def estimate(run: PlannedRun, cluster: Cluster) -> Estimate:
    """Return time and memory of a run at its full batch."""
    return Estimate(
        run=run,
        time=step_time(run, cluster, run.config.data.global_batch_size),
        memory=fullest_rank_memory(run),
        sent=sent_bytes(run, cluster),
    )


def sent_bytes(run: PlannedRun, cluster: Cluster) -> dict[str, float]:
    """Return the bytes that a rank at the end of the pipeline moves in a step, by kind."""
    rank, passes = run.config.parallel.pipeline - 1, run.num_loops * run.micro_batches
    both = (False, True)
    return {
        "tensor": passes * sum(communication.tensor_traffic(run, rank, cluster, way).bytes for way in both),
        "context": passes * sum(communication.context_traffic(run, rank, cluster, way).bytes for way in both),
        "pipeline": communication.messages_sent(run, rank) * communication.pipeline_message(run, cluster).bytes,
        "gradients": communication.gradient_traffic(run, rank, cluster).bytes,
        "weights": communication.weight_traffic(run, rank, cluster).bytes,
    }
