"""Parameters, FLOPs and cache bytes of a model, computed from its configuration. No tensors are made here.

Tests compare every figure with real modules and real allocations.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import get_args

from looplm.config import GateConfig, LossConfig, ModelConfig
from looplm.parameters import Section, parameters


@cache
def parameter_counts(model: ModelConfig, gate: GateConfig) -> Mapping[str, int]:
    """Return the number of parameters by section. All loops share one set of weights, save for a step embedding."""
    counts = dict.fromkeys(get_args(Section), 0)
    for row in parameters(model, gate):
        counts[row.section] += row.size
    return MappingProxyType(counts)  # read-only, because the planner asks for it again for every layout


def checkpoint_bytes(model: ModelConfig, gate: GateConfig, precision: str, frozen_trunk: bool = False) -> int:
    """Return the bytes of a run's checkpoint: every weight, and the optimizer's state for each trained one.

    Args:
        model: the looped transformer.
        gate: its exit gate.
        precision: optim.precision.
        frozen_trunk: True if only the gate is trained.
    """
    counts = parameter_counts(model, gate)
    total = sum(counts.values())
    trained = counts["gate"] if frozen_trunk else total
    return total * weight_bytes(precision) + trained * optimizer_bytes(precision)


def weight_bytes(precision: str) -> int:
    """Return the bytes of one weight at ``optim.precision``."""
    return {"fp32": 4, "bf16": 2}[precision]


def optimizer_bytes(precision: str) -> int:
    """Return the bytes of optimizer state per parameter: two fp32 moments, plus an fp32 main weight for bf16."""
    return {"fp32": 8, "bf16": 12}[precision]


@cache
def forward_flops_per_token(model: ModelConfig, gate: GateConfig, seq_length: int, num_loops: int) -> float:
    """Return the FLOPs of one token's forward pass: two per weight of each matrix and loop, plus causal attention.

    Args:
        model: the looped transformer.
        gate: its exit gate.
        seq_length: tokens in a sample; a token sees half of them on average.
        num_loops: how often the stack, the gate, the coda and the head run.
    """
    parts = _section_flops(model, gate, seq_length)
    once = parts["prelude"] - parts["injection"]  # in every loop but the first
    return once + num_loops * (sum(parts.values()) - parts["prelude"])


def training_flops_per_token(
    model: ModelConfig, gate: GateConfig, loss: LossConfig, seq_length: int, num_loops: int
) -> float:
    """Return the FLOPs of one token's training step: backward costs twice the forward of all that is trained.

    With ``loss.weights: last`` the coda and the head of other loops have no backward; a frozen trunk has none, nor has
    a gate that is not trained. ``loss.backward_loops`` is not counted. Nor is recomputation: this is the work that the
    model needs, not the work that an implementation does.
    """
    forward = forward_flops_per_token(model, gate, seq_length, num_loops)
    parts = _section_flops(model, gate, seq_length)
    gates = num_loops * parts["gate"]
    if loss.frozen_trunk:
        return forward + 2 * gates
    read_outs = (num_loops - 1) * (parts["coda"] + parts["head"]) if loss.weights == "last" else 0.0
    return 3 * forward - 2 * (read_outs + (0.0 if loss.trains_gate else gates))


@cache
def _section_flops(model: ModelConfig, gate: GateConfig, seq_length: int) -> Mapping[str, float]:
    """Return the FLOPs of one token's way forward through each section, once."""
    products = dict.fromkeys(get_args(Section), 0.0)
    for row in parameters(model, gate):
        if row.role == "matrix":
            products[row.section] += row.size * row.uses
    if model.tie_embeddings:
        products["head"] += model.vocab_size * model.hidden_size  # it multiplies with the embedding's table
    widths = model.attention_widths
    scores = model.num_attention_heads * (widths.query_key + widths.value) * seq_length / 2
    for section, layers in (
        ("prelude", model.prelude_layers),
        ("layers", model.num_layers),
        ("coda", model.coda_layers),
    ):
        products[section] += layers * scores
    return {section: 2.0 * count for section, count in products.items()}


def cache_values_per_token(model: ModelConfig, num_caches: int) -> int:
    """Return the values that a cache holds of one token; ``num_caches`` is R with a cache per loop, else 1."""
    return (num_caches * model.num_layers + model.unlooped_layers) * model.attention_widths.cached
