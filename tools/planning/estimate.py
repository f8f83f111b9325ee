"""How long a step of a layout takes, and what its ranks hold: every part by its formula.

A rank's pass takes the time of its matrix products, of attention, of the memory traffic between them, and of the messages
it waits for; nothing of these overlaps. A step is M micro-batches of R passes on the busiest rank, the pipeline's bubble,
what data parallelism cannot hide, and the optimizer.
"""

from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from tools.planning.activations import layer_bytes
from tools.planning.communication import (
    context_traffic,
    gradient_traffic,
    pipeline_message,
    tensor_traffic,
    weight_traffic,
)
from tools.planning.flops import backward_flops, forward_flops, model_flops_per_token
from tools.planning.hardware import ADAM_BYTES, LOGIT_BYTES, Cluster
from tools.planning.memory import FP32, Memory, fullest_rank, optimizer_shards
from tools.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of one pass on one rank."""

    matmul: float
    attention: float
    traffic: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.matmul + self.attention + self.traffic + self.tensor + self.context

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(**{key: value + getattr(other, key) for key, value in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one step.

    Args:
        matmul: matrix products of the busiest rank.
        attention: its fused attention.
        traffic: its memory traffic between the products.
        tensor: its waiting for tensor-parallel messages.
        context: its waiting for keys and values.
        bubble: filling and emptying of the pipeline, messages included.
        gradients: of their reduction, what does not hide behind backward.
        weights: their gathering from the distributed optimizer's shares.
        optimizer: the update.
    """

    matmul: float
    attention: float
    traffic: float
    tensor: float
    context: float
    bubble: float
    gradients: float
    weights: float
    optimizer: float

    @property
    def total(self) -> float:
        """One after the other."""
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A candidate on a cluster.

    Args:
        candidate: the layout.
        time: of a full step.
        memory: of the fullest pipeline rank.
        fullest: which that is.
        sent: bytes that the busiest rank moves in a step, by kind.
    """

    candidate: PlannedRun
    time: StepTime
    memory: Memory
    fullest: int
    sent: dict[str, float]

    @property
    def tokens_per_s(self) -> float:
        """Of the whole job, at the full batch."""
        data = self.candidate.config.data
        return data.global_batch_size * data.seq_length / self.time.total

    def utilisation(self, cluster: Cluster) -> float:
        """Model FLOPs utilisation: a share of the dense bf16 peak; nothing that is made again counts."""
        flops = self.tokens_per_s * model_flops_per_token(self.candidate)
        return flops / (cluster.gpus * cluster.gpu.bf16_tflops * 1e12)

    def as_dict(self, cluster: Cluster) -> dict[str, Any]:
        """Plain values for a JSON file: seconds, bytes, tokens a second."""
        config = self.candidate.config
        return {
            "parallel": asdict(config.parallel),
            "micro_batch_size": config.data.micro_batch_size,
            "replicas": self.candidate.replicas,
            "micro_batches": self.candidate.micro_batches,
            "step_seconds": self.time.total,
            "tokens_per_s": self.tokens_per_s,
            "utilisation": self.utilisation(cluster),
            "memory_bytes": self.memory.total,
            "memory": asdict(self.memory),
            "time": asdict(self.time),
            "sent_bytes": self.sent,
        }


def pass_time(candidate: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> PassTime:
    """One pass forward or backward, with what backward makes again."""
    assume, peak = cluster.assume, cluster.gpu.bf16_tflops * 1e12
    flops = (backward_flops if backward else forward_flops)(candidate, rank)
    layers_peak = cluster.gpu.fp8_tflops * 1e12 if cluster.fp8 else peak
    return PassTime(
        matmul=(flops.layers / layers_peak + flops.head / peak) / assume.matmul,
        attention=flops.attention / peak / assume.attention,
        traffic=_traffic_bytes(candidate, rank, assume.traffic, backward) / cluster.traffic_bytes_per_s,
        tensor=tensor_traffic(candidate, rank, cluster, backward).seconds,
        context=context_traffic(candidate, rank, cluster, backward).seconds,
    )


def _traffic_bytes(candidate: PlannedRun, rank: int, traffic: float, backward: bool) -> float:
    """Of memory: what a layer saves, several times, and the logits; in backward the head's gradient once a chunk."""
    config = candidate.config
    forward = candidate.stages()[rank] * layer_bytes(candidate) * traffic / 3
    weight = config.model.vocab_size / config.parallel.tensor
    logits = candidate.tokens * weight * LOGIT_BYTES if candidate.is_last(rank) else 0.0
    if not backward:
        return forward + logits
    if candidate.frozen:
        return 0.0
    again = config.parallel.recompute in ("full", "loop")
    layers = forward * (3 if again else 2)
    if not candidate.is_last(rank):
        return layers
    # Each chunk's product is written, read, and added to a sum in fp32 that is read and written.
    chunks = ceil(candidate.tokens / config.loss.head_chunk_tokens)
    gradient = chunks * weight * config.model.hidden_size * 2 * (candidate.number_bytes + FP32)
    return layers + 2 * logits + gradient


