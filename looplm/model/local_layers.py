"""A block of torch's and Megatron-core's own modules, which run on any device."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from looplm.config import ModelConfig
from looplm.megatron.patches import accept_as_mla_down_projection
from looplm.megatron.settings import mark_replicated
from looplm.model.attention import AttentionModules, attention_spec
from looplm.model.core_attention import CoreAttention
from looplm.model.norms import RMSNorm, residual_add


class ReplicatedLinear(MegatronModule):
    """A linear layer that every tensor-parallel rank holds whole: MLA's down projections.

    Megatron's own local choice is column-parallel and gathers the rotary key, which different heads then use on each
    rank. The gather's backward splits that gradient without summing it; the loss does not show the error
    (NVIDIA/Megatron-LM#1699). With a replicated layer and sequence parallelism Megatron takes the branch written for
    Transformer Engine's duplicated linear layers, which is correct: each rank sees some positions, and the weight's
    gradient is summed over the ranks.
    """

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, init_method: Callable[..., Any], **_: Any
    ) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        mark_replicated(self, config)
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.product(x, self.weight), None


accept_as_mla_down_projection(ReplicatedLinear)

ATTENTION = AttentionModules(
    column=ColumnParallelLinear,
    normed_column=ColumnParallelLinear,
    row=RowParallelLinear,
    replicated=ReplicatedLinear,
    latent_norm=RMSNorm,
    core=CoreAttention,
)


def layer_submodules(model: ModelConfig, config: TransformerConfig) -> TransformerLayerSubmodules:
    """Return the parts of a block. Checkpoints store weights under these parts' names."""
    add = residual_add(model, config)
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return TransformerLayerSubmodules(
        input_layernorm=RMSNorm,
        self_attention=attention_spec(model, ATTENTION),
        self_attn_bda=add,
        pre_mlp_layernorm=RMSNorm,
        mlp=ModuleSpec(module=MLP, submodules=mlp),
        mlp_bda=add,
    )
