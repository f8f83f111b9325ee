"""Parameters, FLOPs and cache bytes of a model, computed from its configuration. No tensors are made here.

Tests compare every figure with real modules and real allocations.
"""

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import get_args

from looplm.config import GateConfig, ModelConfig
from looplm.parameters import Section, gate_parameters, parameters


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
    matrices = [row for row in parameters(model, gate) if row.role == "matrix"]
    injection = sum(row.size for row in matrices if row.section == "injection")  # in every loop but the first
    once = float(sum(row.size * row.uses for row in matrices if row.section == "prelude") - injection)
    looped = float(sum(row.size * row.uses for row in matrices if row.section != "prelude"))
    if model.tie_embeddings:
        looped += model.vocab_size * model.hidden_size  # the head multiplies with the embedding's table
    widths = model.attention_widths
    layer_scores = model.num_attention_heads * (widths.query_key + widths.value) * seq_length / 2
    once += model.prelude_layers * layer_scores
    looped += (model.num_layers + model.coda_layers) * layer_scores
    return 2.0 * (once + num_loops * looped)


def training_flops_per_token(
    model: ModelConfig, gate: GateConfig, seq_length: int, num_loops: int, frozen_trunk: bool = False
) -> float:
    """Return the FLOPs of one token's training step: backward costs twice the forward; a frozen trunk has no backward.

    Recomputation is not counted: this is the work that the model needs, not the work that an implementation does.
    """
    forward = forward_flops_per_token(model, gate, seq_length, num_loops)
    if not frozen_trunk:
        return 3 * forward
    return forward + 2 * 2.0 * num_loops * sum(row.size for row in gate_parameters(model, gate) if row.role == "matrix")


def cache_values_per_token(model: ModelConfig, num_caches: int) -> int:
    """Return the values that a cache holds of one token; ``num_caches`` is R with a cache per loop, else 1."""
    return (num_caches * model.num_layers + model.unlooped_layers) * model.attention_widths.cached
