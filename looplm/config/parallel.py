"""How the model is laid out over the ranks, and which layouts are legal."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from looplm.cli import require

Recompute = Literal["none", "selective", "full", "loop"]


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over the ranks; the rest of the ranks are data-parallel replicas.

    Args:
        tensor: ranks that share each layer's matrices (TP).
        sequence: split the sequence over the same ranks between the matrices; null means whenever tensor > 1.
        pipeline: ranks that hold consecutive parts of the stack (PP); the loops run as virtual stages.
        first_stage_layers: layers on the first pipeline rank, which also holds the embedding; null deals them evenly.
        last_stage_layers: layers on the last pipeline rank, which also holds the head; null deals them evenly.
        context: ranks that share each sample's positions (CP), for long sequences.
        distributed_optimizer: split the optimizer's state over the replicas instead of repeating it.
        overlap_grad_reduce: sum gradients over the replicas while the backward pass still runs.
        accumulate_fp32: add gradients up, and reduce them, in fp32 even where the weights are bf16.
        recompute: what backward makes again instead of keeping: none; selective (attention's core); full (every
            layer); loop (every loop of the stack: only the hidden states between loops are kept).
    """

    tensor: int = 1
    sequence: bool | None = None
    pipeline: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    context: int = 1
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    accumulate_fp32: bool = True
    recompute: Recompute = "none"

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline", "context"):
            require(getattr(self, key) > 0, f"parallel.{key}", getattr(self, key), "give a number above 0")
        for key in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, key)
            require(layers is None or layers > 0, f"parallel.{key}", layers, "give a number above 0, or null")
            require(layers is None or self.pipeline > 1, f"parallel.{key}", layers, "it needs parallel.pipeline > 1; leave it null")  # fmt: skip
        require(not (self.sequence and self.tensor == 1), "parallel.sequence", True, "it needs parallel.tensor > 1; leave it null")  # fmt: skip

    @property
    def sequence_parallel(self) -> bool:
        """Whether the sequence is split between the matrices."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one replica of the model."""
        return self.tensor * self.pipeline * self.context

    def replicas(self, ranks: int) -> int:
        """Data-parallel replicas on that many ranks.

        Raises:
            UserError: a replica does not divide them.
        """
        fix = f"it must divide the number of ranks, {ranks}"
        require(ranks % self.model_ranks == 0, "parallel.tensor x pipeline x context", self.model_ranks, fix)
        return ranks // self.model_ranks

    def stage_layers(self, num_layers: int) -> list[int]:
        """Layers on each pipeline rank, first to last."""
        given = {0: self.first_stage_layers, self.pipeline - 1: self.last_stage_layers}
        named = {rank: layers for rank, layers in given.items() if layers is not None}
        others = self.pipeline - len(named)
        even = (num_layers - sum(named.values())) // others if others else 0
        return [named.get(rank, even) for rank in range(self.pipeline)]

    def check(self, widths: Mapping[str, int], seq_length: int, num_layers: int, mla: bool, tied: bool) -> None:
        """Refuse a layout that the model cannot have, and name the nearest one that it can.

        Args:
            widths: what tensor parallelism divides, by the key it comes from.
            seq_length: tokens of a sample, which context and sequence parallelism divide.
            num_layers: of the stack, which the pipeline divides.
            mla: whether attention is multi-head latent attention.
            tied: whether embedding and head are one matrix.
        """
        divided = {**widths, "data.seq_length": seq_length} if self.sequence_parallel else widths
        legal = _largest_divisor(self.tensor, divided.values())
        for name, value in divided.items():
            require(value % self.tensor == 0, "parallel.tensor", self.tensor, f"it must divide {name}={value}; the nearest legal value is {legal}")  # fmt: skip
        # Without it the gradients of MLA's down projections are wrong in Megatron-core: see local_layers.ReplicatedLinear.
        require(not mla or self.tensor == 1 or self.sequence_parallel, "parallel.sequence", False, "mla with parallel.tensor > 1 needs it; leave it null or take model.attention=mha")  # fmt: skip
        self._check_stages(num_layers)
        require(self.pipeline == 1 or not tied, "model.tie_embeddings", True, "embedding and head lie on different pipeline ranks; untie them or take parallel.pipeline=1")  # fmt: skip
        self._check_context(seq_length)

    def _check_stages(self, num_layers: int) -> None:
        stages = self.stage_layers(num_layers)
        if self.first_stage_layers is None and self.last_stage_layers is None:
            legal = _largest_divisor(self.pipeline, [num_layers])
            require(num_layers % self.pipeline == 0, "parallel.pipeline", self.pipeline, f"it must divide model.num_layers={num_layers}; the nearest legal value is {legal}, or give parallel.first_stage_layers or last_stage_layers")  # fmt: skip
        fix = f"model.num_layers={num_layers} must leave the same number of layers, at least 1, for each of the other ranks"  # fmt: skip
        key = "first_stage_layers" if self.first_stage_layers is not None else "last_stage_layers"
        require(sum(stages) == num_layers and min(stages) > 0, f"parallel.{key}", getattr(self, key), fix)

    def _check_context(self, seq_length: int) -> None:
        """Each rank holds one early and one late part of the sequence, so that causal work is even."""
        if self.context == 1:
            return
        parts = 2 * self.context * (self.tensor if self.sequence_parallel else 1)
        nearest = max(parts, round(seq_length / parts) * parts)
        require(seq_length % parts == 0, "data.seq_length", seq_length, f"it must be a multiple of 2 x parallel.context x the ranks that split the sequence = {parts}; the nearest legal value is {nearest}")  # fmt: skip


def _largest_divisor(limit: int, values: Collection[int]) -> int:
    """The largest number up to ``limit`` that divides every value."""
    return max(size for size in range(1, limit + 1) if all(value % size == 0 for value in values))
