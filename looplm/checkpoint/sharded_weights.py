"""A model's weights as Megatron's sharded tensors, without the second copy that Megatron makes of a fused matrix.

Megatron stores the two halves of a gated feed-forward layer's first matrix apart. On its way to the disk it copies both,
of every layer, because a half is a view; on the way back it joins them into a new matrix, although they were read into
the old one. That is 0.4 of a model in the shape of Ouro's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor

from looplm.model import LoopLM


def sharded_weights(model: LoopLM) -> dict[str, Any]:
    """``model.sharded_state_dict()`` for weights alone; an optimizer's state needs Megatron's own."""
    state = model.sharded_state_dict()
    for factory in state.values():
        if isinstance(factory, ShardedTensorFactory):
            factory.build_fn = partial(_build, factory.build_fn)
            factory.merge_fn = partial(_merge, factory.data, factory.merge_fn)
    return state


def _build(build: Callable[..., Any], *args: Any) -> Any:
    parts = build(*args)
    for part in parts:
        part.data = _alone(part.data)
    return parts


def _alone(part: Tensor) -> Tensor:
    """The same memory, as a tensor whose storage ends where it ends: Megatron then sees no view to copy."""
    if part.device.type != "cpu":
        return part
    return torch.from_numpy(part.detach().view(torch.uint8).numpy()).view(part.dtype)


def _merge(whole: Tensor, merge: Callable[[Any], Tensor], parts: list[Tensor]) -> Tensor:
    """The matrix itself where its halves were filled in place."""
    place = whole.data_ptr()
    for part in parts:
        if part.data_ptr() != place:
            return merge(parts)
        place += part.nbytes
    return whole
