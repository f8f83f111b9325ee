"""A block of Transformer Engine's modules, for NVIDIA GPUs: norms fused into the product that follows, FP8, flash attention.

The norms that only one product reads become part of it. MLA's first norm feeds two (the query's and the latent's), so it
stands alone; the sandwich norms b and d, the loop-end norm and norms of heads have no product behind them and stay ours.

What is ours in a local block and not here stands in a checkpoint under the local block's names: the map below is handed
to Megatron, which renames on the way out and in. Scales and histories of FP8 are not stored; they are pickles.

Packed documents go to the core as one row of tokens with the documents' offsets (Transformer Engine's ``thd`` layout):
the dense mask, [samples, S, S], would leave the flash kernels, and at S = 64K it is 8 GB a sample. Rotary positions count
through the whole sample; only their differences matter, so that is right inside a document. Under context parallelism
the core is ours (:class:`looplm.model.attention.CoreAttention`): Transformer Engine's ring wants every document padded to a
multiple of twice the ranks.

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
from looplm.model.attention import CoreAttention, head_attention, latent_attention
from looplm.model.norms import residual_add

# A fused norm's name here, and where a local block keeps it.
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


def layer_submodules(model: ModelConfig, config: TransformerConfig) -> TransformerLayerSubmodules:
    """The parts of a block."""
    add = residual_add(model, config)
    core = PackedAttention if config.context_parallel_size == 1 else CoreAttention
    mla = model.attention == "mla"
    return TransformerLayerSubmodules(
        input_layernorm=TENorm if mla else IdentityOp,
        self_attention=_mla(model, core) if mla else _mha(model, core),
        self_attn_bda=add,
        pre_mlp_layernorm=IdentityOp,
        mlp=ModuleSpec(
            module=MLP,
            submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear),
        ),
        mlp_bda=add,
        sharded_state_dict_keys_map=LOCAL_NAMES[model.attention],
    )


def _mla(model: ModelConfig, core: type) -> ModuleSpec:
    return latent_attention(
        model,
        linear_q_proj=TEColumnParallelLinear,
        linear_q_down_proj=TELinear,
        linear_q_up_proj=TELayerNormColumnParallelLinear,
        linear_kv_down_proj=TELinear,
        linear_kv_up_proj=TELayerNormColumnParallelLinear,
        core_attention=core,
        linear_proj=TERowParallelLinear,
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )


def _mha(model: ModelConfig, core: type) -> ModuleSpec:
    return head_attention(
        model,
        linear_qkv=TELayerNormColumnParallelLinear,
        core_attention=core,
        linear_proj=TERowParallelLinear,
    )


class PackedAttention(MegatronModule):
    """Transformer Engine's attention, of whole samples or of the documents packed into them.

    It picks its kernel itself: flash-attn where that is installed and has the head widths, or cuDNN's, which has MLA's
    unequal ones.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config)
        self.attention = TEDotProductAttention(config=config, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Attend.

        Args:
            query: [S, B, H, K].
            key: [S, B, groups, K].
            value: [S, B, groups, W].
            attention_mask: the documents' offsets (:func:`looplm.model.attention.document_offsets`); None means plainly causal.

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
            max_seqlen_q=length,  # an upper bound spares the host a look at the offsets
            max_seqlen_kv=length,
        )
        out = self.attention(*tokens, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=documents)
        return out.reshape(samples, length, -1).transpose(0, 1).contiguous()
