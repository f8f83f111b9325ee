"""Documents as spans: which keys each query sees, alone and on the ranks of a context-parallel group."""

import pytest
import torch
from torch import Tensor

from looplm.megatron import context_parallel
from looplm.model.spans import Span, document_offsets, document_spans
from tests.support.documents import groups_of, starts, visible

LENGTH = 24
# One document; three; one that ends in the last position; documents of one token; a sample of these alone.
DOCUMENTS = ([24], [3, 16, 5], [23, 1], [5, 1, 1, 1, 10, 6], [1] * LENGTH)


def seen(spans_N5: Tensor | None, start_SB: Tensor, length: int) -> Tensor:
    """Return the dense mask that the spans stand for; each query must be in one span."""
    queries, samples = start_SB.shape
    mask_BST, count_BS = torch.zeros(samples, queries, length, dtype=torch.bool), torch.zeros(samples, queries)
    whole = torch.tensor([(sample, 0, length, 0, length) for sample in range(samples)])
    for span in (Span(*row) for row in (whole if spans_N5 is None else spans_N5).tolist()):
        for query in range(span.query_start, span.query_end):
            end = span.key_end - (span.query_end - 1 - query)
            mask_BST[span.sample, query, span.key_start : end] = True
            count_BS[span.sample, query] += 1
    assert bool((count_BS == 1).all())
    return mask_BST


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_spans_are_the_dense_mask_at_a_ranks_positions(ranks: int) -> None:
    whole_TB, work = starts(*DOCUMENTS), set()
    for group in groups_of(ranks):
        start_SB, position_S = context_parallel.shard(whole_TB, group), context_parallel.positions(LENGTH, group)
        spans_N5 = document_spans(start_SB, group)
        assert spans_N5 is not None and spans_N5.device.type == "cpu"
        assert torch.equal(seen(spans_N5, start_SB, LENGTH), visible(start_SB, position_S, LENGTH))
        one_document = document_spans(torch.zeros_like(start_SB), group)
        mask_BST = seen(one_document, start_SB, LENGTH)
        assert torch.equal(mask_BST, visible(torch.zeros_like(start_SB), position_S, LENGTH))
        work.add(int(mask_BST.sum()))
    assert len(work) == 1, f"causal work is uneven: {work}"


def test_the_example_of_the_docstring() -> None:
    whole_TB = starts([3, 3, 2])
    rows = [document_spans(context_parallel.shard(whole_TB, group), group) for group in groups_of(2)]
    assert [spans_N5.tolist() for spans_N5 in rows if spans_N5 is not None] == [
        [[0, 0, 2, 0, 2], [0, 2, 4, 6, 8]],
        [[0, 0, 1, 0, 3], [0, 1, 4, 3, 6]],
    ]


def test_whole_samples_need_no_spans() -> None:
    assert document_spans(torch.zeros(LENGTH, 3, dtype=torch.int64)) is None
    assert document_spans(starts([24], [23, 1])) is not None


def test_neighboring_parts_of_a_rank_are_one_span() -> None:
    """The last rank holds the two parts in the middle of the sequence."""
    spans_N5 = document_spans(torch.zeros(8, 1, dtype=torch.int64), groups_of(2)[1])
    assert spans_N5 is not None and spans_N5.tolist() == [[0, 0, 8, 0, 12]]


def test_document_offsets_run_through_all_samples() -> None:
    offsets_N = document_offsets(starts([5, 6, 13], [23, 1]))
    assert offsets_N.dtype is torch.int32 and offsets_N.tolist() == [0, 5, 11, 24, 47, 48]
    assert document_offsets(torch.zeros(4, 3, dtype=torch.int64)).tolist() == [0, 4, 8, 12]
