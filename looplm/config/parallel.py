"""Parallel layout: how the model is divided among the ranks, and which layouts are legal."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from looplm.bounds import check_bounds, positive, require

Recompute = Literal["none", "selective", "full", "loop"]


MAX_RANKS = 1 << 16  # no layout with more is looked for


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is divided among the ranks; the remaining factor is data parallelism.

    Args:
        tensor: ranks that share each layer's matrices (TP).
        sequence: split the sequence among the same ranks between the matrices; null means true if tensor > 1.
        pipeline: ranks that hold consecutive layers of the stack (PP); the loops run as virtual stages.
        first_stage_layers: layers on the first pipeline rank, which also holds the embedding; null divides them evenly.
        last_stage_layers: layers on the last pipeline rank, which also holds the head; null divides them evenly.
        context: ranks that share each sample's positions (CP), for long sequences.
        distributed_optimizer: shard the optimizer's state over the replicas instead of repeating it.
        overlap_grad_reduce: reduce gradients over the replicas while the backward pass still runs.
        overlap_param_gather: gather the weights from their shards while the next forward pass runs; it needs
            distributed_optimizer.
        accumulate_fp32: accumulate and reduce gradients in fp32 even if the weights are bf16. Without Apex's fused
            kernels and pipelines, recompute none and selective first sum a weight's gradients over the loops in bf16.
        recompute: activations that backward recomputes: none; selective (the attention core); full (every layer);
            loop (every loop of the stack: only the hidden states between loops are kept).
    """

    tensor: int = positive(1)
    sequence: bool | None = None
    pipeline: int = positive(1)
    first_stage_layers: int | None = positive(None)
    last_stage_layers: int | None = positive(None)
    context: int = positive(1)
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    accumulate_fp32: bool = True
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        check_bounds(self, "parallel")
        for key in ("first_stage_layers", "last_stage_layers"):
            layers, fix = getattr(self, key), "it needs parallel.pipeline > 1; leave it null"
            require(layers is None or self.pipeline > 1, f"parallel.{key}", layers, fix)
        gathers = self.distributed_optimizer or not self.overlap_param_gather
        fix = "without parallel.distributed_optimizer every rank has all weights; leave it false"
        require(gathers, "parallel.overlap_param_gather", True, fix)
        split_by_none = bool(self.sequence) and self.tensor == 1
        require(not split_by_none, "parallel.sequence", True, "it needs parallel.tensor > 1; leave it null")

    @property
    def sequence_parallel(self) -> bool:
        """True if the sequence is split among the tensor-parallel ranks between the matrices."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    def replicas(self, ranks: int) -> int:
        """Return the number of data-parallel replicas on ``ranks`` ranks.

        Raises:
            UserError: the ranks of one replica do not divide ``ranks``.
        """
        fix = f"it must divide the number of ranks, {ranks}"
        require(ranks % self.model_ranks == 0, "parallel.tensor x pipeline x context", self.model_ranks, fix)
        return ranks // self.model_ranks

    def layers_per_rank(self, num_layers: int) -> list[int]:
        """Return the number of layers on each pipeline rank, first to last."""
        given = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        named = {rank: layers for rank, layers in given.items() if layers is not None}
        others = self.pipeline - len(named)
        even = (num_layers - sum(named.values())) // others if others else 0
        return [named.get(rank, even) for rank in range(self.pipeline)]

    def check(self, units: Mapping[str, int], seq_length: int, num_layers: int, replicated: bool, tied: bool) -> None:
        """Raise a :class:`UserError` that names the nearest legal layout if the model cannot have this one.

        Args:
            units: numbers that the tensor-parallel size must divide, by config key.
            seq_length: tokens of a sample, which context and sequence parallelism divide.
            num_layers: layers of the stack, which the pipeline divides.
            replicated: True if every tensor-parallel rank holds some matrices whole, as with mla.
            tied: True if embedding and head are one matrix.
        """
        divided = {**units, "data.seq_length": seq_length} if self.sequence_parallel else units
        legal = _nearest_divisor(self.tensor, divided.values())
        for name, value in divided.items():
            fix = f"it must divide {name}={value}; the nearest legal value is {legal}"
            require(value % self.tensor == 0, "parallel.tensor", self.tensor, fix)
        # Without it the gradients of MLA's down projections are wrong in Megatron-core: local_layers.ReplicatedLinear.
        fix = "mla with parallel.tensor > 1 needs it; leave it null or take model.attention=mha"
        require(not replicated or self.tensor == 1 or self.sequence_parallel, "parallel.sequence", False, fix)
        self._check_pipeline(num_layers)
        fix = "embedding and head are on different pipeline ranks; untie them or take parallel.pipeline=1"
        require(self.pipeline == 1 or not tied, "model.tie_embeddings", True, fix)
        self._check_context(seq_length)

    def _check_pipeline(self, num_layers: int) -> None:
        if self.first_stage_layers is None and self.last_stage_layers is None:
            legal = _nearest_divisor(self.pipeline, [num_layers])
            fix = f"it must divide model.num_layers={num_layers}; the nearest legal value is {legal}"
            fix += ", or give parallel.first_stage_layers or last_stage_layers"
            require(num_layers % self.pipeline == 0, "parallel.pipeline", self.pipeline, fix)
        fix = f"it must not exceed model.num_layers={num_layers}"
        require(self.pipeline <= num_layers, "parallel.pipeline", self.pipeline, fix)
        layers = self.layers_per_rank(num_layers)
        fix = f"model.num_layers={num_layers} must leave the same number of layers, at least 1, for each other rank"
        key = "first_stage_layers" if self.first_stage_layers is not None else "last_stage_layers"
        require(sum(layers) == num_layers and min(layers) > 0, f"parallel.{key}", getattr(self, key), fix)

    def _check_context(self, seq_length: int) -> None:
        # Each rank holds one early and one late part of the sequence, so that causal work is even.
        parts = 2 * self.context * (self.tensor if self.sequence_parallel else 1)
        nearest = max(parts, round(seq_length / parts) * parts)
        fix = "it must be a multiple of 2 x parallel.context x the ranks that split the sequence"
        fix += f" = {parts}; the nearest legal value is {nearest}"
        require(self.context == 1 or seq_length % parts == 0, "data.seq_length", seq_length, fix)


def _nearest_divisor(wanted: int, values: Collection[int]) -> int:
    """Return the number of ranks nearest to ``wanted`` that divides every value; the smaller one of two."""
    common = math.gcd(*values)
    legal = (size for size in range(1, min(common, MAX_RANKS) + 1) if common % size == 0)
    return min(legal, key=lambda size: abs(size - wanted))
