"""The optimizer's state in one form for every parallel layout and each of Megatron's optimizers.

For each parameter: Adam's two moments, plus an fp32 main weight if the model's own is narrower, as sharded tensors of
the parameter's shape. Nothing else is stored: rates and betas are configuration, and all parameters have made the same
number of steps.

Each of Megatron's three optimizers has a format of its own, so a checkpoint of one does not load into another. The
formats of the distributed optimizer also have bugs. Without Transformer Engine or Apex a fresh optimizer cannot load,
and a loaded one has a single step counter that every parameter advances. Its resharding format reads each gradient
bucket but the first at a wrong offset. Therefore this module reads and writes the tensors themselves.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor, nn

from looplm.checkpoint.memory import own_storage

MAIN = "fp32_param"
MOMENTS = ("exp_avg", "exp_avg_sq")
GROUP_BYTES = 1 << 30  # of the state that a rank reads at a time

State = dict[str, dict[str, Tensor]]  # parameter name → state name → tensor


def sharded_state(optimizer: MegatronOptimizer, model: nn.Module, weights: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the state as sharded tensors, to save. Collective.

    Args:
        optimizer: from :func:`pretrain.optim.build_optimizer`.
        model: the model whose parameters it updates.
        weights: the model's sharded state dict.

    Returns:
        Sharded tensors by parameter name and state name. Of a distributed optimizer, the first data-parallel rank
        returns all of them and the other ranks return none.
    """
    trained = _trained(model)
    if not trained:
        return {}
    sharded, values = _sharded_parameters(weights, trained), _whole_state(_unchained(optimizer), trained)
    return {
        parameter_name: {
            name: make_sharded_optimizer_tensor(sharded[parameter_name], value, f"optimizer.state.{name}")
            for name, value in values[parameter].items()
        }
        for parameter_name, parameter in trained.items()
        if parameter in values
    }


def load(
    optimizer: MegatronOptimizer,
    model: nn.Module,
    weights: dict[str, Any],
    read: Callable[[dict[str, dict[str, Any]]], State],
    step: int,
) -> None:
    """Read a stored state in groups of tensors; copy each into the optimizer and free it. Collective.

    All at once would take 12 bytes of host memory for each parameter on every rank, although a rank of a distributed
    optimizer keeps a share of them only.

    Args:
        optimizer: of any of Megatron's kinds, in any parallel layout.
        model: the model whose parameters it updates.
        weights: the model's sharded state dict.
        read: fills sharded tensors by parameter name and state name, and returns what it has read. All ranks call it
            for the same stored tensors; for a rank that holds no part of them, its argument is empty.
        step: number of optimizer steps done, for Adam's bias correction.
    """
    core, trained = _unchained(optimizer), _trained(model)
    _allocate(core)
    sharded = _sharded_parameters(weights, trained)
    for group in _groups(sharded, trained):
        _copy(core, trained, read(_empty(group, sharded, trained)))
    _set_step(core, step)


def plain_state(optimizer: MegatronOptimizer, model: nn.Module) -> State:
    """Return the state as plain tensors, in the form that :func:`load_state` takes. For a single process."""
    trained = _trained(model)
    whole = _whole_state(_unchained(optimizer), trained)
    return {name: whole[parameter] for name, parameter in trained.items()}


