"""FLOPs of one pass on one rank: one micro-batch through one loop of the rank's layers, with recomputation."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from looplm.accounting import forward_flops_per_token, training_flops_per_token
from looplm.config import GateConfig, ModelConfig
from tools.planning.planned_run import Amounts, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Flops(Amounts):
    """FLOPs of one tensor-parallel rank."""

    layers: float = 0.0  # matrix products
    attention: float = 0.0  # as its kernels compute it, for samples that are one document; packed documents need fewer
    head: float = 0.0  # the logits with their gradients, and the gate


def forward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one forward pass: those of :mod:`looplm.accounting`, split by part and over the ranks.

    In stage 1 the head computes its gradients in the forward pass, which makes three products of one. Attention's
    kernels take a single width, so MLA's values are padded to the width of its queries.
    """
    config, widths = run.config, run.config.model.attention_widths
    padded = 2 * max(widths.query_key, widths.value) / (widths.query_key + widths.value)
    one = _flops_per_token(config.model, config.gate, config.data.seq_length)
    share = run.tokens / config.parallel.tensor
    layers, products = run.layers_in_a_pass(rank) * share, 1 if run.frozen else 3
    return Flops(
        layers=layers * one.layer,
        attention=layers * one.scores * padded,
        head=(products * one.logits + one.gate) * share if run.is_last(rank) else 0.0,
    )


class _TokenFlops(NamedTuple):
    """FLOPs of one token in one loop, forward."""

    layer: float  # matrix products of one layer
    scores: float  # its causal scores
    logits: float
    gate: float


@cache
def _flops_per_token(model: ModelConfig, gate: GateConfig, seq_length: int) -> _TokenFlops:
    def forward(layers: int, length: int) -> float:
        only_stack = replace(model, num_layers=layers, prelude_layers=0, coda_layers=0)
        return forward_flops_per_token(only_stack, gate, length, 1)

    layer, logits = forward(2, 0) - forward(1, 0), 2.0 * model.vocab_size * model.hidden_size
    return _TokenFlops(layer, forward(1, seq_length) - forward(1, 0), logits, forward(1, 0) - layer - logits)


def backward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one backward pass: twice the forward without the head, plus recomputation.

    Attention's backward is two and a half times its forward: the kernels compute the scores once more, because they
    keep none (Dao 2023, arXiv 2307.08691, section 4.1). ``full`` and ``loop`` recompute the layers, ``selective`` the
    attention core. The head's gradients exist already.
    """
    config, share = run.config, run.tokens / run.config.parallel.tensor
    one = _flops_per_token(config.model, config.gate, config.data.seq_length)
    gate = Flops(head=2 * one.gate * share if run.is_last(rank) else 0.0)
    if run.frozen:
        return gate
    layers, mode = replace(forward_flops(run, rank), head=0.0), config.parallel.recompute
    recomputed = Flops()
    if mode in ("full", "loop"):
        recomputed = layers
    elif mode == "selective":
        recomputed = Flops(attention=layers.attention)
    return replace(layers.times(2), attention=2.5 * layers.attention) + gate + recomputed


def model_flops_per_token(run: PlannedRun) -> float:
    """Return the FLOPs that the model needs, without recomputation: the numerator of model FLOPs utilization."""
    config = run.config
    return training_flops_per_token(
        config.model, config.gate, config.data.seq_length, config.model.num_loops, frozen_trunk=run.frozen
    )
