"""FLOPs of one pass on one rank: one micro-batch through one loop of the rank's layers, with recomputation."""

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from looplm.accounting import forward_flops_per_token, training_flops_per_token
from looplm.config import GateConfig, ModelConfig
from looplm.parameters import layer_parameters
from tools.planning.planned_run import Amounts, PlannedRun


@dataclass(frozen=True, kw_only=True)
class Flops(Amounts):
    """FLOPs of one tensor-parallel rank."""

    layers: float = 0.0  # matrix products
    attention: float = 0.0  # as its kernels compute it, for samples that are one document; packed documents need fewer
    head: float = 0.0  # products outside the layers: the logits with their gradients, the gate, and the injection


def forward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one forward pass: those of :mod:`looplm.accounting`, split by part and over the ranks.

    Parts that run in some loops only are averaged over all of them. Attention's kernels take a single width, so MLA's
    values are padded to the width of its queries.
    """
    logits = _head_products(run) * _of_token(run).logits * run.tokens / run.config.parallel.tensor
    head = logits if run.is_last(rank) else 0.0
    return replace(_layer_flops(run, rank), head=head + _gate_flops(run, rank) + _injection_flops(run, rank))


def _layer_flops(run: PlannedRun, rank: int, backward: bool = False) -> Flops:
    """Return the forward FLOPs of the layers that a forward pass runs, or of those that a backward pass returns to."""
    widths, one = run.config.model.attention_widths, _of_token(run)
    padded = 2 * max(widths.query_key, widths.value) / (widths.query_key + widths.value)
    layers = run.layers_in_a_pass(rank, backward) * run.tokens / run.config.parallel.tensor
    return Flops(layers=layers * one.layer, attention=layers * one.scores * padded)


def _head_products(run: PlannedRun) -> float:
    """Return the products of the head's size in a forward pass.

    In stage 1 the head computes its gradients in the forward pass, which makes three products of one. With
    ``loss.weights: last`` only the last loop's losses have gradients.
    """
    return 1 + 2 * run.loops_with_head_gradients / run.num_loops


def _gate_flops(run: PlannedRun, rank: int) -> float:
    """Return the FLOPs of the gate in a forward pass; every tensor-parallel rank holds it whole."""
    return _of_token(run).gate * run.shard_tokens if run.is_last(rank) else 0.0


def _injection_flops(run: PlannedRun, rank: int) -> float:
    """Return the FLOPs of the injection in a forward pass, held like the gate; the first loop has none."""
    later = (run.num_loops - 1) / run.num_loops
    return later * _of_token(run).injection * run.shard_tokens if rank == 0 else 0.0


def fp8_share(run: PlannedRun, rank: int, backward: bool) -> float:
    """Return the share of the layers' products in one pass that are in FP8, if ``engine.fp8`` is.

    The others are those of the layers outside the loops, those of the layers that ``engine.first_layers_bf16`` and
    ``last_layers_bf16`` keep, and those of latent reasoning, whose cell is not one of the engine's linear layers.
    """
    config, model, layers = run.config, run.config.model, run.layers_per_rank()
    first = sum(layers[:rank])
    in_bf16 = sum(config.engine.stays_in_bf16(first + layer, model.num_layers) for layer in range(layers[rank]))
    linear = 2.0 * sum(row.size * row.uses for row in layer_parameters(model) if row.sides is not None)
    return (layers[rank] - in_bf16) * linear / (run.layers_in_a_pass(rank, backward) * _of_token(run).layer)


class _TokenFlops(NamedTuple):
    """FLOPs of one token in one loop, forward."""

    layer: float  # matrix products of one layer
    scores: float  # its causal scores
    logits: float
    gate: float
    injection: float  # in a loop that has one


def _of_token(run: PlannedRun) -> _TokenFlops:
    return _flops_per_token(run.config.model, run.config.gate, run.config.data.seq_length)


@cache
def _flops_per_token(model: ModelConfig, gate: GateConfig, seq_length: int) -> _TokenFlops:
    def forward(layers: int, length: int, loops: int = 1) -> float:
        only_stack = replace(model, num_layers=layers, prelude_layers=0, coda_layers=0)
        return forward_flops_per_token(only_stack, gate, length, loops)

    layer, logits = forward(2, 0) - forward(1, 0), 2.0 * model.vocab_size * model.hidden_size
    return _TokenFlops(
        layer=layer,
        scores=forward(1, seq_length) - forward(1, 0),
        logits=logits,
        gate=forward(1, 0) - layer - logits,
        injection=forward(1, 0, loops=2) - 2 * forward(1, 0),
    )


def backward_flops(run: PlannedRun, rank: int) -> Flops:
    """Return the FLOPs of one backward pass: twice the forward without the head, plus recomputation.

    Attention's backward is two and a half times its forward: the kernels compute the scores once more, because they
    keep none (Dao 2023, arXiv 2307.08691, section 4.1). ``full`` and ``loop`` recompute the layers, ``selective`` the
    attention core. The head's gradients exist already. A gate that is not trained has no backward.
    """
    gate = 2 * _gate_flops(run, rank) if run.config.loss.trains_gate else 0.0
    if run.frozen:
        return Flops(head=gate)
    outside = Flops(head=gate + 2 * _injection_flops(run, rank))
    layers, mode = _layer_flops(run, rank, backward=True), run.config.parallel.recompute
    recomputed = Flops()
    if mode in ("full", "loop"):
        recomputed = layers
    elif mode == "selective":
        recomputed = Flops(attention=layers.attention)
    return replace(layers.times(2), attention=2.5 * layers.attention) + outside + recomputed


def model_flops_per_token(run: PlannedRun) -> float:
    """Return the FLOPs that the model needs, without recomputation: the numerator of model FLOPs utilization."""
    config = run.config
    return training_flops_per_token(config.model, config.gate, config.loss, config.data.seq_length, run.num_loops)
