"""Attention over spans on a CPU: torch's flash kernel, one call per span, forward and backward.

A span whose queries begin inside its document sees earlier keys without a mask, and its own positions causally. The two
parts are computed apart and joined by the log-sum-exp of their scores (Milakov and Gimelshein 2018, arXiv 1805.02867).
Backward gives the kernel the joined output and log-sum-exp, which makes each part's gradients exact (Liu et al. 2023,
arXiv 2310.01889).

Torch's own autograd would keep the values padded to the queries' width, and an output as wide. Here padding lasts for
one call. Backward keeps query, key, value, the output (which the next projection keeps anyway), and one number per
query and head.

Shapes: S queries, T keys, B batch, H heads, G key heads, K query-key width, W value width. One kernel call computes C
equal spans of L queries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.model.spans import Span

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_KERNEL_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Up to this length, equal documents share a call, because a call costs more than such a document. In bf16 the kernel's
# backward is up to ten times slower than in fp32 there, so it runs in fp32.
_SHORT = 128

_Index = tuple[slice, slice] | Tensor  # positions and samples, or rows [C, L] of the S x B that both make
_ALL = (slice(None), slice(None))


class _Call(NamedTuple):
    """Places of the queries and keys of one kernel call."""

    queries: _Index
    keys: _Index


def span_attention(query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor | None, scale: float) -> Tensor:
    """Return the attention's output [S, B, H, W].

    Args:
        query: [S, B, H, K].
        key: [T, B, G, K].
        value: [T, B, G, W].
        spans_N5: from :func:`looplm.model.spans.document_spans`; every query is in one of them. None if all samples are
            whole documents, with S = T.
        scale: of the scores.
    """
    out: Tensor = _SpanAttention.apply(query, key, value, spans_N5, scale)  # type: ignore[no-untyped-call]  # torch's
    return out


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor | None, scale: float) -> Tensor:
        width, fp32 = max(key.size(3), value.size(3)), torch.promote_types(query.dtype, torch.float32)
        calls = [_Call(_ALL, _ALL)] if spans_N5 is None else _calls(spans_N5, query.size(1))
        outs, sums = list[Tensor](), list[Tensor]()
        for queries, keys in calls:
            q, k, v = _take(query, queries, width), _take(key, keys, width), _take(value, keys, width)
            out, lse = _forward(q, k, v, scale)
            outs.append(out)
            sums.append(lse.unsqueeze(3))
        places, sizes = [call.queries for call in calls], query.shape[:3]
        out_SBHW = _assemble(places, outs, query.new_empty(*sizes, value.size(3))).contiguous()
        lse_SBH1 = _assemble(places, sums, query.new_empty(*sizes, 1, dtype=fp32))
        ctx.save_for_backward(query, key, value, out_SBHW, lse_SBH1)
        ctx.calls, ctx.scale = calls, scale
        return out_SBHW

    @staticmethod
    def backward(ctx: Any, grad_SBHW: Tensor) -> Any:
        query, key, value, out_SBHW, lse_SBH1 = ctx.saved_tensors
        width, fp32, calls = max(key.size(3), value.size(3)), lse_SBH1.dtype, ctx.calls
        found = list[tuple[Tensor, Tensor, Tensor]]()
        for queries, keys in calls:
            q, out, grad = (_take(x, queries, width) for x in (query, out_SBHW, grad_SBHW))
            k, v, lse = _take(key, keys, width), _take(value, keys, width), _take(lse_SBH1, queries, 1).squeeze(3)
            if q.size(2) <= _SHORT:
                q, out, grad, k, v = (x.to(fp32) for x in (q, out, grad, k, v))
            found.append(_backward(grad, q, k, v, out, lse, ctx.scale))
        grad_q, grad_k, grad_v = zip(*found, strict=True)
        places, shared = [call.keys for call in calls], key.size(0) != query.size(0)  # by context parallelism
        return (
            _assemble([call.queries for call in calls], grad_q, query),
            _assemble(places, grad_k, key, shared),
            _assemble(places, grad_v, value, shared),
            None,
            None,
        )


def _calls(spans_N5: Tensor, samples: int) -> list[_Call]:
    """Return the kernel calls for all spans of a batch."""
    sample_N, query_start_N, query_end_N, key_start_N, key_end_N = spans_N5.unbind(1)
    length_N = query_end_N - query_start_N
    short_N = (length_N <= _SHORT) & (length_N == key_end_N - key_start_N)
    calls = list[_Call]()
    for span in (Span(*row) for row in spans_N5[~short_N].tolist()):
        sample = slice(span.sample, span.sample + 1)
        places = slice(span.query_start, span.query_end), slice(span.key_start, span.key_end)
        calls.append(_Call(*((positions, sample) for positions in places)))
    for length in length_N[short_N].unique().tolist():
        equal_N, offset_L = short_N & (length_N == length), samples * torch.arange(length)
        first_N = (samples * start_N + sample_N for start_N in (query_start_N, key_start_N))
        calls.append(_Call(*(row_N[equal_N].unsqueeze(1) + offset_L for row_N in first_N)))
    return calls


def _take(x_SBHK: Tensor, index: _Index, width: int) -> Tensor:
    """Return the indexed rows, padded with zeros: [C, H, L, width]."""
    if isinstance(index, Tensor):
        rows_CLHK = x_SBHK.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
    else:
        rows_CLHK = x_SBHK[index].transpose(0, 1)
    rows_CHLK, missing = rows_CLHK.transpose(1, 2), width - x_SBHK.size(3)
    return F.pad(rows_CHLK, (0, missing)) if missing > 0 else rows_CHLK  # the kernel takes a single width


def _assemble(places: Sequence[_Index], parts: Sequence[Tensor], like: Tensor, shared: bool = False) -> Tensor:
    """Return the calls' rows [C, H, L, K], without their padding, as one tensor of ``like``'s shape and dtype.

    With ``shared``, rows of several calls are added, and rows of no call are zero.
    """
    parts = [part[..., : like.size(3)].transpose(1, 2) for part in parts]
    if places[0] is _ALL:
        return parts[0].transpose(0, 1).to(like.dtype)
    make = torch.zeros_like if shared else torch.empty_like
    x_SBHK = make(like, memory_format=torch.contiguous_format)
    rows_NHK = x_SBHK.view(-1, *like.shape[2:])
    for index, rows_CLHK in zip(places, parts, strict=True):
        if isinstance(index, Tensor):
            write = rows_NHK.index_add_ if shared else rows_NHK.index_copy_
            write(0, index.flatten(), rows_CLHK.flatten(0, 1).to(like.dtype))
        elif shared:
            x_SBHK[index] += rows_CLHK.transpose(0, 1)
        else:
            x_SBHK[index] = rows_CLHK.transpose(0, 1)
    return x_SBHK


def _forward(q_CHLK: Tensor, k_CGTK: Tensor, v_CGTK: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp [C, H, L] of queries at the last L of the T keys' positions."""
    before = k_CGTK.size(2) - q_CHLK.size(2)
    out, lse = _KERNEL(q_CHLK, k_CGTK[:, :, before:], v_CGTK[:, :, before:], 0.0, True, scale=scale)
    if not before:
        return out, lse
    earlier, earlier_lse = _KERNEL(q_CHLK, k_CGTK[:, :, :before], v_CGTK[:, :, :before], 0.0, False, scale=scale)
    joined = torch.logaddexp(lse, earlier_lse)
    return (lse - joined).exp().unsqueeze(3) * out + (earlier_lse - joined).exp().unsqueeze(3) * earlier, joined


def _backward(
    grad: Tensor, q_CHLK: Tensor, k_CGTK: Tensor, v_CGTK: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    before = k_CGTK.size(2) - q_CHLK.size(2)
    parts = [(slice(before, None), True)] + ([(slice(0, before), False)] if before else [])
    grads = [
        _KERNEL_BACKWARD(grad, q_CHLK, k_CGTK[:, :, keys], v_CGTK[:, :, keys], out, lse, 0.0, causal, scale=scale)
        for keys, causal in parts
    ]
    if not before:
        own: tuple[Tensor, Tensor, Tensor] = grads[0]
        return own
    (q, k, v), (earlier_q, earlier_k, earlier_v) = grads
    return q + earlier_q, torch.cat((earlier_k, k), 2), torch.cat((earlier_v, v), 2)
