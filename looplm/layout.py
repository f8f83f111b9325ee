"""How the model is laid out over the ranks, and which layouts are legal."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from looplm.cli import require


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid out over the ranks; the rest of the ranks are data-parallel replicas.

    Args:
        tensor: ranks that share each layer's matrices (TP).
        sequence: split the sequence over the same ranks between the matrices; null means whenever tensor > 1.
        pipeline: ranks that hold consecutive parts of the stack (PP); the loops run as virtual stages.
    """

    tensor: int = 1
    sequence: bool | None = None
    pipeline: int = 1

    def __post_init__(self) -> None:
        for key in ("tensor", "pipeline"):
            require(getattr(self, key) > 0, f"parallel.{key}", getattr(self, key), "give a number above 0")
        require(not (self.sequence and self.tensor == 1), "parallel.sequence", True, "it needs parallel.tensor > 1; leave it null")  # fmt: skip

    @property
    def sequence_parallel(self) -> bool:
        """Whether the sequence is split between the matrices."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    def check(self, widths: Mapping[str, int], seq_length: int, num_layers: int, mla: bool, tied: bool) -> None:
        """Refuse a layout that the model cannot have, and name the nearest one that it can.

        Args:
            widths: what tensor parallelism divides, by the key it comes from.
            seq_length: tokens of a sample, which sequence parallelism divides.
            num_layers: of the stack, which the pipeline divides.
            mla: whether attention is multi-head latent attention.
            tied: whether embedding and head are one matrix.
        """
        divided = {**widths, "data.seq_length": seq_length} if self.sequence_parallel else widths
        legal = _largest_divisor(self.tensor, divided.values())
        for name, value in divided.items():
            require(value % self.tensor == 0, "parallel.tensor", self.tensor, f"it must divide {name}={value}; the nearest legal value is {legal}")  # fmt: skip
        # Without it the gradients of MLA's down projections are wrong in Megatron-core: see layers.ReplicatedLinear.
        require(not mla or self.tensor == 1 or self.sequence_parallel, "parallel.sequence", False, "mla with parallel.tensor > 1 needs it; leave it null or take model.attention=mha")  # fmt: skip
        legal = _largest_divisor(self.pipeline, [num_layers])
        require(num_layers % self.pipeline == 0, "parallel.pipeline", self.pipeline, f"it must divide model.num_layers={num_layers}; the nearest legal value is {legal}")  # fmt: skip
        require(self.pipeline == 1 or not tied, "model.tie_embeddings", True, "embedding and head lie on different pipeline ranks; untie them or take parallel.pipeline=1")  # fmt: skip


def _largest_divisor(limit: int, values: Collection[int]) -> int:
    """The largest number up to ``limit`` that divides every value."""
    return max(size for size in range(1, limit + 1) if all(value % size == 0 for value in values))
