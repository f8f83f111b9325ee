"""FLOPs of one pass on one rank: one micro-batch through one loop of the rank's layers, with loops and recomputation."""

from dataclasses import dataclass, replace
from functools import cache

from looplm.accounting import forward_flops_per_token, parameter_counts, training_flops_per_token
from looplm.config import GateConfig, ModelConfig
from tools.planning.planned_run import PlannedRun


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Of one tensor-parallel rank.

    Args:
        layers: matrix products of the layers.
        attention: scores and weighted sums, as many as the kernel computes.
        head: the logits; and the gate.
    """

    layers: float
    attention: float
    head: float

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            layers=self.layers + other.layers, attention=self.attention + other.attention, head=self.head + other.head
        )

    def times(self, factor: float) -> "Flops":
        """All parts, ``factor`` times."""
        return Flops(layers=self.layers * factor, attention=self.attention * factor, head=self.head * factor)

    @property
    def total(self) -> float:
        """Of all parts."""
        return self.layers + self.attention + self.head


def forward_flops(candidate: PlannedRun, rank: int) -> Flops:
    """Of one pass, forward: :func:`looplm.accounting.forward_flops_per_token`, split by part and over the ranks."""
    config = candidate.config
    layer, scores, head = _per_token(config.model, config.gate, config.data.seq_length)
    share = candidate.tokens / config.parallel.tensor
    layers = candidate.stages()[rank] * share
    return Flops(
        layers=layers * layer,
        attention=layers * scores * _computed_scores(candidate),
        head=head * share if candidate.is_last(rank) else 0.0,
    )


@cache
def _per_token(model: ModelConfig, gate: GateConfig, seq_length: int) -> tuple[float, float, float]:
    """A token's share of a layer's matrix products, of its causal scores, and of head and gate, in one loop."""

    def of(layers: int, length: int) -> float:
        return forward_flops_per_token(replace(model, num_layers=layers), gate, length, 1)

    layer = of(2, 0) - of(1, 0)
    return layer, of(1, seq_length) - of(1, 0), of(1, 0) - layer


def _computed_scores(candidate: PlannedRun) -> float:
    """Scores that the kernel computes, in units of the causal half: an additive document mask hides from it that the rest
    is masked. A context-parallel rank's two runs end at their last position, and leave most of the rest out. A kernel that
    is told where documents begin computes less still: how much, the data decide."""
    config = candidate.config
    if not config.data.document_masking or config.engine.packs_documents(config.parallel):
        return 1.0
    context = config.parallel.context
    return 2.0 if context == 1 else 1 + 1 / (2 * context)


def backward_flops(candidate: PlannedRun, rank: int) -> Flops:
    """Of one pass, backward: twice the forward, and what is made again.

    ``full`` and ``loop`` make the layers again, ``selective`` attention's core; loss.head_recompute the logits.
    """
    forward = forward_flops(candidate, rank)
    if candidate.frozen:
        return Flops(layers=0.0, attention=0.0, head=2 * _gate_flops(candidate) if candidate.is_last(rank) else 0.0)
    layout = candidate.config.parallel
    head = replace(forward, layers=0.0, attention=0.0)
    again = forward.times(0)
    if layout.recompute in ("full", "loop"):
        again = replace(forward, head=0.0)
    elif layout.recompute == "selective":
        again = Flops(layers=0.0, attention=forward.attention, head=0.0)
    if candidate.config.loss.head_recompute:
        again = again + head
    return forward.times(2) + again


def _gate_flops(candidate: PlannedRun) -> float:
    gate = parameter_counts(candidate.config.model, candidate.config.gate)["gate"]
    return 2.0 * gate * candidate.tokens / candidate.config.parallel.tensor


def model_flops_per_token(candidate: PlannedRun) -> float:
    """What the model asks for, whatever is made again: the numerator of model FLOPs utilisation."""
    config = candidate.config
    return training_flops_per_token(
        config.model, config.gate, config.data.seq_length, config.model.num_loops, frozen_trunk=candidate.frozen
    )
