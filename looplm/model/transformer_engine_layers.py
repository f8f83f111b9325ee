"""A block of Transformer Engine's modules, for NVIDIA GPUs: fused norms, FP8, flash attention.

A norm that only one linear layer reads is fused into that layer. MLA's first norm has two readers (the query's
projection and the latent's), as has MHA's with a gate on its output, so it stays separate. The sandwich norms b and d,
the loop-end norm and norms of heads precede no linear layer and stay ours.

Checkpoints store all weights under the local block's names: Megatron renames them by the map below when it saves and
loads. Scales and histories of FP8 are not stored, because they are pickles.

Packed documents go to the core as one row of tokens with the documents' offsets (Transformer Engine's ``thd`` layout).
Rotary positions count through the whole sample, which is correct inside a document because only their differences
matter. Under context parallelism the core is ours (:class:`looplm.model.core_attention.CoreAttention`), which cuts a
sample wherever its parts end. Transformer Engine cuts every document into twice as many parts as there are ranks, and
needs each padded to a multiple of that.

Shapes: S sequence, B batch, H heads, K query-key head width, W value head width.
"""

from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TELinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from looplm.config import ModelConfig
from looplm.model.attention import AttentionModules, attention_spec
from looplm.model.core_attention import CoreAttention
from looplm.model.norms import residual_add

# A fused norm's name here, and its name in a local block.
LOCAL_NAMES = {
    "mla": {
        "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
        "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    },
    "mha": {
        "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
        "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    },
}


def local_names(model: ModelConfig) -> dict[str, str]:
    """Return the fused norms of a block by name, with their names in a local block."""
    alone = "" if model.attention_gate == "none" else "input_layernorm."
    return {fused: local for fused, local in LOCAL_NAMES[model.attention].items() if local != alone}


def layer_submodules(model: ModelConfig, config: TransformerConfig) -> TransformerLayerSubmodules:
    """Return the parts of a block."""
    add, names = residual_add(model, config), local_names(model)
    attention = AttentionModules(
        column=TEColumnParallelLinear,
        normed_column=TELayerNormColumnParallelLinear,
        row=TERowParallelLinear,
        replicated=TELinear,
        latent_norm=IdentityOp,
        core=PackedAttention if config.context_parallel_size == 1 else CoreAttention,
    )
    mlp = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return TransformerLayerSubmodules(
        input_layernorm=IdentityOp if "input_layernorm." in names.values() else TENorm,
        self_attention=attention_spec(model, attention),
        self_attn_bda=add,
        pre_mlp_layernorm=IdentityOp,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=add,
        sharded_state_dict_keys_map=names,
    )


class PackedAttention(MegatronModule):
    """Transformer Engine's attention over whole samples or over the documents packed into them.

    It chooses its kernel: flash-attn if that is installed and supports the head widths, or cuDNN's, which supports
    MLA's unequal widths. On Hopper, of unequal widths from 128 on, cuDNN trains 192 and 128 alone (Transformer Engine
    2.9 to 2.20, fused_attn.cpp).
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.attention = TEDotProductAttention(config=config, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend inside samples or documents.

        Args:
            query: [S, B, H, K].
            key: [S, B, groups, K].
            value: [S, B, groups, W].
            attention_mask: the documents' offsets (:func:`looplm.model.spans.document_offsets`); None means causal.

        Returns:
            [S, B, H * W].
        """
        if attention_mask is None:
            return self.attention(query, key, value, None, attn_mask_type=AttnMaskType.causal)
        length, samples = query.shape[:2]
        tokens = [x.transpose(0, 1).flatten(0, 1) for x in (query, key, value)]
        documents = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=attention_mask,
            cu_seqlens_kv=attention_mask,
            max_seqlen_q=length,  # an upper bound, so that the host need not read the offsets
            max_seqlen_kv=length,
        )
        out = self.attention(*tokens, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=documents)
        return out.reshape(samples, length, -1).transpose(0, 1).contiguous()
