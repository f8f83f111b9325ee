"""A layout of a recipe: the configuration as it would run, and how many replicas it has."""

from dataclasses import dataclass

from looplm.accounting import parameter_counts, weight_bytes
from looplm.config import RunConfig


@dataclass(frozen=True)
class PlannedRun:
    """A recipe in one layout.

    Args:
        config: with the layout's ``parallel`` and ``data.micro_batch_size``.
        replicas: data-parallel ranks (DP).
        fused_norms: RMSNorm is one kernel, as on a GPU; on a CPU torch composes it of several, which keep more.
    """

    config: RunConfig
    replicas: int
    fused_norms: bool = True

    @property
    def micro_batches(self) -> int:
        """Of a full step, on each replica (M)."""
        return self.micro_batches_of(self.config.data.global_batch_size)

    def micro_batches_of(self, batch: int) -> int:
        """Of a step of ``batch`` samples, on each replica."""
        return batch // (self.replicas * self.config.data.micro_batch_size)

    @property
    def frozen(self) -> bool:
        """Whether only the gate learns (stage 2)."""
        return self.config.loss.frozen_trunk

    @property
    def number_bytes(self) -> int:
        """Of one weight or activation."""
        return weight_bytes(self.config.optim.precision)

    @property
    def tokens(self) -> float:
        """Of a micro-batch on one rank: its share of the positions, times the sequences."""
        data = self.config.data
        return data.micro_batch_size * data.seq_length / self.config.parallel.context

    @property
    def shard_tokens(self) -> float:
        """The same between the matrices, where sequence parallelism splits the positions again."""
        layout = self.config.parallel
        return self.tokens / (layout.tensor if layout.sequence_parallel else 1)

    def stages(self) -> list[int]:
        """Layers of each pipeline rank."""
        return self.config.parallel.stage_layers(self.config.model.num_layers)

    def is_last(self, rank: int) -> bool:
        """Whether the pipeline rank holds the head and the gate."""
        return rank == self.config.parallel.pipeline - 1

    def parameters(self, rank: int) -> dict[str, float]:
        """Parameters that a tensor-parallel rank of pipeline rank ``rank`` holds, by part.

        Norms, the gate and MLA's down projections are whole on every tensor-parallel rank; all else is split.
        """
        model, tensor = self.config.model, self.config.parallel.tensor
        counts = parameter_counts(model, self.config.gate)
        layer = counts["layers"] / model.num_layers
        d = model.hidden_size
        whole = (4 if model.sandwich_norm else 2) * d
        if model.attention == "mla":
            whole += (d + 1) * (model.kv_lora_rank + (model.q_lora_rank or 0)) + d * model.qk_rope_head_dim
        parts = {"layers": self.stages()[rank] * (whole + (layer - whole) / tensor)}
        if rank == 0:
            parts["embedding"] = counts["embedding"] / tensor
        if self.is_last(rank):
            parts |= {"head": counts["head"] / tensor, "gate": counts["gate"], "loop_end_norm": counts["loop_end_norm"]}
        return parts

    def trained(self, rank: int) -> float:
        """Parameters of the rank that have gradients."""
        parts = self.parameters(rank)
        return parts.get("gate", 0.0) if self.frozen else sum(parts.values())
