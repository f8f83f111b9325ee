"""Translation of our configuration into Megatron-core's, including the settings that differ between CPU and CUDA."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import nn

from looplm.bounds import require
from looplm.config import EngineConfig, ModelConfig, ParallelConfig, Recompute
from looplm.megatron.device import (
    HAS_CUDA,
    HAS_FUSED_WEIGHT_GRADIENTS,
    HAS_TRANSFORMER_ENGINE,
    compute_capability,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by the words of our keys
# `loop` is LoopLM's own. Megatron can also distribute the kept activations over tensor-parallel ranks, which is not
# used here: under sequence parallelism they are already this rank's part of the sequence.
_RECOMPUTE: dict[Recompute, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "loop": {},
}
# Smallest compute capability for each FP8 recipe: Ada, Hopper, Blackwell.
FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def transformer_config(
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    layout: ParallelConfig | None = None,
    initialize: bool = True,
    engine: EngineConfig | None = None,
) -> TransformerConfig:
    """Return ``model`` as Megatron's config; gradients are divided by the number of unmasked tokens over all ranks.

    Args:
        model: the looped transformer.
        dtype: dtype of the parameters.
        layout: the parallel layout; None means one rank.
        initialize: initialize the matrices randomly; False leaves them undefined until weights are loaded.
        engine: backend and precision of the linear layers, checked against this machine; None means the defaults.
    """
    layout, engine = layout or ParallelConfig(), engine or EngineConfig()
    check_engine(engine)
    fused = HAS_CUDA and HAS_FUSED_WEIGHT_GRADIENTS
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
        # As Megatron chooses for its interleaved schedule; batched messages would also lose their order on gloo.
        "overlap_p2p_comm": layout.pipeline > 1,
        "batch_p2p_comm": False,
        # gloo still reads a tensor after the call that sends it; NCCL keeps it until it is sent.
        "deallocate_pipeline_outputs": HAS_CUDA and layout.pipeline > 1,
        "microbatch_group_size_per_vp_stage": layout.pipeline,
        **_RECOMPUTE[layout.recompute],
        "gradient_accumulation_fusion": fused,
        # Transformer Engine lets the first use of a weight in a step overwrite the buffer of its gradient, to which the
        # other loops have added by then. Without this cache it counts no uses, and adds in each.
        "disable_parameter_transpose_cache": fused and engine.transformer_impl == "transformer_engine",
        "attention_backend": _attention_backend(),
        "bias_activation_fusion": True,  # on a CPU it is looplm.megatron.swiglu
        "bias_dropout_fusion": HAS_CUDA,
        "masked_softmax_fusion": HAS_CUDA,
        # On the CPU, weights do not depend on the layout. Transformer Engine draws its own on the GPU.
        "use_cpu_initialization": not HAS_CUDA or engine.transformer_impl == "local",
        "perform_initialization": initialize,
        **_fp8_settings(engine),
    }
    if model.attention == "mha":
        return TransformerConfig(
            **common,
            kv_channels=model.attention_head_dim,
            num_query_groups=model.query_groups,
            apply_rope_fusion=HAS_CUDA and HAS_TRANSFORMER_ENGINE,  # Megatron fuses MLA's for YaRN only
            add_qkv_bias=model.qkv_bias,
            qk_layernorm=model.qk_norm,  # tensor-parallel ranks sum the gradients of these norms, with or without SP
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


def check_engine(engine: EngineConfig) -> None:
    """Raise a :class:`UserError` if this machine lacks what ``engine`` needs, or has real FP8 in place of emulated."""
    missing = "Transformer Engine is not installed here (setup.py, [gpu]); take local"
    installed = engine.transformer_impl == "local" or HAS_TRANSFORMER_ENGINE
    require(installed, "engine.transformer_impl", engine.transformer_impl, missing)
    fix = "emulation is for machines without a GPU; take engine.transformer_impl=transformer_engine"
    require(not (engine.emulated and HAS_CUDA), "engine.fp8", engine.fp8, fix)
    if engine.real_fp8 and HAS_CUDA:
        need, have = FP8_CAPABILITY[engine.fp8_recipe], compute_capability()
        fix = f"it needs compute capability {need[0]}.{need[1]}, this GPU has {have[0]}.{have[1]}"
        require(have >= need, "engine.fp8_recipe", engine.fp8_recipe, fix)


def _attention_backend() -> AttnBackend:
    """Return what Transformer Engine's variables choose. Megatron-core sets them itself, and fails if they differ."""
    names = [f"NVTE_{kernel}_ATTN" for kernel in ("FLASH", "FUSED", "UNFUSED")]
    chosen = tuple(os.environ.get(name, "1") for name in names)
    known: dict[tuple[str, ...], AttnBackend] = {("1", "1", "1"): AttnBackend.auto, ("1", "0", "0"): AttnBackend.flash}
    known |= {("0", "1", "0"): AttnBackend.fused, ("0", "0", "1"): AttnBackend.unfused}
    fix = "Megatron-core knows all at 1, or one at 1 and the others at 0; set all three, or none"
    require(chosen in known, ", ".join(names), ", ".join(chosen), fix)
    return known[chosen]


def _fp8_settings(engine: EngineConfig) -> dict[str, Any]:
    """Return Megatron's FP8 settings. Emulation happens in our modules, for which Megatron needs none."""
    if not engine.real_fp8:
        return {}
    return {
        "fp8": engine.fp8,
        "fp8_recipe": engine.fp8_recipe,
        "fp8_param": engine.fp8_params,
        "fp8_amax_history_len": engine.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": engine.first_layers_bf16 + engine.last_layers_bf16 > 0,
        "num_layers_at_start_in_bf16": engine.first_layers_bf16,
        "num_layers_at_end_in_bf16": engine.last_layers_bf16,
    }


def mark_replicated(module: nn.Module, config: TransformerConfig) -> None:
    """Mark weights that every tensor-parallel rank holds whole.

    Under sequence parallelism each rank sees only some positions, so Megatron must sum their gradients over the ranks.
    """
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
