"""Our configuration in Megatron-core's terms: its transformer config, and the spec of one block.

A block with sandwich norms (Ouro section 3.1; norms a-d as numbered there)::

    x = x + norm_b(attention(norm_a(x)))
    x = x + norm_d(mlp(norm_c(x)))

Shapes: S sequence, B batch, D hidden, H heads, K query-key head width, W value head width, T positions attended to: S,
or under context parallelism the sequence of which S is this rank's part.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from looplm import context
from looplm.device import HAS_CUDA, HAS_TRANSFORMER_ENGINE
from looplm.layout import ParallelConfig, Recompute
from looplm.model_config import ModelConfig
from looplm.parallel import seeded


class RMSNorm(MegatronModule):
    """``x / rms(x) * weight`` (Zhang & Sennrich 2019). Megatron's torch norm refuses sequence parallelism; this does not."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ReplicatedLinear(MegatronModule):
    """A linear layer that every tensor-parallel rank holds whole: MLA's down projections.

    Megatron's own local choice is column-parallel and gathers the rotary key, which different heads then use on each
    rank; the gather's backward splits that gradient without summing it, and the loss hides the error. With this one and
    sequence parallelism Megatron takes the branch of Transformer Engine's duplicated linears, which is right: each rank
    sees some positions, and the weight's gradient is summed over the ranks.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[..., Any], **_: Any
    ) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


# Megatron-core accepts listed classes only for these projections; without Transformer Engine this name is free.
if not HAS_TRANSFORMER_ENGINE:
    multi_latent_attention.Linear = ReplicatedLinear


class LatentAttention(MLASelfAttention):
    """Megatron's multi-head latent attention, built as its spec says in every release.

    Args:
        rope_period: width after which the frequencies of the rotary part begin anew (``model.qk_rope_period``).
    """

    def __init__(self, *args: Any, rope_period: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = self.config.qk_pos_emb_head_dim
        one_key = RotaryEmbedding(
            rope_period, rotary_percent=1.0, rotary_base=self.config.rotary_base, cp_group=self.pg_collection.cp
        )
        self.rotary_pos_emb.inv_freq = one_key.inv_freq.repeat(width // rope_period)

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """Megatron-core 0.19 asks this before it builds. Its own answer, off Transformer Engine, refuses a normed
        key-value latent beside queries without a latent (``q_lora_rank: null``), which DeepSeek's small models have."""
        return vars(submodules)


class SandwichNormAdd(MegatronModule):
    """Sits in Megatron's bias-dropout-add slot and normalises the sublayer's output before adding it (norms b, d).

    Normalising undoes the usual small start of the residual outputs' weights, so the norm's gain carries it: at 1 the
    2 L R sublayers that a token passes would drown the token itself, and deeper loops would start out worse.
    """

    def __init__(self, config: TransformerConfig, depth: int) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        nn.init.constant_(self.norm.weight, (2 * depth) ** -0.5)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Megatron asks for a function first and calls it with (output, bias), residual and dropout next."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, None], residual_SBD: Tensor, dropout: float) -> Tensor:
        return residual_SBD + self.norm(output_with_bias[0])


