"""Arithmetic about a model: parameters, FLOPs and cache bytes. No tensors are made here.

Every figure is a formula over :class:`ModelConfig`; tests hold them against real modules and real allocations.
"""

from looplm.config import GateConfig, ModelConfig


def parameter_counts(model: ModelConfig, gate: GateConfig) -> dict[str, int]:
    """Parameters by part. The number of loops does not appear: the stack is one set of weights."""
    d = model.hidden_size
    norms = (4 * d if model.sandwich_norm else 2 * d) + _attention_vectors(model)
    return {
        "embedding": model.vocab_size * d,
        "layers": model.num_layers * (_layer_matrices(model) + norms),
        "loop_end_norm": d,
        "head": 0 if model.tie_embeddings else model.vocab_size * d,
        "gate": _gate_matrices(model, gate) + _gate_biases(gate),
    }


def checkpoint_bytes(model: ModelConfig, gate: GateConfig, precision: str, frozen_trunk: bool = False) -> int:
    """Bytes of a run's checkpoint: every weight, and of each trained one what the optimizer holds.

    Args:
        precision: optim.precision.
        frozen_trunk: only the gate is trained.
    """
    counts = parameter_counts(model, gate)
    total = sum(counts.values())
    trained = counts["gate"] if frozen_trunk else total
    return total * weight_bytes(precision) + trained * optimizer_bytes(precision)


def weight_bytes(precision: str) -> int:
    """Of one weight, at ``optim.precision``."""
    return {"fp32": 4, "bf16": 2}[precision]


def optimizer_bytes(precision: str) -> int:
    """Of what the optimizer holds for one weight, in fp32: two moments, and in bf16 the main weight."""
    return {"fp32": 8, "bf16": 12}[precision]


def _layer_matrices(model: ModelConfig) -> int:
    return _attention_matrices(model) + 3 * model.hidden_size * model.ffn_hidden_size


def _attention_matrices(model: ModelConfig) -> int:
    d, heads = model.hidden_size, model.num_attention_heads
    if model.attention == "mha":
        return d * model.attention_head_dim * (2 * heads + 2 * model.query_groups)
    query, latent = heads * model.attention_head_dim, model.kv_lora_rank
    queries = d * query if model.q_lora_rank is None else model.q_lora_rank * (d + query)
    keys_values = d * (latent + model.qk_rope_head_dim) + latent * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return queries + keys_values + heads * model.v_head_dim * d


def _attention_vectors(model: ModelConfig) -> int:
    """Norms of MLA's latents; norms of heads and biases of MHA."""
    if model.attention == "mla":
        return model.kv_lora_rank + (model.q_lora_rank or 0)
    width = model.attention_head_dim
    biases = width * (model.num_attention_heads + 2 * model.query_groups)
    return model.qk_norm * 2 * width + model.qkv_bias * biases


def _gate_matrices(model: ModelConfig, gate: GateConfig) -> int:
    """A GRU cell has two [3Z, Z] matrices, for what comes in and for the state."""
    d, z = model.hidden_size, gate.state_size
    return d if gate.kind == "linear" else d * z + 6 * z * z + (2 * z if gate.sequence_level else z)


def _gate_biases(gate: GateConfig) -> int:
    return 1 if gate.kind == "linear" else 6 * gate.state_size + 1


def forward_flops_per_token(model: ModelConfig, gate: GateConfig, seq_length: int, num_loops: int) -> float:
    """FLOPs of one token's forward pass: two per weight of every matrix product and loop, and causal attention.

    Args:
        seq_length: tokens in a sample; a token sees half of them on average.
        num_loops: how often the stack, the head and the gate run.
    """
    weights = model.num_layers * _layer_matrices(model) + model.hidden_size * model.vocab_size
    weights += _gate_matrices(model, gate)
    value_width = model.v_head_dim if model.attention == "mla" else model.attention_head_dim
    scores = model.num_layers * model.num_attention_heads * (model.attention_head_dim + value_width) * seq_length / 2
    return 2.0 * num_loops * (weights + scores)


def training_flops_per_token(
    model: ModelConfig, gate: GateConfig, seq_length: int, num_loops: int, frozen_trunk: bool = False
) -> float:
    """FLOPs of one token's training step: backward costs twice the forward; a frozen trunk has no backward.

    Recomputation is not counted: this is the work the model asks for, not the work an implementation chose to do.
    """
    forward = forward_flops_per_token(model, gate, seq_length, num_loops)
    if not frozen_trunk:
        return 3 * forward
    return forward + 2 * 2.0 * num_loops * _gate_matrices(model, gate)


def cache_values_per_token(model: ModelConfig, num_caches: int) -> int:
    """Numbers that a key-value cache holds for one token: ``num_caches`` is R for a cache per loop, 1 for a shared one."""
    if model.attention == "mla":
        per_layer = model.kv_lora_rank + model.qk_rope_head_dim
    else:
        per_layer = 2 * model.query_groups * model.attention_head_dim
    return num_caches * model.num_layers * per_layer
