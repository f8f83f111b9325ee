"""Bytes that one rank of a layout holds."""

from dataclasses import dataclass

from looplm.accounting import optimizer_bytes
from tools.planning.activations import FP32, in_flight, peak_activation_bytes
from tools.planning.planned_run import Amounts, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Memory(Amounts):
    """Bytes on one rank."""

    weights: float  # in the precision of training
    gradients: float  # the buffers in which they are summed
    optimizer: float  # Adam's two moments, plus fp32 main weights if training is in bf16
    activations: float  # what autograd keeps for backward, at its peak
    working: float  # short-lived tensors: a chunk of logits, the head's gradient, gradients on their way back


def rank_memory(run: PlannedRun, rank: int) -> Memory:
    """Return the memory of one pipeline rank. All its tensor-, context- and data-parallel ranks use the same amount."""
    trained = run.trained(rank)
    return Memory(
        weights=sum(run.parameters(rank).values()) * run.number_bytes,
        gradients=trained * gradient_bytes(run),
        optimizer=trained * optimizer_bytes(run.config.optim.precision) / optimizer_shards(run),
        activations=peak_activation_bytes(run, rank),
        working=_working_bytes(run, rank),
    )


def fullest_rank_memory(run: PlannedRun) -> Memory:
    """Return the memory of the pipeline rank that uses most."""
    ranks = range(run.config.parallel.pipeline)
    return max((rank_memory(run, rank) for rank in ranks), key=lambda memory: memory.total)


def gradient_bytes(run: PlannedRun) -> int:
    """Return the bytes of one parameter in the buffer that data parallelism reduces."""
    return FP32 if run.config.parallel.accumulate_fp32 else run.number_bytes


def optimizer_shards(run: PlannedRun) -> int:
    """Return the number of ranks that share the optimizer's state.

    These are the replicas and the context-parallel ranks, which hold the same weights (ZeRO stage 1: Rajbhandari et al.
    2020, arXiv 1910.02054).
    """
    layout = run.config.parallel
    return run.replicas * layout.context if layout.distributed_optimizer else 1


def _working_bytes(run: PlannedRun, rank: int) -> float:
    """Return the bytes that autograd does not keep but that are in use while the activations are at their peak."""
    config, e = run.config, run.number_bytes
    layout, loss, model = config.parallel, config.loss, config.model
    hidden = run.shard_tokens * model.hidden_size * e
    # A layer's gradients on their way back: three of the feed-forward layer's inner width, its input's and output's.
    layer = 3 * run.tokens * model.ffn_hidden_size * e / layout.tensor + 2 * hidden
    working = 0.0 if run.frozen else layer
    if run.is_last(rank):
        rows = min(loss.head_chunk_tokens, run.tokens)
        working += rows * model.vocab_size / layout.tensor * (FP32 + 2 * e)  # product, fp32 logits, their gradient
        if not run.frozen:
            # Summed over the chunks in fp32, cast, and added to the other loops'.
            working += model.vocab_size / layout.tensor * model.hidden_size * (FP32 + (2 * e if e < FP32 else FP32))
    if run.frozen:
        return working
    if layout.pipeline > 1:
        working += in_flight(run, rank) * hidden  # sent, and held by the schedule until their backward
    else:
        working += model.num_loops * hidden  # the losses' gradients of every loop's hidden state wait for its backward
        if layout.recompute in ("none", "selective") and model.num_loops > 1:
            # One graph: a weight's gradients of all loops are summed before they are added to the buffer.
            working += run.parameters(rank)["layers"] * e
    return working