class CoreAttention(MegatronModule):
    """``softmax(q k^T scale + mask) v`` on torch's fused kernels, for equal and unequal head widths.

    Megatron's local one materialises S x S scores and refuses MLA's unequal widths.

    Under context parallelism every rank gathers the keys and values of all positions and attends from its own. They come
    as heads, MLA's too: gathering its latent, before the up-projection, would move and keep fewer bytes.
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
        """Attend.

        Args:
            query: [S, B, H, K].
            key: [S, B, groups, K].
            value: [S, B, groups, W].
            attention_mask: [B, 1, S, T], added to the scores; None means plainly causal.

        Returns:
            [S, B, H * W].
        """
        widths = [key.size(-1), value.size(-1)]
        if self.context.size() > 1:  # both in one message
            key, value = context.restore(torch.cat((key, value), -1), self.context).split(widths, -1)
        q_BHSK, k_BHTK, v_BHTW = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        pad = widths[0] - widths[1]
        if pad > 0:  # unequal widths would leave the flash kernel for one that materialises S x T
            v_BHTW = F.pad(v_BHTW, (0, pad))
        runs = []
        for own, seen in context.spans(query.size(0), self.context):
            mask = None if attention_mask is None else attention_mask[:, :, own, :seen]
            before = seen - (own.stop - own.start)
            if mask is None and before:  # is_causal would align the mask with the first key, not with the last
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


def document_mask(document_start_SB: Tensor, dtype: torch.dtype, group: context.Group = None) -> Tensor:
    """Additive mask that keeps attention causal and inside each token's document: [B, 1, S, T].

    Args:
        document_start_SB: position in the whole sequence at which each token's document starts, for this rank's tokens.
        dtype: of the scores.
        group: the context-parallel ranks.
    """
    start_BS1 = document_start_SB.t().unsqueeze(-1)
    key_T = torch.arange(document_start_SB.size(0) * context.place(group)[1], device=start_BS1.device)
    query_S1 = context.deal(key_T, group).unsqueeze(-1)
    visible_BST = (key_T <= query_S1) & (key_T >= start_BS1)
    mask_BST = torch.zeros(visible_BST.shape, dtype=dtype, device=start_BS1.device)
    return mask_BST.masked_fill_(~visible_BST, float("-inf")).unsqueeze(1)


# What Megatron makes again in backward; `loop` is LoopLM's own. Under sequence parallelism what it keeps instead is
# already this rank's part of the sequence, so there is nothing to distribute any further.
_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "loop": {},
}


def transformer_config(
    model: ModelConfig, dtype: torch.dtype = torch.float32, layout: ParallelConfig | None = None, draw: bool = True
) -> TransformerConfig:
    """``model`` as Megatron's config; gradients are normalised by the number of tokens that count, over all ranks.

    ``draw`` gives the matrices their random start.
    """
    layout = layout or ParallelConfig()
    common: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_std,
        "embedding_init_method_std": model.embedding_std,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
        "tensor_model_parallel_size": layout.tensor,
        "sequence_parallel": layout.sequence_parallel,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": layout.pipeline,
        "num_layers_in_first_pipeline_stage": layout.first_stage_layers,
        "num_layers_in_last_pipeline_stage": layout.last_stage_layers,
        # Messages between the same two ranks must keep their order, and gloo still reads a tensor after the call.
        "overlap_p2p_comm": layout.pipeline > 1,
        "batch_p2p_comm": False,
        "deallocate_pipeline_outputs": False,
        "microbatch_group_size_per_vp_stage": layout.pipeline,
        **_RECOMPUTE[layout.recompute],
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "use_cpu_initialization": not HAS_CUDA,
        "perform_initialization": draw,
    }
    if model.attention == "mha":
        return TransformerConfig(
            **common,
            kv_channels=model.attention_head_dim,
            num_query_groups=model.query_groups,
            add_qkv_bias=model.qkv_bias,
            qk_layernorm=model.qk_norm,  # tensor-parallel ranks then sum the gradients of these norms, with or without SP
        )
    return MLATransformerConfig(
        **common,
        multi_latent_attention=True,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        rope_type="rope",
        rotary_base=model.rope_base,
        rotary_percent=1.0,
    )


class SeededLayer(TransformerLayer):
    """A block whose first weights depend on the seed and its place in the stack, not on the rank that holds it."""

    def __init__(self, *args: Any, layer_number: int, first: int, **kwargs: Any) -> None:
        with seeded(f"layer {first + layer_number}"):
            super().__init__(*args, layer_number=layer_number, **kwargs)


def block_spec(
    model: ModelConfig, config: TransformerConfig, layout: ParallelConfig, pipeline_rank: int
) -> TransformerBlockSubmodules:
    """This pipeline rank's share of the stack: equal blocks, and the loop-end norm on the last rank."""
    stages = layout.stage_layers(model.num_layers)
    spec = _layer_spec(model, config, first=sum(stages[:pipeline_rank]))
    return TransformerBlockSubmodules(layer_specs=[spec] * stages[pipeline_rank], layer_norm=RMSNorm)


def _layer_spec(model: ModelConfig, config: TransformerConfig, first: int) -> ModuleSpec:
    add = get_bias_dropout_add
    if model.sandwich_norm:
        add = ModuleSpec(module=SandwichNormAdd, params={"config": config, "depth": model.num_layers * model.num_loops})
    return ModuleSpec(
        module=SeededLayer,
        params={"first": first},
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_mla_spec(model) if model.attention == "mla" else _mha_spec(model),
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=_spec(MLP, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=add,
        ),
    )


def _mla_spec(model: ModelConfig) -> ModuleSpec:
    return _spec(
        LatentAttention,
        MLASelfAttentionSubmodules(
            linear_q_proj=ColumnParallelLinear,
            linear_q_down_proj=ReplicatedLinear,
            linear_q_up_proj=ColumnParallelLinear,
            linear_kv_down_proj=ReplicatedLinear,
            linear_kv_up_proj=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm,
            kv_layernorm=RMSNorm,
        ),
        attn_mask_type=AttnMaskType.causal,
        rope_period=model.rope_period,
    )


def _mha_spec(model: ModelConfig) -> ModuleSpec:
    head_norm = RMSNorm if model.qk_norm else IdentityOp
    return _spec(
        SelfAttention,
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=CoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
        attn_mask_type=AttnMaskType.causal,
    )


def _spec(module: type, submodules: Any, **params: Any) -> ModuleSpec:
    """``ModuleSpec`` without the keyword noise."""
    return ModuleSpec(module=module, submodules=submodules, params=params)
