"""Bytes that one rank of a layout holds."""

from dataclasses import dataclass

from looplm.accounting import optimizer_bytes
from tools.planning.activations import FP32, forward_activation_bytes, in_flight, peak_activation_bytes
from tools.planning.planned_run import Amounts, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Memory(Amounts):
    """Bytes on one rank."""

    weights: float  # in the precision of training
    gradients: float  # the buffers in which they are summed
    optimizer: float  # Adam's two moments, plus fp32 main weights if training is in bf16
    activations: float  # what autograd keeps for backward, at its peak
    working: float  # short-lived tensors: a chunk of logits and the head's gradient, or gradients on their way back


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
    """Return the bytes that autograd does not keep, beside the activations at their peak.

    Memory is fullest when the forward pass ends with the head, or when backward runs through the layers. With
    recomputation the activations are at their peak in the latter only.
    """
    head = _head_bytes(run) if run.is_last(rank) else 0.0
    config, e = run.config, run.number_bytes
    layout, model = config.parallel, config.model
    hidden = run.shard_tokens * model.hidden_size * e
    if run.frozen:  # no graph keeps the loops' hidden states, but all of them wait for the head
        return head + (run.num_loops * hidden if layout.pipeline == 1 else 0.0)
    # A layer's gradients on their way back: three of the feed-forward layer's inner width, its input's and output's.
    feed_forward = 3 * run.tokens * model.ffn_hidden_size * e / layout.tensor
    # Attention's come later, when what the feed-forward layer had kept, of about that size, and its norms are free.
    attention = _attention_backward_bytes(run) - feed_forward - 3 * hidden
    backward = max(feed_forward + 2 * hidden, attention)
    if layout.sequence_parallel:
        # Whole in front of and behind the matrices: a product's input, its gradient, and the gradient of its output.
        backward += 3 * run.tokens * model.hidden_size * e
    if layout.pipeline == 1 and layout.recompute in ("full", "loop"):
        # The gradients from the head wait for their loop's backward. Otherwise they are at the peak among what is kept.
        backward += run.loops_with_head_gradients * hidden
    elif layout.pipeline == 1 and run.num_loops > 1:
        # One graph: a weight's gradients of all loops are summed before they are added to the buffer.
        backward += sum(run.parameters(rank).get(part, 0.0) for part in ("layers", "coda")) * e
    at_peak = peak_activation_bytes(run, rank)
    working = max(forward_activation_bytes(run, rank) + head, at_peak + backward) - at_peak
    # The schedule frees what was sent; in rehearsals the last rank keeps each pass's hidden state all the same.
    return working + (in_flight(run, rank) * hidden if layout.pipeline > 1 and run.is_last(rank) else 0.0)


def _attention_backward_bytes(run: PlannedRun) -> float:
    """Return the bytes in use while the core's backward runs over keys and values that were gathered from other ranks.

    Those are the gradients of the whole sequence's keys and values; of the longest span, which sees nearly all of them,
    the gradients at the width of the kernels, and its values if they are padded to it; and four times the queries.
    """
    layout, widths, e = run.config.parallel, run.config.model.attention_widths, run.number_bytes
    if layout.context == 1:
        return 0.0
    local = run.tokens / layout.tensor
    whole, width = local * layout.context * widths.key_heads, max(widths.query_key, widths.value)
    gathered = whole * (widths.query_key + widths.value) * e
    of_span = whole * width * (3 if widths.value < width else 2) * e
    return gathered + of_span + 4 * local * run.config.model.num_attention_heads * width * e


def _head_bytes(run: PlannedRun) -> float:
    """Return the bytes in use while the head computes a chunk: product, fp32 copy, log-probabilities; and gradients."""
    layout, e = run.config.parallel, run.number_bytes
    logits = run.head_chunk * run.head_rows * (2 * FP32 + (e if e < FP32 else 0))
    if run.frozen:
        return logits
    # In bf16 a chunk's product exists before it is added to the buffer, whose own dtype may require a sum in fp32.
    weight = run.head_rows * run.config.model.hidden_size
    product = weight * (e if e < FP32 else 0)
    total = weight * FP32 if gradient_bytes(run) < FP32 else 0.0
    # Under sequence parallelism the hidden state is gathered, and its gradient is whole before it is scattered.
    gathered = 2 * run.tokens * run.config.model.hidden_size * e if layout.sequence_parallel else 0.0
    return logits + product + total + gathered
