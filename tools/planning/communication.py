"""Bytes that one rank moves, by kind, and the time they take.

A ring's all-gather or reduce-scatter of V bytes over n ranks moves V (n - 1) / n through each; an all-reduce is both.
Kinds and where they hide:

* **tensor**: the hidden state is gathered before and scattered after attention and feed-forward layer, forward and again
  backward. The engine's own layers wait for these; only the gather for the weights' gradients runs beside a product.
* **context**: keys and values are gathered in every layer, their gradients scattered. Waited for.
* **pipeline**: one hidden state to the neighbour for each pass and direction. Hidden behind the next pass, but for the
  filling and the emptying of the pipeline.
* **data**: gradients once a step. With ``overlap_grad_reduce`` they hide behind the backward pass that completes them: of
  the last micro-batch, and of the first loop alone, since every loop adds to the same gradients. With the distributed
  optimizer the weights are gathered afterwards, in the open.
"""

from dataclasses import dataclass

from tools.planning.hardware import LATENCY_S, Cluster
from tools.planning.memory import gradient_bytes
from tools.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes one rank moves, and the seconds they take on the links that they cross."""

    bytes: float = 0.0
    seconds: float = 0.0

    def times(self, factor: float) -> "Traffic":
        """``factor`` times as much."""
        return Traffic(bytes=self.bytes * factor, seconds=self.seconds * factor)

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(bytes=self.bytes + other.bytes, seconds=self.seconds + other.seconds)


def _ring(cluster: Cluster, ranks: int, stride: int, size: float, operations: float) -> Traffic:
    """``operations`` all-gathers or reduce-scatters of ``size`` bytes together."""
    if ranks == 1 or operations == 0:
        return Traffic()
    moved = size * (ranks - 1) / ranks
    return Traffic(bytes=moved, seconds=moved / cluster.link_bytes_per_s(ranks, stride) + operations * LATENCY_S)


def tensor_traffic(candidate: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> Traffic:
    """Of one pass, forward or backward (which includes forward again where it is made again)."""
    config = candidate.config
    layout, model = config.parallel, config.model
    if layout.tensor == 1:
        return Traffic()
    attention = model.hidden_size
    if model.attention == "mla":  # what the up-projections read, and the rotary key
        attention = (model.q_lora_rank or model.hidden_size) + model.kv_lora_rank + model.qk_rope_head_dim
    # Gathered and scattered once each around both sublayers; without sequence parallelism all-reduced, the same bytes.
    layer = candidate.tokens * (attention + 3 * model.hidden_size) * candidate.number_bytes
    layers, operations = candidate.stages()[rank] * layer, candidate.stages()[rank] * 4
    head = candidate.tokens * model.hidden_size * candidate.number_bytes if candidate.is_last(rank) else 0.0
    forward = _ring(cluster, layout.tensor, 1, layers + head, operations)
    if not backward:
        return forward
    if candidate.frozen:
        return Traffic()
    again = layout.recompute in ("full", "loop")
    return forward + (_ring(cluster, layout.tensor, 1, layers, operations) if again else Traffic())


def context_traffic(candidate: PlannedRun, rank: int, cluster: Cluster, backward: bool) -> Traffic:
    """Of one pass: keys and values of all positions, as heads."""
    layout, model = candidate.config.parallel, candidate.config.model
    if layout.context == 1 or (backward and candidate.frozen):
        return Traffic()
    if model.attention == "mla":
        width = model.num_attention_heads * (model.attention_head_dim + model.v_head_dim)
    else:
        width = 2 * model.query_groups * model.attention_head_dim
    layers = candidate.stages()[rank]
    size = layers * candidate.tokens * layout.context * width / layout.tensor * candidate.number_bytes
    times = 2 if backward and layout.recompute != "none" else 1
    return _ring(cluster, layout.context, layout.tensor, size, layers).times(times)


def pipeline_message(candidate: PlannedRun, cluster: Cluster) -> Traffic:
    """One hidden state to a neighbour."""
    layout = candidate.config.parallel
    if layout.pipeline == 1:
        return Traffic()
    size = candidate.shard_tokens * candidate.config.model.hidden_size * candidate.number_bytes
    stride = layout.tensor * layout.context * candidate.replicas
    if stride * layout.pipeline > cluster.node:
        stride = cluster.node  # the slowest hop: from node to node, through one adapter
    return Traffic(bytes=size, seconds=size / cluster.link_bytes_per_s(layout.pipeline, stride) + LATENCY_S)


def gradient_traffic(candidate: PlannedRun, rank: int, cluster: Cluster) -> Traffic:
    """Of one step: gradients reduced over the ranks that hold the same weights, to shares or to all."""
    layout = candidate.config.parallel
    ranks = candidate.replicas * layout.context
    size = candidate.trained(rank) * gradient_bytes(candidate)
    way = 1 if layout.distributed_optimizer else 2
    return _ring(cluster, ranks, layout.tensor, way * size, way)


def weight_traffic(candidate: PlannedRun, rank: int, cluster: Cluster) -> Traffic:
    """Of one step: with the distributed optimizer, weights gathered from the shares."""
    layout = candidate.config.parallel
    if not layout.distributed_optimizer:
        return Traffic()
    size = candidate.trained(rank) * candidate.number_bytes
    return _ring(cluster, candidate.replicas * layout.context, layout.tensor, size, 1)
