"""FLOPs of one pass on one rank: one micro-batch through one loop of the rank's layers, with recomputation."""

from dataclasses import dataclass, replace
from functools import cache

from looplm.accounting import forward_flops_per_token, parameter_counts, training_flops_per_token
from looplm.config import GateConfig, ModelConfig
from tools.planning.planned_run import Amounts, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Flops(Amounts):
    """FLOPs of one tensor-parallel rank."""

    layers: float = 0.0  # matrix products
    attention: float = 0.0  # scores and weighted sums, including masked ones that the kernel computes
    head: float = 0.0  # the logits and the gate


def forward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one forward pass: those of :mod:`looplm.accounting`, split by part and over the ranks."""
    config = run.config
    layer, scores, head = _flops_per_token(config.model, config.gate, config.data.seq_length)
    share = run.tokens / config.parallel.tensor
    layers = run.layers_per_rank()[rank] * share
    return Flops(
        layers=layers * layer,
        attention=layers * scores * _computed_scores(run),
        head=head * share if run.is_last(rank) else 0.0,
    )


@cache
def _flops_per_token(model: ModelConfig, gate: GateConfig, seq_length: int) -> tuple[float, float, float]:
    """Return a token's FLOPs in one loop: one layer's matrix products, its causal scores, and head with gate."""

    def forward(layers: int, length: int) -> float:
        return forward_flops_per_token(replace(model, num_layers=layers), gate, length, 1)

    layer = forward(2, 0) - forward(1, 0)
    return layer, forward(1, seq_length) - forward(1, 0), forward(1, 0) - layer


def _computed_scores(run: PlannedRun) -> float:
    """Return the scores that the kernel computes, in units of the causal half.

    With an additive document mask the kernel cannot tell that the other half is masked. The two chunks of a
    context-parallel rank end at their last position, which skips most of that half. A kernel that is told where
    documents begin computes even less than the causal half; how much depends on the data.
    """
    config = run.config
    if not config.data.document_masking or config.engine.packs_documents(config.parallel):
        return 1.0
    context = config.parallel.context
    return 2.0 if context == 1 else 1 + 1 / (2 * context)


def backward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one backward pass: twice the forward, plus recomputation.

    ``full`` and ``loop`` recompute the layers, ``selective`` the attention core, ``loss.head_recompute`` the logits.
    """
    if run.frozen:
        gate = parameter_counts(run.config.model, run.config.gate)["gate"] if run.is_last(rank) else 0
        return Flops(head=2 * 2.0 * gate * run.tokens / run.config.parallel.tensor)
    forward, mode = forward_flops(run, rank), run.config.parallel.recompute
    recomputed = Flops()
    if mode in ("full", "loop"):
        recomputed = replace(forward, head=0.0)
    elif mode == "selective":
        recomputed = Flops(attention=forward.attention)
    if run.config.loss.head_recompute:
        recomputed = replace(recomputed, head=forward.head)
    return forward.times(2) + recomputed


def model_flops_per_token(run: PlannedRun) -> float:
    """Return the FLOPs that the model needs, without recomputation: the numerator of model FLOPs utilization."""
    config = run.config
    return training_flops_per_token(
        config.model, config.gate, config.data.seq_length, config.model.num_loops, frozen_trunk=run.frozen
    )
