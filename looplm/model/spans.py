"""Packed documents as spans: which keys each run of queries sees.

A span is a run of queries that are consecutive positions of one document, held by this rank. They are causal at their
end: the last query sees every key from the document's start to itself, the one before it all but the last of these, and
so on. A rank of a context-parallel group holds two runs of positions (:mod:`looplm.megatron.context_parallel`), and a
border between them ends a span. With C = 2 and documents that start at 0, 3 and 6 of 8 positions::

    rank 0 holds 0 1 6 7    queries 0-1 see keys 0-1, queries 6-7 see keys 6-7
    rank 1 holds 2 3 4 5    query 2 sees keys 0-2, queries 3-5 see keys 3-5

Spans are numbers on the host, because kernels are launched from there. They need no attention mask, whose S x T numbers
would grow with the square of the sequence.

Shapes: S this rank's positions, B batch, T positions of the whole sequence, N spans.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from looplm.megatron import context_parallel


class Span(NamedTuple):
    """A run of queries and the keys that its last query sees. Ends are exclusive."""

    sample: int
    query_start: int  # position among this rank's
    query_end: int
    key_start: int  # position in the whole sequence
    key_end: int


def document_spans(document_start_SB: Tensor, group: context_parallel.Group = None) -> Tensor | None:
    """Return the spans of a batch, one row of :class:`Span` each, in order: [N, 5] on the host.

    None stands for plain causal attention: every sample is one document, and this rank holds all of it.

    Args:
        document_start_SB: position in the whole sequence at which each token's document starts, for this rank's tokens.
            If it is on a GPU, the host waits for it.
        group: the context-parallel ranks.
    """
    start_BS = document_start_SB.t().cpu()
    samples, length = start_BS.shape
    ranks = context_parallel.rank_and_size(group)[1]
    if ranks == 1 and not start_BS.any():
        return None
    position_S = context_parallel.positions(length * ranks, group)
    begins_BS = torch.ones(samples, length, dtype=torch.bool)
    begins_BS[:, 1:] = (start_BS[:, 1:] != start_BS[:, :-1]) | (position_S[1:] != position_S[:-1] + 1)
    sample_N, first_N = begins_BS.nonzero(as_tuple=True)
    row_N = sample_N * length + first_N  # in the concatenated samples
    end_N = torch.cat((row_N[1:], row_N.new_tensor([samples * length]))) - sample_N * length
    return torch.stack((sample_N, first_N, end_N, start_BS[sample_N, first_N], position_S[end_N - 1] + 1), 1)


def document_offsets(document_start_SB: Tensor) -> Tensor:
    """Return the start of every document in the concatenated samples, and their end: [documents + 1], int32.

    Args:
        document_start_SB: as in :func:`document_spans`, for whole samples.
    """
    length, samples = document_start_SB.shape
    begins_BS = document_start_SB.t() == torch.arange(length, device=document_start_SB.device)
    begins = begins_BS.flatten().nonzero().squeeze(1)
    return torch.cat((begins, begins.new_tensor([samples * length]))).int()
