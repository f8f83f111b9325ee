"""Dynamics of the loops of a model in training, beside its losses: where they look, and whether the state settles."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.evaluation.attention_sink import attention_sink
from looplm.evaluation.spectral_radius import spectral_radius
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM


@dataclass(frozen=True)
class LoopDynamics:
    """Means over samples, with one entry per loop.

    ``attention_sink`` is the weight of attention on a sample's first token. ``loop_radius`` is the spectral radius of
    the loop's Jacobian, and NaN for the first loop: below 1, the state settles.
    """

    attention_sink: list[float]
    loop_radius: list[float]


def loop_dynamics(model: LoopLM, ids_BS: Tensor, group: dist.ProcessGroup) -> LoopDynamics:
    """Measure the loops on each rank's samples, and return the mean over the ranks. Collective.

    Args:
        model: in eval mode, on the local backend, whole on each rank.
        ids_BS: samples, each read as one document; as many on every rank.
        group: the data-parallel ranks.
    """
    loops = model.model_config.num_loops
    found = *attention_sink(model, ids_BS, loops), *spectral_radius(model, ids_BS, loops)
    sums = torch.tensor(found, device=DEVICE)
    dist.all_reduce(sums, group=group)
    means = (sums / group.size()).tolist()
    return LoopDynamics(attention_sink=means[:loops], loop_radius=[math.nan, *means[loops:]])
