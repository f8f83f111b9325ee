"""A recipe in one parallel layout: the configuration as it would run, and the number of its replicas."""

from dataclasses import dataclass
from math import ceil
from typing import TypeVar

from looplm.accounting import parameter_counts, weight_bytes
from looplm.config import RunConfig
from looplm.model.head import chunk_tokens
from looplm.parameters import layer_parameters

AmountsType = TypeVar("AmountsType", bound="Amounts")


class Amounts:
    """Base of dataclasses whose fields are amounts of one unit: they can be added, scaled and summed."""

    @property
    def total(self) -> float:
        """Sum of all fields."""
        return sum(vars(self).values())

    def __add__(self: AmountsType, other: AmountsType) -> AmountsType:
        return type(self)(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    def times(self: AmountsType, factor: float) -> AmountsType:
        """Return every field multiplied by ``factor``."""
        return type(self)(**{key: value * factor for key, value in vars(self).items()})


@dataclass(frozen=True)
class PlannedRun:
    """A recipe in one layout."""

    config: RunConfig  # with the layout's ``parallel`` and ``data.micro_batch_size``
    replicas: int  # data-parallel ranks (DP)
    padded_heads: bool = True  # attention keeps values as wide as queries, as on a GPU; on a CPU as wide as they are
    loops: int | None = None  # of a step that runs fewer (loss.loop_onset, loss.sampled_loops); None for the model's

    @property
    def num_loops(self) -> int:
        """Loops of a step (R)."""
        return self.loops or self.config.model.num_loops

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a full step on each replica (M)."""
        return self.micro_batches_of(self.config.data.global_batch_size)

    def micro_batches_of(self, batch: int) -> int:
        """Return the micro-batches on each replica in a step of ``batch`` samples."""
        return batch // (self.replicas * self.config.data.micro_batch_size)

    @property
    def frozen(self) -> bool:
        """True if only the gate is trained (stage 2)."""
        return self.config.loss.frozen_trunk

    @property
    def loops_with_head_gradients(self) -> int:
        """Loops of a step whose cross-entropies have gradients."""
        if self.frozen:
            return 0
        return 1 if self.config.loss.weights == "last" else self.num_loops

    @property
    def number_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return weight_bytes(self.config.optim.precision)

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank: its share of the positions, times the sequences."""
        data = self.config.data
        return data.micro_batch_size * data.seq_length / self.config.parallel.context

    @property
    def shard_tokens(self) -> float:
        """Tokens of a micro-batch between the matrices, where sequence parallelism splits the positions again."""
        layout = self.config.parallel
        return self.tokens / (layout.tensor if layout.sequence_parallel else 1)

    @property
    def head_rows(self) -> float:
        """Rows of the head's matrix on one rank."""
        return self.config.model.vocab_size / self.config.parallel.tensor

    @property
    def head_chunk(self) -> int:
        """Tokens whose logits a GPU computes at once."""
        return chunk_tokens(ceil(self.tokens), ceil(self.head_rows), "cuda")

    def layers_per_rank(self) -> list[int]:
        """Return the number of layers on each pipeline rank."""
        return self.config.parallel.layers_per_rank(self.config.model.num_layers)

    def layers_in_a_pass(self, rank: int, backward: bool = False) -> float:
        """Return the layers that pipeline rank ``rank`` runs in a pass, forward or backward, on average over the loops.

        A coda's backward follows the head's.
        """
        model, layers = self.config.model, float(self.layers_per_rank()[rank])
        layers += model.prelude_layers / self.num_loops if rank == 0 else 0
        read = self.loops_with_head_gradients / self.num_loops if backward else 1
        return layers + (model.coda_layers * read if self.is_last(rank) else 0)

    def is_last(self, rank: int) -> bool:
        """Return True if pipeline rank ``rank`` holds the head and the gate."""
        return rank == self.config.parallel.pipeline - 1

    def parameters(self, rank: int) -> dict[str, float]:
        """Return the number of parameters, by part, on one tensor-parallel rank of pipeline rank ``rank``.

        Norms, the gate and MLA's down projections are replicated on every tensor-parallel rank; all else is split.
        """
        tensor, counts = self.config.parallel.tensor, parameter_counts(self.config.model, self.config.gate)
        model = self.config.model
        rows = layer_parameters(model)
        layer = sum(row.size / (1 if row.tensor_split is None else tensor) for row in rows)
        parts = {"layers": self.layers_per_rank()[rank] * layer}
        if rank == 0:
            parts |= {"embedding": counts["embedding"] / tensor, "prelude": model.prelude_layers * layer}
            parts |= {part: counts[part] for part in ("injection", "step_embedding")}
        if self.is_last(rank):
            parts |= {"head": counts["head"] / tensor, "gate": counts["gate"], "loop_end_norm": counts["loop_end_norm"]}
            parts["coda"] = model.coda_layers * layer + (model.hidden_size if model.coda_layers else 0)
        return parts

    def trained(self, rank: int) -> float:
        """Return the number of parameters on the rank that have gradients."""
        parts = self.parameters(rank)
        return parts.get("gate", 0.0) if self.frozen else sum(parts.values())
