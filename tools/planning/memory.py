"""What one rank of a layout holds, in bytes."""

from dataclasses import dataclass, fields

from looplm.accounting import optimizer_bytes
from tools.planning.activations import FP32, in_flight, peak_activation_bytes
from tools.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank, in bytes.

    Args:
        weights: in the precision of training.
        gradients: the buffers they add up in.
        optimizer: Adam's two moments, and fp32 main weights where training is in bf16.
        activations: what autograd keeps for backward, at its peak.
        working: what lives for a moment: a chunk of logits, the head's gradient, gradients on their way.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float

    @property
    def total(self) -> float:
        """All of it at the same time."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(candidate: PlannedRun, rank: int) -> Memory:
    """Of a pipeline rank; tensor-parallel ranks, context-parallel ranks and replicas are alike."""
    e, trained = candidate.number_bytes, candidate.trained(rank)
    return Memory(
        weights=sum(candidate.parameters(rank).values()) * e,
        gradients=trained * gradient_bytes(candidate),
        optimizer=trained * optimizer_bytes(candidate.config.optim.precision) / optimizer_shards(candidate),
        activations=peak_activation_bytes(candidate, rank),
        working=_working(candidate, rank),
    )


def fullest_rank(candidate: PlannedRun) -> tuple[int, Memory]:
    """The pipeline rank that holds most, and what."""
    ranks = range(candidate.config.parallel.pipeline)
    memories = {rank: rank_memory(candidate, rank) for rank in ranks}
    fullest = max(ranks, key=lambda rank: memories[rank].total)
    return fullest, memories[fullest]


def gradient_bytes(candidate: PlannedRun) -> int:
    """Of one parameter, in the buffer that data parallelism reduces."""
    return FP32 if candidate.config.parallel.accumulate_fp32 else candidate.number_bytes


def optimizer_shards(candidate: PlannedRun) -> int:
    """Ranks that share the optimizer's state: the replicas and, since they hold the same weights, context parallelism's
    (ZeRO's first stage: Rajbhandari et al. 2020, arXiv 1910.02054)."""
    layout = candidate.config.parallel
    return candidate.replicas * layout.context if layout.distributed_optimizer else 1


def _working(candidate: PlannedRun, rank: int) -> float:
    """What autograd does not keep, and what is there all the same when the activations are at their peak."""
    config, e = candidate.config, candidate.number_bytes
    layout, loss, model = config.parallel, config.loss, config.model
    hidden = candidate.shard_tokens * model.hidden_size * e
    # A layer's gradients on their way back: of the feed-forward layer's inner numbers, and of its input and output.
    layer = 3 * candidate.tokens * model.ffn_hidden_size * e / layout.tensor + 2 * hidden
    working = 0.0 if candidate.frozen else layer
    if candidate.is_last(rank):
        rows = min(loss.head_chunk_tokens, candidate.tokens)
        working += rows * model.vocab_size / layout.tensor * (FP32 + 2 * e)  # product, fp32 logits, their gradient
        if not candidate.frozen:
            # Summed over the chunks in fp32, cast, and added to the other loops'.
            working += model.vocab_size / layout.tensor * model.hidden_size * (FP32 + (2 * e if e < FP32 else FP32))
    if candidate.frozen:
        return working
    if layout.pipeline > 1:
        working += in_flight(candidate, rank) * hidden  # sent, and held by the schedule until their backward
    else:
        working += model.num_loops * hidden  # the losses' gradients of every loop's hidden state wait for its backward
        if layout.recompute in ("none", "selective") and model.num_loops > 1:
            # One graph: a weight's gradients of all loops are added up before they go into the buffer.
            working += candidate.parameters(rank)["layers"] * e
    return working
