"""Packed documents, their dense mask, and context-parallel groups without processes, for tests."""

import torch
import torch.distributed as dist
from torch import Tensor


def groups_of(ranks: int) -> list[dist.ProcessGroup]:
    """Return a process group as each of its ranks sees it. It cannot communicate."""
    return [dist.ProcessGroup(dist.HashStore(), rank, ranks) for rank in range(ranks)]


def starts(*lengths_of_samples: list[int]) -> Tensor:
    """Return the first position of each token's document [T, B], for samples of documents of these lengths."""
    columns = []
    for lengths in lengths_of_samples:
        first_N = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        columns.append(first_N.repeat_interleave(torch.tensor(lengths)))
    return torch.stack(columns, 1)


def visible(start_SB: Tensor, position_S: Tensor, length: int) -> Tensor:
    """Return the dense mask [B, S, T] of queries at ``position_S``: causal, and inside documents."""
    key_T = torch.arange(length)
    return (key_T <= position_S[:, None]) & (key_T >= start_SB.t()[:, :, None])
