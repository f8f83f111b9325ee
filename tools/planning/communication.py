"""Bytes that one rank moves, by kind of parallelism, and the time they take.

A ring's all-gather or reduce-scatter of V bytes over n ranks moves V (n - 1) / n through each; an all-reduce is both.
The kinds, and what they overlap with:

* **tensor**: the hidden state is gathered before and scattered after attention and feed-forward layer, in forward and
  again in backward. Our layers wait for these; only the gather for the weights' gradients overlaps a matrix product.
* **context**: keys and values are gathered in every layer, their gradients scattered. Nothing overlaps.
* **pipeline**: one hidden state to the neighbor for each pass and direction. It overlaps the next pass, except while
  the pipeline fills and empties.
* **data**: gradients once a step. With ``overlap_grad_reduce`` they overlap the backward pass that completes them: that
  of the last micro-batch through the first loop, since every loop adds to the same gradients. With the distributed
  optimizer the weights are gathered afterwards, without overlap.
"""

from dataclasses import dataclass

from tools.planning.hardware import LATENCY_S, Cluster
from tools.planning.memory import gradient_bytes
from tools.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one rank moves, and the seconds they take on the links they cross."""

    bytes: float = 0.0
    seconds: float = 0.0


def _ring(cluster: Cluster, ranks: int, stride: int, size: float, operations: float) -> Traffic:
    """Return the traffic of ``operations`` all-gathers or reduce-scatters of ``size`` bytes in total."""
    if ranks == 1 or operations == 0:
        return Traffic()
    moved = size * (ranks - 1) / ranks
    return Traffic(bytes=moved, seconds=moved / cluster.link_bytes_per_s(ranks, stride) + operations * LATENCY_S)


def tensor_traffic(run: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> Traffic:
    """Return the traffic of one forward pass, or of one backward pass with the forward that it recomputes."""
    layout, model = run.config.parallel, run.config.model
    if layout.tensor == 1 or (backward and run.frozen):
        return Traffic()
    attention = model.attention_widths.projected
    calls = 4 if model.attention_gate == "none" else 5  # the gate's linear layer gathers its input by itself
    # Gathered and scattered once each around both sublayers; without sequence parallelism all-reduced, the same bytes.
    layer = run.tokens * (attention + 3 * model.hidden_size) * run.number_bytes
    passed = run.layers_in_a_pass(rank, backward)
    layers, operations = passed * layer, passed * calls
    head = run.tokens * model.hidden_size * run.number_bytes if run.is_last(rank) else 0.0
    traffic = _ring(cluster, layout.tensor, 1, layers + head, operations)
    if not backward:
        return traffic
    hidden_again = _ring(cluster, layout.tensor, 1, passed * _gathered_again(run), operations)
    again = layout.recompute in ("full", "loop")
    recomputed = _ring(cluster, layout.tensor, 1, layers, operations) if again else Traffic()
    moved = traffic.bytes + recomputed.bytes + hidden_again.bytes
    return Traffic(bytes=moved, seconds=traffic.seconds + recomputed.seconds)


def _gathered_again(run: PlannedRun) -> float:
    """Return the bytes of a layer's inputs that backward gathers again, for the gradients of the first projections.

    Under sequence parallelism forward keeps a rank's own positions only. These messages overlap a matrix product.
    """
    model, widths = run.config.model, run.config.model.attention_widths
    if not run.config.parallel.sequence_parallel:
        return 0.0
    attention = widths.projected - (widths.rotary if widths.latents else 0)  # no product follows the rotary key
    return run.tokens * (attention + model.hidden_size) * run.number_bytes


def context_traffic(run: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> Traffic:
    """Return the traffic of one pass: keys and values of all positions, as heads."""
    layout, model = run.config.parallel, run.config.model
    if layout.context == 1 or (backward and run.frozen):
        return Traffic()
    widths = model.attention_widths
    width = widths.key_heads * (widths.query_key + widths.value)
    layers = run.layers_in_a_pass(rank, backward)
    size = layers * run.tokens * layout.context * width / layout.tensor * run.number_bytes
    times = 2 if backward and layout.recompute != "none" else 1
    return _ring(cluster, layout.context, layout.tensor, size * times, layers * times)


def pipeline_message(run: PlannedRun, cluster: Cluster) -> Traffic:
    """Return the traffic of one hidden state to a neighbor."""
    layout = run.config.parallel
    if layout.pipeline == 1:
        return Traffic()
    size = run.shard_tokens * run.config.model.hidden_size * run.number_bytes
    stride = layout.tensor * layout.context * run.replicas
    if stride * layout.pipeline > cluster.node:
        stride = cluster.node  # the slowest hop: from node to node, through one adapter
    return Traffic(bytes=size, seconds=size / cluster.link_bytes_per_s(layout.pipeline, stride) + LATENCY_S)


def messages_sent(run: PlannedRun, rank: int) -> int:
    """Return the hidden states and gradients that a pipeline rank sends in a step.

    Each pass has one of either, except at the ends of the line of all loops: nothing follows the last rank's last loop,
    and nothing comes before the first rank's first. With a frozen trunk nothing is sent back.
    """
    layout, passes = run.config.parallel, run.num_loops * run.micro_batches
    if layout.pipeline == 1:
        return 0
    forward = passes - (run.micro_batches if run.is_last(rank) else 0)
    backward = passes - (run.micro_batches if rank == 0 else 0)
    return forward if run.frozen else forward + backward


def gradient_traffic(run: PlannedRun, rank: int, cluster: Cluster) -> Traffic:
    """Return the traffic of one step's gradients, reduced over the ranks that hold the same weights.

    The distributed optimizer reduces them to shards, otherwise every rank receives all.
    """
    layout = run.config.parallel
    operations = 1 if layout.distributed_optimizer else 2
    size = operations * run.trained(rank) * gradient_bytes(run)
    return _ring(cluster, run.replicas * layout.context, layout.tensor, size, operations)


def weight_traffic(run: PlannedRun, rank: int, cluster: Cluster) -> Traffic:
    """Return the traffic of one step's weights, which the distributed optimizer gathers from the shards."""
    layout = run.config.parallel
    if not layout.distributed_optimizer:
        return Traffic()
    size = run.trained(rank) * run.number_bytes
    return _ring(cluster, run.replicas * layout.context, layout.tensor, size, 1)