def own_state(optimizer: MegatronOptimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that this rank updates, by name; without moments before the first step."""
    core, found = _unchained(optimizer), dict[str, Tensor]()
    for parameter_name, parameter in _trained(model).items():
        if isinstance(core, DistributedOptimizer) and parameter not in core.model_param_group_index_map:
            continue  # other ranks update it
        main, _ = _main(core, parameter)
        state = {MAIN: main} if parameter.dtype is not torch.float32 else {}
        state |= {name: core.optimizer.state[main][name] for name in MOMENTS if main in core.optimizer.state}
        found |= {f"{name} of {parameter_name}": tensor for name, tensor in state.items()}
    return found


def load_state(optimizer: MegatronOptimizer, model: nn.Module, state: State, step: int) -> None:
    """Copy the state of a single process into the optimizer.

    Args:
        optimizer: of any of Megatron's kinds, in any parallel layout.
        model: the model whose parameters it updates.
        state: whole tensors of every trained parameter.
        step: number of optimizer steps done, for Adam's bias correction.
    """
    core, trained = _unchained(optimizer), _trained(model)
    _allocate(core)
    _copy(core, trained, {name: state[name] for name in trained})
    _set_step(core, step)


def _unchained(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Return the optimizer that Megatron wraps in a chain of one."""
    if isinstance(optimizer, ChainedOptimizer):
        (optimizer,) = optimizer.chained_optimizers
    return optimizer


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _sharded_parameters(weights: dict[str, Any], trained: dict[str, nn.Parameter]) -> dict[str, Any]:
    """Return the sharded tensors of the trained parameters, by name."""
    if not trained:  # a pipeline rank without the gate, in the gate's training stage
        return {}
    found = get_param_id_to_sharded_param_map(weights, trained.values())
    return {name: found[index] for index, name in enumerate(trained)}


def _groups(sharded: dict[str, Any], trained: dict[str, nn.Parameter]) -> Iterator[set[tuple[str, str]]]:
    """Yield groups of at most :data:`GROUP_BYTES` on any rank; a larger tensor is alone. Collective.

    A group holds pairs of a state's name and a key. Megatron stores the parameters of all layers as one tensor with one
    key, and torch reads such a tensor only if a rank asks for all that it holds of it.
    """
    own = Counter[tuple[str, str]]()
    for parameter_name, parameter in trained.items():
        for name in _state_names(parameter):
            own[name, sharded[parameter_name].key] += 4 * parameter.numel()
    everyone = [own] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    group, size = set[tuple[str, str]](), 0
    for pair, its_size in reduce(or_, everyone).items():  # the largest of each
        if group and size + its_size > GROUP_BYTES:
            yield group
            group, size = set(), 0
        group, size = {*group, pair}, size + its_size
    yield group


def _empty(
    group: set[tuple[str, str]], sharded: dict[str, Any], trained: dict[str, nn.Parameter]
) -> dict[str, dict[str, Any]]:
    """Return sharded tensors to read a group into, by parameter name and state name."""
    found: dict[str, dict[str, Any]] = {}
    for parameter_name, parameter in trained.items():
        for name in _state_names(parameter):
            if (name, sharded[parameter_name].key) in group:
                value = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                tensor = make_sharded_optimizer_tensor(sharded[parameter_name], value, f"optimizer.state.{name}")
                found.setdefault(parameter_name, {})[name] = tensor
    return found


@torch.no_grad()
def _copy(core: MegatronOptimizer, trained: dict[str, nn.Parameter], state: State) -> None:
    """Copy whole tensors into the optimizer, or this rank's part of them."""
    for parameter_name, values in state.items():
        parameter = trained[parameter_name]
        if isinstance(core, DistributedOptimizer) and parameter not in core.model_param_group_index_map:
            continue  # other ranks update it
        main, first = _main(core, parameter)
        for name, value in values.items():
            part = value.flatten()[first : first + main.numel()]
            _state_tensor(core, main, name).copy_(part.view(main.shape))


def _state_names(parameter: nn.Parameter) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype is torch.float32 else (*MOMENTS, MAIN)


def _main(core: MegatronOptimizer, parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Return the part of a parameter that this rank updates, and its offset in the flattened parameter."""
    if not isinstance(core, DistributedOptimizer):
        return getattr(parameter, "main_param", parameter), 0
    group, index = core.model_param_group_index_map[parameter]
    span = core._get_model_param_range_map(parameter)["param"]
    return core.optimizer.param_groups[group]["params"][index], span.start


def _state_tensor(core: MegatronOptimizer, main: Tensor, name: str) -> Tensor:
    return main if name == MAIN else core.optimizer.state[main][name]


def _whole_state(core: MegatronOptimizer, trained: dict[str, nn.Parameter]) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Return the state in the parameters' shapes; of a distributed optimizer, on the first data-parallel rank only."""
    _allocate(core)
    if isinstance(core, DistributedOptimizer):
        return _gather(core)
    return {
        parameter: {name: _state_tensor(core, _main(core, parameter)[0], name) for name in _state_names(parameter)}
        for parameter in trained.values()
    }


@torch.no_grad()
def _gather(core: DistributedOptimizer) -> dict[nn.Parameter, dict[str, Tensor]]:
    """Gather the equal shares of every bucket that the data-parallel ranks update, one bucket at a time."""
    group = core.data_parallel_group
    whole: dict[nn.Parameter, dict[str, Tensor]] = {}
    for buffer, ranges_by_dtype in zip(core.buffers, core.gbuf_ranges, strict=True):
        (ranges,) = ranges_by_dtype.values()
        for bucket, share_ranges in zip(buffer.buckets, ranges, strict=True):
            for name in _state_names(bucket.params_list[0]):
                numel = bucket.grad_data.numel() // group.size()
                share = torch.zeros(numel, dtype=torch.float32, device=bucket.grad_data.device)
                for parameter, its_ranges in share_ranges["param_map"].items():
                    span = its_ranges["gbuf_local"]
                    share[span.start : span.end] = _state_tensor(core, _main(core, parameter)[0], name)
                shares = [torch.empty_like(share) for _ in range(group.size())] if group.rank() == 0 else None
                dist.gather(share, shares, group=group, group_dst=0)
                if shares is None:
                    continue
                flat = torch.cat(shares).cpu()
                for parameter in bucket.params_list:
                    first, last, _ = buffer.param_index_map[parameter]
                    value = own_storage(flat[first - bucket.offset : last - bucket.offset].view(parameter.shape))
                    whole.setdefault(parameter, {})[name] = value
    return whole


def _allocate(core: MegatronOptimizer) -> None:
    """Create the inner optimizer's state if it has not made its first step."""
    if core.optimizer is not None and not core.optimizer.state:
        core.init_state_fn(core.optimizer, core.config)
        _set_step(core, 0)


def _set_step(core: MegatronOptimizer, step: int) -> None:
    for group in core.param_groups:
        if isinstance(core.optimizer, torch.optim.AdamW):
            for main in group["params"]:  # one tensor each, as Adam counts in place; beside it, as it is fused
                core.optimizer.state[main]["step"] = torch.tensor(float(step), device=main.device)
        else:  # Transformer Engine's and Apex's Adam keep one counter for a group
            group["step"] = step
