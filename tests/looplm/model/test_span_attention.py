"""Attention over spans compared with dense masks in double precision: values, gradients, and what is kept."""

from typing import Any

import pytest
import torch
from torch import Tensor

from looplm.megatron import context_parallel
from looplm.model import span_attention, span_attention_cuda
from looplm.model.spans import document_spans
from tests.support.documents import groups_of, starts, visible
from tests.support.observe import LargestTensor
from tests.support.parity import assert_close_relative, oracle_copy

SCALE = 0.3
# Heads, key heads, query-key width, value width.
HEADS = {"equal": (4, 4, 8, 8), "mla": (4, 4, 12, 8), "grouped": (4, 2, 8, 8), "wide values": (2, 1, 8, 16)}
# Lengths of the documents in each sample. Long ones get a call of their own, short ones share calls.
PACKED = {
    "few": ([384], [150, 234], [383, 1], [96, 96, 192]),
    "many": ([1] * 384, [3, 1, 1, 129, 128, 122], [8] * 48, [2] * 192),
}


def dense(query: Tensor, key: Tensor, value: Tensor, visible_BST: Tensor) -> Tensor:
    """Return the output [S, B, H, W] with a mask, in plain torch."""
    heads = query.size(2) // key.size(2)
    key, value = (x.repeat_interleave(heads, 2) for x in (key, value))
    score_BHST = torch.einsum("sbhk,tbhk->bhst", query, key) * SCALE
    share_BHST = score_BHST.masked_fill(~visible_BST[:, None], float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhw->sbhw", share_BHST, value)


def parts(
    heads: tuple[int, int, int, int], length: int, samples: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Return random queries, keys and values of whole samples."""
    torch.manual_seed(3)
    count, groups, width, value_width = heads
    shapes = {"query": (count, width), "key": (groups, width), "value": (groups, value_width)}
    return {name: torch.randn(length, samples, *shape).to(dtype).requires_grad_() for name, shape in shapes.items()}


def results(output: Tensor, tensors: dict[str, Tensor], mix_SBHW: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of its product with ``mix_SBHW``."""
    found = torch.autograd.grad((output * mix_SBHW.to(output.dtype)).sum(), list(tensors.values()))
    return {"output": output, **dict(zip(tensors, found, strict=True))}


def compare(attend: Any, tensors: dict[str, Tensor], whole_TB: Tensor, ranks: int = 1, tolerance: float = 2e-6) -> None:
    """Compare each context-parallel rank's share with the oracle."""
    length = len(whole_TB)
    for group in groups_of(ranks):
        start_SB, position_S = context_parallel.shard(whole_TB, group), context_parallel.positions(length, group)
        own = {**tensors, "query": context_parallel.shard(tensors["query"], group).detach().requires_grad_()}
        theirs = oracle_copy(own)
        output = attend(own["query"], own["key"], own["value"], document_spans(start_SB, group), SCALE)
        mask_BST = visible(start_SB, position_S, length)
        expected = dense(theirs["query"], theirs["key"], theirs["value"], mask_BST)
        mix_SBHW = torch.randn(output.shape)
        assert output.dtype == own["query"].dtype
        assert_close_relative(results(output, own, mix_SBHW), results(expected, theirs, mix_SBHW), tolerance)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("heads", HEADS)
def test_values_and_gradients_equal_dense_masks(heads: str, packed: str, ranks: int) -> None:
    samples = PACKED[packed]
    compare(span_attention.span_attention, parts(HEADS[heads], 384, len(samples)), starts(*samples), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("heads", HEADS)
def test_whole_samples_equal_dense_masks(heads: str, ranks: int) -> None:
    whole_TB = torch.zeros(64, 3, dtype=torch.int64)
    compare(span_attention.span_attention, parts(HEADS[heads], 64, 3), whole_TB, ranks)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packed", PACKED)
def test_bf16_stays_near_dense_masks(packed: str, ranks: int) -> None:
    samples = PACKED[packed]
    tensors = parts(HEADS["mla"], 384, len(samples), torch.bfloat16)
    compare(span_attention.span_attention, tensors, starts(*samples), ranks, tolerance=2e-2)


def test_a_view_of_a_wider_tensor_is_read_right() -> None:
    """Under context parallelism keys and values are views of one gathered tensor."""
    tensors = parts(HEADS["mla"], 96, 2)
    joined = torch.cat((tensors["key"], tensors["value"]), -1).detach()
    spans_N5 = document_spans(starts([60, 36], [5, 91]))
    key, value = joined.split([12, 8], -1)
    out, expected = (
        span_attention.span_attention(tensors["query"], k, v, spans_N5, SCALE)
        for k, v in ((key, value), (tensors["key"], tensors["value"]))
    )
    assert torch.equal(out, expected)


def test_tensors_with_samples_first_in_memory() -> None:
    samples = [[300, 84], [8] * 48]
    tensors = {
        name: x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
        for name, x in parts(HEADS["grouped"], 384, 2).items()
    }
    assert not any(x.is_contiguous() for x in tensors.values())
    compare(span_attention.span_attention, tensors, starts(*samples))
    compare(span_attention.span_attention, tensors, starts(*samples), ranks=2)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("packed", PACKED)
def test_no_tensor_is_as_large_as_a_mask(packed: str, ranks: int) -> None:
    heads, width, length = 2, 8, 384
    samples = PACKED[packed][:1]
    tensors, whole_TB = parts((heads, heads, width, width), length, 1), starts(*samples)
    for group in groups_of(ranks):
        query, start_SB = (context_parallel.shard(x, group) for x in (tensors["query"], whole_TB))
        with LargestTensor() as largest:
            spans_N5 = document_spans(start_SB, group)
            out = span_attention.span_attention(query, tensors["key"], tensors["value"], spans_N5, SCALE)
            out.sum().backward()
        assert 0 < largest.elements <= length * heads * width < length * length // ranks


def test_backward_keeps_nothing_padded() -> None:
    """Values and output are kept as wide as they are, not as wide as queries and keys."""
    tensors, kept = parts(HEADS["mla"], 384, 2), list[int]()

    def pack(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        spans_N5 = document_spans(starts([384], [150, 234]))
        out = span_attention.span_attention(tensors["query"], tensors["key"], tensors["value"], spans_N5, SCALE)
    rows_and_heads = 384 * 2 * 4
    assert sum(kept) == sum(x.numel() for x in (*tensors.values(), out)) + rows_and_heads


# ------------------------------------------------------------------------------------ a GPU's path, without its kernel


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, offset_q: Tensor, offset_k: Tensor, max_q: int, max_k: int, **keys: Any
) -> Tensor:
    """Do what torch documents of its kernel for variable lengths, in plain torch."""
    assert keys["window_size"] == (-1, 0) and keys["scale"] == SCALE
    if span_attention_cuda._ASKS_FOR_GROUPS:
        assert keys["enable_gqa"] == (query.size(1) != key.size(1))
    else:
        assert "enable_gqa" not in keys
    assert len({x.size(2) for x in (query, key, value)}) == 1 and query.size(2) % 8 == 0
    assert offset_q.dtype == offset_k.dtype == torch.int32 and offset_k[-1] == len(key)
    lengths = [offset.diff().tolist() for offset in (offset_q, offset_k)]
    assert [max(each) for each in lengths] == [max_q, max_k]
    outs = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        visible_ST = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        outs.append(dense(q[:, None], k[:, None], v[:, None], visible_ST[None])[:, 0])
    return torch.cat(outs)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("heads", HEADS)
def test_the_kernel_for_variable_lengths_gets_the_spans(
    heads: str, packed: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_attention_cuda, "varlen_attn", plain_varlen)
    samples = PACKED[packed]

    def attend(query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor | None, scale: float) -> Tensor:
        assert spans_N5 is not None
        wide = max(key.size(3), value.size(3))
        q, k, v = (torch.nn.functional.pad(x, (0, -wide % 8 + wide - x.size(3))) for x in (query, key, value))
        return span_attention_cuda._variable_lengths(q, k, v, spans_N5, scale)[..., : value.size(3)]

    compare(attend, parts(HEADS[heads], 384, len(samples)), starts(*samples), ranks)


@pytest.mark.parametrize("asks", [False, True], ids=["torch 2.11", "later"])
def test_grouped_heads_are_announced_only_where_torch_knows_the_word(
    asks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(span_attention_cuda, "varlen_attn", plain_varlen)
    monkeypatch.setattr(span_attention_cuda, "_ASKS_FOR_GROUPS", asks)
    spans_N5 = document_spans(starts([5, 3]))
    assert spans_N5 is not None
    query, key = torch.randn(8, 1, 4, 16), torch.randn(8, 1, 2, 16)
    out = span_attention_cuda._variable_lengths(query, key, key, spans_N5, SCALE)
    assert out.shape == query.shape


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("whole", [False, True], ids=["packed", "whole samples"])
@pytest.mark.parametrize("heads", HEADS)
def test_a_gpus_other_ways_equal_dense_masks(heads: str, whole: bool, ranks: int) -> None:
    """fp32 cannot use that kernel: there is one call per span, or one for whole samples."""
    samples = [[96], [96]] if whole else [[60, 36], [5, 1, 90]]
    compare(span_attention_cuda.span_attention, parts(HEADS[heads], 96, 2), starts(*samples), ranks)


def test_two_byte_numbers_on_a_recent_gpu_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(span_attention_cuda, "_variable_lengths", lambda q, *_: q)
    monkeypatch.setattr(span_attention_cuda, "_span_by_span", lambda q, *_: -q)
    spans_N5 = document_spans(starts([5, 3]))

    def takes_kernel(dtype: torch.dtype, capability: tuple[int, int], width: int = 12) -> bool:
        monkeypatch.setattr(span_attention_cuda, "compute_capability", lambda: capability)
        query = torch.ones(8, 1, 1, width, dtype=dtype)
        return bool((span_attention_cuda.span_attention(query, query, query, spans_N5, SCALE) > 0).all())

    assert takes_kernel(torch.bfloat16, (9, 0)) and takes_kernel(torch.float16, (8, 0))
    assert not takes_kernel(torch.float32, (9, 0)) and not takes_kernel(torch.bfloat16, (7, 5))
    assert not takes_kernel(torch.bfloat16, (9, 0), width=264)
    monkeypatch.setattr(span_attention_cuda, "_TAKES_SCALE", False)
    assert not takes_kernel(torch.bfloat16, (9, 0)), "torch 2.10"
