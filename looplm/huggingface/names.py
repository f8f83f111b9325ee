"""One map between our parameters and the tensors of a Hugging Face checkpoint, used both ways.

Where Ouro has a name, it is Ouro's; MLA's projections have DeepSeek-V3's. A model with plain attention, sandwich norms
and the linear gate therefore *is* in Ouro's layout. Nothing is permuted or rounded: a round trip keeps every bit.

Shapes: D hidden, F feed-forward, V vocabulary, H heads, G key-value heads, P query heads per key-value head, K head width,
C latent, Z gate state.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.config import GateConfig, ModelConfig

Shape = tuple[int, ...]


class Entry(NamedTuple):
    """One of our parameters, and the tensors it is made of there, with their shapes."""

    ours: str
    theirs: Mapping[str, Shape]
    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


def entries(model: ModelConfig, gate: GateConfig) -> list[Entry]:
    """Every parameter of a model, in the order in which a forward pass meets them."""
    d, v = model.hidden_size, model.vocab_size
    found = [_same("embedding.word_embeddings.weight", "model.embed_tokens.weight", (v, d))]
    for layer in range(model.num_layers):
        found += _layer(model, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
    found.append(_same("decoder.final_layernorm.weight", "model.norm.weight", (d,)))
    found += _gate(model, gate)
    if not model.tie_embeddings:
        found.append(_same("output_layer.weight", "lm_head.weight", (v, d)))
    return found


def _layer(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    d, f = model.hidden_size, model.ffn_hidden_size
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if model.sandwich_norm:
        norms |= {"self_attn_bda.norm": "input_layernorm_2", "mlp_bda.norm": "post_attention_layernorm_2"}
    found = [_same(f"{ours}{mine}.weight", f"{theirs}{other}.weight", (d,)) for mine, other in norms.items()]
    attention = _latent_attention if model.attention == "mla" else _head_attention
    found += attention(model, f"{ours}self_attention.", f"{theirs}self_attn.")
    halves = {f"{theirs}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
    found.append(
        Entry(
            f"{ours}mlp.linear_fc1.weight",
            halves,
            lambda parts: torch.cat(tuple(parts)),
            lambda weight: weight.chunk(2),
        )
    )
    found.append(_same(f"{ours}mlp.linear_fc2.weight", f"{theirs}mlp.down_proj.weight", (d, f)))
    return found


def _latent_attention(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    d, heads, query, latent = model.hidden_size, model.num_attention_heads, model.q_lora_rank, model.kv_lora_rank
    width = heads * model.attention_head_dim
    if query is None:
        found = [_same(f"{ours}linear_q_proj.weight", f"{theirs}q_proj.weight", (width, d))]
    else:
        found = [
            _same(f"{ours}linear_q_down_proj.weight", f"{theirs}q_a_proj.weight", (query, d)),
            _same(f"{ours}q_layernorm.weight", f"{theirs}q_a_layernorm.weight", (query,)),
            _same(f"{ours}linear_q_up_proj.weight", f"{theirs}q_b_proj.weight", (width, query)),
        ]
    down = (latent + model.qk_rope_head_dim, d)
    up = (heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    return [
        *found,
        _same(f"{ours}linear_kv_down_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", down),
        _same(f"{ours}kv_layernorm.weight", f"{theirs}kv_a_layernorm.weight", (latent,)),
        _same(f"{ours}linear_kv_up_proj.weight", f"{theirs}kv_b_proj.weight", up),
        _same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (d, heads * model.v_head_dim)),
    ]


def _head_attention(model: ModelConfig, ours: str, theirs: str) -> list[Entry]:
    d, heads, groups, width = model.hidden_size, model.num_attention_heads, model.query_groups, model.attention_head_dim
    per = heads // groups

    def join(parts: Sequence[Tensor]) -> Tensor:
        """Ours holds, group by group, its queries, its key and its value."""
        return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)

    def split(weight: Tensor) -> Sequence[Tensor]:
        grouped = weight.unflatten(0, (groups, -1)).split([per * width, width, width], dim=1)
        return [part.flatten(0, 1) for part in grouped]

    rows = {"q": heads * width, "k": groups * width, "v": groups * width}
    parts = {f"{theirs}{name}_proj.weight": (number, d) for name, number in rows.items()}
    found = [Entry(f"{ours}linear_qkv.weight", parts, join, split)]
    if model.qkv_bias:
        biases = {f"{theirs}{name}_proj.bias": (number,) for name, number in rows.items()}
        found.append(Entry(f"{ours}linear_qkv.bias", biases, join, split))
    if model.qk_norm:
        found += [_same(f"{ours}{name}_layernorm.weight", f"{theirs}{name}_norm.weight", (width,)) for name in "qk"]
    return [*found, _same(f"{ours}linear_proj.weight", f"{theirs}o_proj.weight", (d, heads * width))]


def _gate(model: ModelConfig, gate: GateConfig) -> list[Entry]:
    d, z = model.hidden_size, gate.state_size
    ours, theirs = "gate.", "model.early_exit_gate."
    if gate.kind == "linear":
        shapes: dict[str, Shape] = {"weight": (1, d), "bias": (1,)}
        return [_same(f"{ours}readout.{name}", f"{theirs}{name}", shape) for name, shape in shapes.items()]
    shapes = {"input_proj.weight": (z, d)}
    shapes |= {f"cell.weight_{part}": (3 * z, z) for part in ("ih", "hh")}
    shapes |= {f"cell.bias_{part}": (3 * z,) for part in ("ih", "hh")}
    shapes |= {"readout.weight": (1, z), "readout.bias": (1,)}
    if gate.sequence_level:
        shapes["sequence_readout.weight"] = (1, z)
    return [_same(ours + name, theirs + name, shape) for name, shape in shapes.items()]


def _same(ours: str, theirs: str, shape: Shape) -> Entry:
    return Entry(ours, {theirs: shape}, lambda parts: parts[0], lambda weight: [weight])
