"""The optimizer's state in one form, whatever the layout and whichever of Megatron's optimizers holds it.

For each parameter: Adam's two moments, and the fp32 weight where the model's own is narrower, as sharded tensors of the
parameter's shape. That is all of it: rates and betas are configuration, and all parameters have made the same steps.

Megatron's three optimizers each have a form of their own, so a checkpoint of one does not load into another. The
distributed one's also fail: without Transformer Engine or Apex a fresh optimizer cannot load, and a loaded one has one
step counter that every parameter advances; its resharding form reads each gradient bucket but the first at a wrong
offset. Hence this page goes to the tensors themselves.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

MAIN = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")


def sharded_state(
    optimizer: MegatronOptimizer, model: nn.Module, weights: dict[str, Any], is_loading: bool
) -> dict[str, dict[str, Any]]:
    """The state as sharded tensors, to save or to be loaded into; collective when it is saved.

    Args:
        optimizer: as :class:`pretrain.trainer.Trainer` builds it.
        model: whose parameters it steps.
        weights: the model's sharded state dict.
        is_loading: give empty tensors rather than the state.

    Returns:
        tensors by their names, for each trained parameter by its name. To save a distributed optimizer, the first
        data-parallel rank has them all and the others have none.
    """
    core = _core(optimizer)
    trained = _trained(model)
    values = {parameter: _empty(parameter) for parameter in trained.values()} if is_loading else _whole(core, trained)
    if not trained:  # a pipeline rank of the gate's stage
        return {}
    places = get_param_id_to_sharded_param_map(weights, trained.values())
    return {
        parameter_name: {
            name: make_sharded_optimizer_tensor(places[index], value, f"optimizer.state.{name}")
            for name, value in values[parameter].items()
        }
        for index, (parameter_name, parameter) in enumerate(trained.items())
        if parameter in values
    }


def plain_state(optimizer: MegatronOptimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The state as plain tensors, in the form that :func:`load_state` takes; of one process, with a whole model."""
    whole = _whole(_core(optimizer), _trained(model))
    return {name: whole[parameter] for name, parameter in _trained(model).items()}


@torch.no_grad()
def load_state(optimizer: MegatronOptimizer, model: nn.Module, state: dict[str, dict[str, Tensor]], step: int) -> None:
    """Take over what was loaded into :func:`sharded_state`.

    Args:
        optimizer: of any kind, in any layout.
        model: whose parameters it steps.
        state: what came back in place of the sharded tensors.
        step: optimizer steps done, which Adam's bias correction counts.
    """
    core = _core(optimizer)
    _allocate(core)
    for parameter_name, parameter in _trained(model).items():
        if not _owns(core, parameter):
            continue
        main, first = _main(core, parameter)
        for name, value in state[parameter_name].items():
            part = value.flatten()[first : first + main.numel()]
            _tensor(core, main, name).copy_(part.view(main.shape))
    _set_step(core, step)


def _core(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Megatron wraps its optimizer in a chain of one."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _names(parameter: nn.Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype is torch.float32 else (*MOMENTS, MAIN)


def _empty(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {name: torch.empty(parameter.shape, dtype=torch.float32, device="cpu") for name in _names(parameter)}


def _owns(core: MegatronOptimizer, parameter: nn.Parameter) -> bool:
    """Whether this rank steps any part of a parameter."""
    return not isinstance(core, DistributedOptimizer) or parameter in core.model_param_group_index_map


def _main(core: MegatronOptimizer, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """What this rank steps of a parameter it owns, and where that begins in the flat parameter."""
    if not isinstance(core, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), 0
    group, place = core.model_param_group_index_map[parameter]
    return core.optimizer.param_groups[group]["params"][place], core._get_model_param_range_map(parameter)[
        "param"
    ].start


def _tensor(core: MegatronOptimizer, main: Tensor, name: str) -> Tensor:
    return main if name == MAIN else core.optimizer.state[main][name]


def _whole(core: MegatronOptimizer, trained: dict[str, nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """The state of each parameter in its shape; of a distributed optimizer, on the first data-parallel rank only."""
    if not trained:
        return {}
    _allocate(core)
    if isinstance(core, DistributedOptimizer):
        return _gathered(core)
    whole = {}
    for parameter in trained.values():
        main, _ = _main(core, parameter)
        whole[parameter] = {name: _tensor(core, main, name) for name in _names(parameter)}
    return whole


@torch.no_grad()
def _gathered(core: DistributedOptimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Each rank steps an equal share of every bucket of parameters: put the shares together, a bucket at a time."""
    group = core.data_parallel_group
    whole: dict[nn.Parameter, dict[str, Tensor]] = {}
    for buffer, ranges_by_dtype in zip(core.buffers, core.gbuf_ranges, strict=True):
        (ranges,) = ranges_by_dtype.values()
        for bucket, share_ranges in zip(buffer.buckets, ranges, strict=True):
            for name in _names(bucket.params_list[0]):
                numel = bucket.grad_data.numel() // group.size()
                share = torch.zeros(numel, dtype=torch.float32, device=bucket.grad_data.device)
                for parameter, its_ranges in share_ranges["param_map"].items():
                    main, _ = _main(core, parameter)
                    share[its_ranges["gbuf_local"].start : its_ranges["gbuf_local"].end] = _tensor(core, main, name)
                shares = [torch.empty_like(share) for _ in range(group.size())] if group.rank() == 0 else None
                dist.gather(share, shares, group=group, group_dst=0)
                if shares is None:
                    continue
                flat = torch.cat(shares).cpu()
                for parameter in bucket.params_list:
                    first, last, _ = buffer.param_index_map[parameter]
                    value = flat[first - bucket.offset : last - bucket.offset].view(parameter.shape)
                    whole.setdefault(parameter, {})[name] = value
    return whole


def _allocate(core: MegatronOptimizer) -> None:
    """Before its first step the inner optimizer has no state."""
    if core.optimizer is not None and not core.optimizer.state:
        core.init_state_fn(core.optimizer, core.config)
        _set_step(core, 0)


def _set_step(core: MegatronOptimizer, step: int) -> None:
    for group in core.param_groups:
        if isinstance(core.optimizer, torch.optim.AdamW):
            for main in group["params"]:  # a tensor each: Adam counts in place
                core.optimizer.state[main]["step"] = torch.tensor(float(step))
        else:  # Transformer Engine's and Apex's count once for a group
            group["step"] = step
