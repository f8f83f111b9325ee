"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, set up from our configuration."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import Tensor, nn

from looplm.config import LossConfig, OptimConfig, ParallelConfig
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from looplm.model.latent_reasoning import LatentReasoning
from looplm.parameters import decayed_names


def freeze_trunk(model: LoopLM) -> None:
    """Make the exit gate the only trainable part (stage 2)."""
    model.requires_grad_(False)
    if model.post_process:
        model.gate.requires_grad_(True)


def wrap_data_parallel(model: LoopLM, loss: LossConfig, layout: ParallelConfig) -> DistributedDataParallel:
    """Return the model in Megatron's DDP: gradients in contiguous buffers, reduced over the data-parallel ranks.

    With ``layout.distributed_optimizer``, a rank's ``main_grad`` afterwards holds true sums only in that rank's shard.
    """
    frozen = loss.frozen_trunk
    if frozen:
        freeze_trunk(model)
    elif not loss.trains_gate and model.post_process:
        model.gate.requires_grad_(False)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=layout.accumulate_fp32,
        # Stage 2 has next to nothing to reduce, and under a pipeline no schedule that marks the last backward.
        overlap_grad_reduce=layout.overlap_grad_reduce and not frozen,
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
        fp8_param_gather=model.config.fp8_param,
    )
    ddp = DistributedDataParallel(model.config, config, model)
    model.config.no_sync_func = ddp.no_sync

    def finalize(views: object, tokens: object, **keys: Any) -> None:
        """Sum the gradients over the ranks; the trainer divides them by the tokens, which then need no collective.

        A pipeline's schedule passes its views of the model, one per loop; all of them share this one wrapper.
        """
        finalize_model_grads([ddp], None, **keys)

    model.config.finalize_model_grads_func = finalize
    if layout.overlap_param_gather:
        _gather_in_time(ddp)
    return ddp


def _gather_in_time(ddp: DistributedDataParallel) -> None:
    """Have weights gathered before a module reads them that does not own them.

    Megatron waits for a weight's gathering when the forward of the module that owns it begins. The gate and the unit
    inside attention read their layers' weights without that, and so does the head, which runs behind the gate.
    """
    model: LoopLM = ddp.module
    readers: list[tuple[nn.Module, list[Tensor]]] = [
        (module, list(module.parameters())) for module in model.modules() if isinstance(module, LatentReasoning)
    ]
    if model.post_process:
        readers.append((model.gate, [*model.gate.parameters(), model.head_weight()]))
    for module, weights in readers:
        groups = [ddp.param_to_bucket_group[weight] for weight in weights if weight.requires_grad]

        def finish(*_: object, groups: list[Any] = groups) -> None:
            for group in groups:
                group.finish_param_sync()

        module.register_forward_pre_hook(finish)


def build_optimizer(ddp: DistributedDataParallel, optim: OptimConfig, layout: ParallelConfig) -> MegatronOptimizer:
    """Return AdamW with fp32 main weights; weight decay spares norms, biases and the gate.

    With ``layout.distributed_optimizer``, each data-parallel rank holds main weights and moments of its shard only.
    """
    model_config = ddp.module.config
    config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=0.0,  # the trainer clips, with the norm that it has anyway
        bf16=optim.precision == "bf16",
        params_dtype=DTYPES[optim.precision],
        use_distributed_optimizer=layout.distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
        fp8_recipe=model_config.fp8_recipe if model_config.fp8 else None,
    )
    decayed = decayed_names(ddp.module.model_config, ddp.module.gate_config)
    spares = ParamWithNamePredicate("no_weight_decay", lambda _, name: name.removeprefix("module.") not in decayed)
    spared = ParamKey(with_name_predicate=spares)
    optimizer = get_megatron_optimizer(config, [ddp], config_overrides={spared: ParamGroupOverride(wd_mult=0.0)})
    model_config.grad_scale_func = optimizer.scale_loss
    _fuse(optimizer)
    return optimizer


def _fuse(optimizer: MegatronOptimizer) -> None:
    """Have torch update a parameter in one pass, without temporary tensors of its size; Megatron does not ask for it.

    On a GPU, Transformer Engine and Apex have a fused AdamW of their own.
    """
    for core in _cores(optimizer):
        for group in core.optimizer.param_groups if isinstance(core.optimizer, torch.optim.AdamW) else ():
            group["fused"] = True


def _cores(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def updated_part(optimizer: MegatronOptimizer, parameter: torch.nn.Parameter) -> slice | None:
    """Return the part of a flattened parameter that this rank updates; None for all of it.

    It is empty if other data-parallel ranks update the whole parameter.
    """
    for core in _cores(optimizer):
        if isinstance(core, DistributedOptimizer):
            if parameter not in core.model_param_group_index_map:
                return slice(0, 0)
            span = core._get_model_param_range_map(parameter)["param"]
            return slice(span.start, span.end)
    return None


def build_scheduler(optimizer: MegatronOptimizer, optim: OptimConfig) -> OptimizerParamScheduler:
    """Return Megatron's learning-rate schedule in optimizer steps; call ``step(1)`` before each optimizer step."""
    style = {"wsd": "WSD" if optim.decay_steps else "constant", "cosine": "cosine", "constant": "constant"}
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.warmup_steps,
        lr_decay_steps=max(optim.train_steps, optim.warmup_steps + 1),
        lr_decay_style=style[optim.schedule],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=optim.train_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optim.decay_steps,
        lr_wsd_decay_style="linear",
    )
