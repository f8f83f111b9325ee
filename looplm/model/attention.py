"""Attention: specs of MLA and of MHA, around a core that computes scores and weighted sum."""

from typing import Any, NamedTuple

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from looplm.config import ModelConfig
from looplm.model.attention_gate import HeadAttention, OutputGate
from looplm.model.latent_reasoning import LatentReasoning
from looplm.model.norms import RMSNorm
from looplm.parameters import chosen


class AttentionModules(NamedTuple):
    """The classes that attention is built from, in torch and Megatron-core or in Transformer Engine.

    Args:
        column: linear layer that is split by output.
        normed_column: the same; a norm in front of it may be fused into it.
        row: linear layer that is split by input.
        replicated: linear layer that every tensor-parallel rank holds whole.
        latent_norm: norm in front of ``normed_column``, or an identity if it is fused.
        core: scores and weighted sum.
    """

    column: type
    normed_column: type
    row: type
    replicated: type
    latent_norm: type
    core: type


def attention_spec(model: ModelConfig, modules: AttentionModules) -> ModuleSpec:
    """Return Megatron's spec of the attention that ``model.attention`` names.

    Raises:
        ValueError: there is no attention of that kind.
    """
    return chosen(_SPECS, "model.attention", model.attention)(model, modules)


def _latent_attention(model: ModelConfig, modules: AttentionModules) -> ModuleSpec:
    fuses_norm = model.kv_latent_norm and not model.latent_iterations
    return ModuleSpec(
        module=LatentAttention,
        params={"rope_period": model.rope_period, **_params(model, modules)},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=modules.column,
            linear_q_down_proj=modules.replicated,
            linear_q_up_proj=modules.normed_column,
            linear_kv_down_proj=modules.replicated,
            linear_kv_up_proj=modules.normed_column if fuses_norm else modules.column,
            core_attention=modules.core,
            linear_proj=modules.row,
            q_layernorm=modules.latent_norm,
            kv_layernorm=_before_keys_and_values(model, modules),
        ),
    )


def _before_keys_and_values(model: ModelConfig, modules: AttentionModules) -> type | ModuleSpec:
    """Return what the latent passes before keys and values are projected from it."""
    if model.latent_iterations:
        unit = {"iterations": model.latent_iterations, "halts": model.latent_halting, "has_norm": model.kv_latent_norm}
        return ModuleSpec(module=LatentReasoning, params=unit)
    return modules.latent_norm if model.kv_latent_norm else IdentityOp


def _head_attention(model: ModelConfig, modules: AttentionModules) -> ModuleSpec:
    head_norm = RMSNorm if model.qk_norm else IdentityOp  # never fused: no linear layer follows it
    return ModuleSpec(
        module=HeadAttention,
        params=_params(model, modules),
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.normed_column if model.attention_gate == "none" else modules.column,
            core_attention=modules.core,
            linear_proj=modules.row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


def _params(model: ModelConfig, modules: AttentionModules) -> dict[str, Any]:
    gate = None if model.attention_gate == "none" else modules.column
    return {
        "attn_mask_type": AttnMaskType.causal,
        "gate_linear": gate,
        "gate_width": model.attention_gate_width,
    }


_SPECS = {"mla": _latent_attention, "mha": _head_attention}


class LatentAttention(OutputGate, MLASelfAttention):
    """Megatron's multi-head latent attention, with several rotary keys side by side and an optional gate.

    Args:
        rope_period: width after which the frequencies of the rotary part repeat (``model.qk_rope_period``).
    """

    def __init__(self, *args: Any, rope_period: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.qk_pos_emb_head_dim
        one_key = RotaryEmbedding(
            rope_period, rotary_percent=1.0, rotary_base=self.config.rotary_base, cp_group=self.pg_collection.cp
        )
        self.rotary_pos_emb.inv_freq = one_key.inv_freq.repeat(width // rope_period)

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Return the norms that the spec names.

        Megatron-core 0.19 calls this before it builds. Without Transformer Engine its own version refuses a normalized
        key-value latent with an unnormalized query (``q_lora_rank: null``), which DeepSeek's small models have.
        """
        return vars(submodules)


def outer_rotary_embedding(
    model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection
) -> RotaryEmbedding | None:
    """Return the rotary embedding that the model computes for all layers; None for MLA, which does it inside."""
    if model.attention_widths.latents:
        return None
    return RotaryEmbedding(
        model.attention_head_dim,
        rotary_percent=1.0,
        rotary_base=model.rope_base,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=groups.cp,
    )