def step_time(candidate: PlannedRun, cluster: Cluster, batch: int) -> StepTime:
    """Of a step of ``batch`` samples."""
    config = candidate.config
    layout, loops, micro_batches = config.parallel, config.model.num_loops, candidate.micro_batches_of(batch)
    ranks = range(layout.pipeline)
    ways = {rank: [pass_time(candidate, rank, cluster, way) for way in (False, True)] for rank in ranks}
    busiest = max(ranks, key=lambda rank: sum(way.total for way in ways[rank]))
    forward, backward = ways[busiest]
    work, passes = forward + backward, loops * micro_batches
    # A pass of each other rank, forward while the pipeline fills and backward while it empties; for equal ranks this is
    # (P - 1) / (R M) of the work (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.2, with R for its v).
    bubble = sum(way.total for rank in ranks if rank != busiest for way in ways[rank])
    bubble += 2 * (layout.pipeline - 1) * pipeline_message(candidate, cluster).seconds
    reduction = gradient_traffic(candidate, busiest, cluster).seconds
    hidden = backward.total if layout.overlap_grad_reduce and not candidate.frozen else 0.0
    updated = candidate.trained(busiest) / optimizer_shards(candidate)
    return StepTime(
        **{key: value * passes for key, value in asdict(work).items()},
        bubble=bubble,
        gradients=max(0.0, reduction - hidden),
        weights=weight_traffic(candidate, busiest, cluster).seconds,
        optimizer=updated * ADAM_BYTES / cluster.traffic_bytes_per_s,
    )


def estimate(candidate: PlannedRun, cluster: Cluster) -> Estimate:
    """Time and memory of a candidate at its full batch."""
    fullest, memory = fullest_rank(candidate)
    return Estimate(
        candidate=candidate,
        time=step_time(candidate, cluster, candidate.config.data.global_batch_size),
        memory=memory,
        fullest=fullest,
        sent=sent_bytes(candidate, cluster),
    )


def sent_bytes(candidate: PlannedRun, cluster: Cluster) -> dict[str, float]:
    """Bytes that a rank of the last pipeline stage moves in a step, by kind."""
    config = candidate.config
    rank, passes = config.parallel.pipeline - 1, config.model.num_loops * candidate.micro_batches
    both = (False, True)
    return {
        "tensor": passes * sum(tensor_traffic(candidate, rank, cluster, way).bytes for way in both),
        "context": passes * sum(context_traffic(candidate, rank, cluster, way).bytes for way in both),
        "pipeline": passes * 2 * pipeline_message(candidate, cluster).bytes,
        "gradients": gradient_traffic(candidate, rank, cluster).bytes,
        "weights": weight_traffic(candidate, rank, cluster).bytes,
    }
