"""Dynamics of the loops of a model in training, beside its losses: where they look, and whether the state settles."""

import math
from collections.abc import Sequence
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
    sink = mean_over_ranks(attention_sink(model, ids_BS, loops), group)
    radius = mean_over_ranks(spectral_radius(model, ids_BS, loops), group)
    return LoopDynamics(attention_sink=list(sink), loop_radius=[math.nan, *radius])


def mean_over_ranks(values: Sequence[float], group: dist.ProcessGroup) -> tuple[float, ...]:
    """Return the mean of each value over the ranks of a group, which all call this."""
    sums = torch.tensor(values, dtype=torch.float64, device=DEVICE)
    dist.all_reduce(sums, group=group)
    return tuple((sums / group.size()).tolist())
