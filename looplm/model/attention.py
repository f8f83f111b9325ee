"""Attention: specs of MLA and of MHA, the attention core on torch's kernels, and masks for packed documents.

Shapes: S sequence, B batch, H heads, K query-key head width, W value head width, T positions attended to: S, or under
context parallelism the whole sequence, of which S is this rank's part.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from looplm.config import ModelConfig
from looplm.megatron import context_parallel
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
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "rope_period": model.rope_period},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=modules.column,
            linear_q_down_proj=modules.replicated,
            linear_q_up_proj=modules.normed_column,
            linear_kv_down_proj=modules.replicated,
            linear_kv_up_proj=modules.normed_column,
            core_attention=modules.core,
            linear_proj=modules.row,
            q_layernorm=modules.latent_norm,
            kv_layernorm=modules.latent_norm,
        ),
    )


def _head_attention(model: ModelConfig, modules: AttentionModules) -> ModuleSpec:
    head_norm = RMSNorm if model.qk_norm else IdentityOp  # never fused: no linear layer follows it
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.normed_column,
            core_attention=modules.core,
            linear_proj=modules.row,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )


_SPECS = {"mla": _latent_attention, "mha": _head_attention}


class LatentAttention(MLASelfAttention):
    """Megatron's multi-head latent attention, with several rotary keys side by side.

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


class CoreAttention(MegatronModule):
    """``softmax(q k^T scale + mask) v`` on torch's fused kernels, for equal and unequal head widths.

    Megatron's local module materializes S x S scores and refuses MLA's unequal widths.

    Under context parallelism every rank gathers the keys and values of all positions and attends from its own. They are
    gathered as heads. Gathering MLA's latent instead, before the up-projection, would move and keep fewer bytes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.softmax_scale = softmax_scale
        self.context = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend from this rank's positions.

        Args:
            query: [S, B, H, K].
            key: [S, B, groups, K].
            value: [S, B, groups, W].
            attention_mask: [B, 1, S, T], added to the scores; None means causal.

        Returns:
            [S, B, H * W].
        """
        widths = [key.size(-1), value.size(-1)]
        if self.context.size() > 1:  # both in one message
            key, value = context_parallel.gather(torch.cat((key, value), -1), self.context).split(widths, -1)
        q_BHSK, k_BHTK, v_BHTW = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        pad = widths[0] - widths[1]
        if pad > 0:  # with unequal widths torch takes a kernel that materializes S x T
            v_BHTW = F.pad(v_BHTW, (0, pad))
        runs = []
        for own, seen in context_parallel.spans(query.size(0), self.context):
            mask = None if attention_mask is None else attention_mask[:, :, own, :seen]
            before = seen - (own.stop - own.start)
            if mask is None and before:  # is_causal would align the mask with the first key, not the last
                mask = causal_lower_right(own.stop - own.start, seen)
            out_BHSW = F.scaled_dot_product_attention(
                q_BHSK[:, :, own],
                k_BHTK[:, :, :seen],
                v_BHTW[:, :, :seen],
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.softmax_scale,
                enable_gqa=key.size(2) != query.size(2),
            )
            runs.append(out_BHSW[..., : widths[1]].permute(2, 0, 1, 3).flatten(2))
        return runs[0] if len(runs) == 1 else torch.cat(runs)


def document_mask(document_start_SB: Tensor, dtype: torch.dtype, group: context_parallel.Group = None) -> Tensor:
    """Return an additive mask [B, 1, S, T] that keeps attention causal and inside each token's document.

    Args:
        document_start_SB: position in the whole sequence at which each token's document starts, for this rank's tokens.
        dtype: dtype of the scores.
        group: the context-parallel ranks.
    """
    start_BS1 = document_start_SB.t().unsqueeze(-1)
    key_T = torch.arange(document_start_SB.size(0) * context_parallel.rank_and_size(group)[1], device=start_BS1.device)
    query_S1 = context_parallel.shard(key_T, group).unsqueeze(-1)
    visible_BST = (key_T <= query_S1) & (key_T >= start_BS1)
    mask_BST = torch.zeros(visible_BST.shape, dtype=dtype, device=start_BS1.device)
    return mask_BST.masked_fill_(~visible_BST, float("-inf")).unsqueeze(1)


def document_offsets(document_start_SB: Tensor) -> Tensor:
    """Return the start of every document in the concatenated samples, and their end: [documents + 1], int32.

    Args:
        document_start_SB: as in :func:`document_mask`, for whole samples.
    """
    length, samples = document_start_SB.shape
    begins_BS = document_start_SB.t() == torch.arange(length, device=document_start_SB.device)
    begins = begins_BS.flatten().nonzero().squeeze(1)
    return torch.cat((begins, begins.new_tensor([samples * length]))).int()
