"""Context parallelism: how a sequence is dealt over the ranks that share it, and how it is put back.

The sequence is cut into 2 C parts for C ranks; rank r holds parts r and 2 C - 1 - r, an early and a late one, since under
a causal mask late positions are more work. With C = 2::

    whole   0 1 2 3         rank 0   0 3         rank 1   1 2

This is Megatron's convention: its rotary embeddings are dealt in the same way. Sequence parallelism then splits what a
rank holds over the tensor-parallel ranks, in order. ``group`` is None, or of one rank, where nothing is dealt.

Shapes: S the whole sequence, P this rank's positions of it.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

Group = dist.ProcessGroup | None


def place(group: Group) -> tuple[int, int]:
    """This rank, and C: the ranks that share a sequence."""
    return (0, 1) if group is None else (group.rank(), group.size())


def deal(whole: Tensor, group: Group, dim: int = 0) -> Tensor:
    """This rank's positions of ``whole``: [S, ...] to [P, ...] if the sequence is dimension 0.

    Raises:
        RuntimeError: S is no multiple of 2 C.
    """
    rank, ranks = place(group)
    if ranks == 1:
        return whole
    parts = whole.unflatten(dim, (2 * ranks, -1))
    return torch.cat([parts.select(dim, part) for part in _parts_of(rank, ranks)], dim)


def restore(mine: Tensor, group: Group) -> Tensor:
    """The whole sequence on every rank, in order: [P, ...] to [S, ...]. Backward sums what the ranks make of it."""
    _, ranks = place(group)
    if ranks == 1:
        return mine
    dealt = gather_from_sequence_parallel_region(mine, group=group)  # any group's first dimension, reduce-scatter back
    held = [part for rank in range(ranks) for part in _parts_of(rank, ranks)]
    parts = dict(zip(held, dealt.chunk(2 * ranks), strict=True))
    return torch.cat([parts[part] for part in range(2 * ranks)])


def positions(length: int, group: Group, device: torch.device | None = None) -> Tensor:
    """Where this rank's positions lie in a whole sequence of ``length``: [P], int64."""
    return deal(torch.arange(length, device=device), group)


def spans(mine: int, group: Group) -> list[tuple[slice, int]]:
    """This rank's ``mine`` positions as runs that are consecutive in the whole sequence, each with where it ends there:
    a causal mask lets the run see no key from that position on."""
    rank, ranks = place(group)
    if ranks == 1:
        return [(slice(0, mine), mine)]
    length = mine // 2
    early, late = _parts_of(rank, ranks)
    return [(slice(0, length), (early + 1) * length), (slice(length, mine), (late + 1) * length)]


def _parts_of(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank
