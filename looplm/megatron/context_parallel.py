"""Context parallelism: how the ranks of a group share a sequence.

The sequence is cut into 2 C parts for C ranks; rank r holds parts r and 2 C - 1 - r, an early and a late one, because
under a causal mask late positions are more work. With C = 2::

    whole   0 1 2 3         rank 0   0 3         rank 1   1 2

This is Megatron's convention: it shards rotary embeddings in the same way. Sequence parallelism then splits a rank's
positions over the tensor-parallel ranks, in order. Without context parallelism ``group`` is None or has one rank.

Shapes: S the whole sequence, P this rank's positions of it.
"""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

Group = dist.ProcessGroup | None


def rank_and_size(group: Group) -> tuple[int, int]:
    """Return this rank and C, the number of ranks that share a sequence."""
    return (0, 1) if group is None else (group.rank(), group.size())


def shard(whole: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Return this rank's positions of ``whole``: [S, ...] to [P, ...] if the sequence is dimension 0.

    Raises:
        RuntimeError: S is not a multiple of 2 C.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return whole
    parts = whole.unflatten(dim, (2 * size, -1))
    return torch.cat([parts.select(dim, part) for part in _parts_of(rank, size)], dim)


def gather(own: Tensor, group: Group) -> Tensor:
    """Return the whole sequence in order on every rank, [P, ...] to [S, ...]; backward sums the ranks' gradients."""
    _, size = rank_and_size(group)
    if size == 1:
        return own
    # Despite its name it gathers the first dimension over any group; its backward is a reduce-scatter.
    sharded = gather_from_sequence_parallel_region(own, group=group)
    order = [part for rank in range(size) for part in _parts_of(rank, size)]
    parts = dict(zip(order, sharded.chunk(2 * size), strict=True))
    return torch.cat([parts[part] for part in range(2 * size)])


def positions(length: int, group: Group, device: torch.device | None = None) -> Tensor:
    """Return the indices of this rank's positions in a whole sequence of ``length``: [P], int64."""
    return shard(torch.arange(length, device=device), group)


def _parts_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank
