"""What the Hugging Face tests share: one of our models as a transformers model, through the map of names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from looplm.config import GateConfig, ModelConfig
from looplm.huggingface.export.configuration_looplm import LoopLMConfig
from looplm.huggingface.export.modeling_looplm import LoopLMForCausalLM
from looplm.huggingface.names import entries
from looplm.model import LoopLM


def hf_config(shape: ModelConfig, gate: GateConfig, **keys: Any) -> LoopLMConfig:
    """The same shape in transformers' terms."""
    own = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.ffn_hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "attention": shape.attention,
        "qkv_bias": shape.qkv_bias,
        "qk_norm": shape.qk_norm,
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "qk_rope_period": shape.qk_rope_period,
        "v_head_dim": shape.v_head_dim,
        "total_ut_steps": shape.num_loops,
        "early_exit_gate": gate.kind,
        "gate_state_size": gate.state_size,
        "gate_sequence_level": gate.sequence_level,
        "gate_trained": True,
        "sandwich_norm": shape.sandwich_norm,
        "rope_theta": shape.rope_base,
        "max_position_embeddings": shape.max_sequence_length,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_embeddings,
    }
    return LoopLMConfig(**{**own, **keys})


def to_theirs(shape: ModelConfig, gate: GateConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our names under theirs."""
    parts = ((entry, entry.split(ours[entry.ours])) for entry in entries(shape, gate))
    return {name: part for entry, split in parts for name, part in zip(entry.theirs, split, strict=True)}


def to_ours(shape: ModelConfig, gate: GateConfig, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse."""
    return {entry.ours: entry.join([theirs[name] for name in entry.theirs]) for entry in entries(shape, gate)}


def hf_model(model: LoopLM, gate: GateConfig, **keys: Any) -> LoopLMForCausalLM:
    """The same weights, in eval mode; ``keys`` are of the config."""
    shape = model.model_config
    built = LoopLMForCausalLM(hf_config(shape, gate, **keys)).to(model.head_weight().dtype).eval()
    weights = to_theirs(shape, gate, {name: p.detach() for name, p in model.named_parameters()})
    assert set(weights) == {name for name, _ in built.named_parameters()}
    built.load_state_dict(weights, strict=not shape.tie_embeddings)
    return built


def random_ids(rows: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """[rows, length] token ids."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
