"""Ranks of a layout that can differ from each other: the first and last of every kind of parallelism."""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from looplm.config import ParallelConfig
from looplm.failures import UserError


class Role(NamedTuple):
    """A rank and its places in the layout, each counted from 0."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int

    def __str__(self) -> str:
        places = f"pipeline {self.pipeline}, data {self.data}, context {self.context}, tensor {self.tensor}"
        return f"rank {self.rank} ({places})"


def role_of(rank: int, layout: ParallelConfig, ranks: int) -> Role:
    """Return a rank's places: Megatron numbers tensor-parallel ranks first, then context, data and pipeline."""
    rest, tensor = divmod(rank, layout.tensor)
    rest, context = divmod(rest, layout.context)
    pipeline, data = divmod(rest, layout.replicas(ranks))
    return Role(rank, tensor, context, data, pipeline)


def distinct_roles(layout: ParallelConfig, ranks: int) -> list[Role]:
    """Return every pipeline rank's first and last tensor-, context- and data-parallel members, by rank.

    The members between them run the same code on the same shapes. Each role's neighbors in the pipeline are roles too.
    """
    data = layout.replicas(ranks)
    ends = [sorted({0, size - 1}) for size in (data, layout.context, layout.tensor)]
    numbers = [
        tensor + layout.tensor * (context + layout.context * (replica + data * pipeline))
        for pipeline, replica, context, tensor in product(range(layout.pipeline), *ends)
    ]
    return [role_of(rank, layout, ranks) for rank in sorted(numbers)]


def chosen_roles(wanted: str, layout: ParallelConfig, ranks: int) -> list[Role]:
    """Return the roles that ``--rank`` names: ``all`` distinct ones, or ranks separated by commas.

    Raises:
        UserError: there is no such rank.
    """
    if wanted == "all":
        return distinct_roles(layout, ranks)
    return [role_of(rank, layout, ranks) for rank in _numbers(wanted, ranks)]


def _numbers(wanted: str, ranks: int) -> Iterator[int]:
    for word in wanted.split(","):
        if not word.strip().isdecimal() or int(word) >= ranks:
            raise UserError(f"rank: {word.strip() or wanted!r} is not allowed; give all, or numbers below gpus={ranks}")
        yield int(word)
