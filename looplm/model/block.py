"""One block of the stack, the blocks outside the loops, and recomputation of layers in backward.

A block with sandwich norms (Ouro section 3.1; norms a-d as numbered there)::

    x = x + norm_b(attention(norm_a(x)))
    x = x + norm_d(mlp(norm_c(x)))

Its parts come from :mod:`looplm.model.local_layers` or :mod:`looplm.model.transformer_engine_layers`, as
``engine.transformer_impl`` says.
"""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from looplm.config import EngineConfig, ModelConfig, ParallelConfig
from looplm.megatron.process_groups import seeded
from looplm.model.fp8_emulation import emulate
from looplm.model.local_layers import layer_submodules as local_submodules
from looplm.model.norms import ReadoutNorm, RMSNorm
from looplm.model.transformer_engine_layers import layer_submodules as engine_submodules


def recomputed(
    layers: Callable[[Tensor], Tensor], h_SBD: Tensor, config: TransformerConfig, group: dist.ProcessGroup
) -> Tensor:
    """Return ``layers(h_SBD)``; backward keeps only the input and recomputes the rest."""
    if config.fp8:  # its scales are a state that only Transformer Engine's own checkpoint function restores
        return te_checkpoint(layers, False, get_cuda_rng_tracker, group, h_SBD)
    return tensor_parallel.checkpoint(layers, False, h_SBD)


class LoopedLayer(TransformerLayer):
    """A block whose initial weights depend on the seed and its position in the stack, not on the rank that holds it.

    Args:
        layer_number: position among this rank's layers, from 1.
        first: number of layers on earlier pipeline ranks.
        num_layers: layers of the whole stack; 0 for one outside the loops, whose linear layers stay in bf16.
        engine: matmul precision of its linear layers.
        name: of the layer, before its position.
    """

    def __init__(
        self,
        *args: Any,
        layer_number: int,
        first: int,
        num_layers: int,
        engine: EngineConfig,
        name: str = "layer",
        **kwargs: Any,
    ) -> None:
        position = first + layer_number
        with seeded(f"{name} {position}"):
            super().__init__(*args, layer_number=layer_number, **kwargs)
        if engine.emulated:
            emulate(self, engine, in_bf16=not num_layers or engine.stays_in_bf16(position - 1, num_layers))


def block_spec(
    model: ModelConfig,
    config: TransformerConfig,
    layout: ParallelConfig,
    pipeline_rank: int,
    engine: EngineConfig,
) -> TransformerBlockSubmodules:
    """Return the spec of this pipeline rank's layers: equal blocks, and the loop-end norm on the last rank."""
    layers = layout.layers_per_rank(model.num_layers)
    spec = _layer_spec(model, config, engine, first=sum(layers[:pipeline_rank]), num_layers=model.num_layers)
    norm = RMSNorm if model.loop_norm == "state" else ReadoutNorm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers[pipeline_rank], layer_norm=norm)


def unlooped_block(
    name: str,
    num_layers: int,
    has_norm: bool,
    model: ModelConfig,
    config: TransformerConfig,
    engine: EngineConfig,
    groups: ProcessGroupCollection,
) -> TransformerBlock:
    """Return layers outside the loops, which one pipeline rank holds whole.

    Args:
        name: distinguishes their initial weights.
        num_layers: how many.
        has_norm: end with a norm.
        model: the looped transformer, to whose blocks they are equal.
        config: Megatron's, of the stack.
        engine: backend of their linear layers, which stay in bf16 where those of the stack are in FP8.
        groups: process groups.
    """
    own = copy(config)
    own.num_layers, own.pipeline_model_parallel_size, own.fp8 = num_layers, 1, None
    own.num_layers_in_first_pipeline_stage = own.num_layers_in_last_pipeline_stage = None
    spec = _layer_spec(model, own, engine, first=0, num_layers=0, name=name)
    layers = TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)
    return TransformerBlock(own, layers, post_layer_norm=has_norm, pg_collection=groups)


def _layer_spec(model: ModelConfig, config: TransformerConfig, engine: EngineConfig, **place: Any) -> ModuleSpec:
    submodules = local_submodules if engine.transformer_impl == "local" else engine_submodules
    return ModuleSpec(module=LoopedLayer, params={**place, "engine": engine}, submodules=submodules(model, config))
