"""Attention over spans on a GPU: torch's kernels, with torch's autograd. It has never run on a GPU.

Packed documents go to flash-attn's kernel for variable lengths, which is part of torch: all spans in one launch. The
kernel aligns a span's queries with the end of its keys. It takes 16-bit numbers, heads of up to 256 channels, GPUs
since Ampere, and torch since 2.11; otherwise there is one call per span.

Shapes: S queries, T keys, B batch, H heads, G key heads, K query-key width, W value width, N spans.
"""

from collections.abc import Iterator
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from looplm.megatron.device import compute_capability
from looplm.model.spans import Span

_AMPERE = (8, 0)
_WIDEST = 256
_MULTIPLE = 8  # of a head's channels
# torch 2.10 cannot be told the scale. torch 2.11 hands grouped heads to the kernel unasked, and has no argument for it.
_TAKES_SCALE = "scale" in signature(varlen_attn).parameters
_ASKS_FOR_GROUPS = "enable_gqa" in signature(varlen_attn).parameters


def span_attention(query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor | None, scale: float) -> Tensor:
    """Return the attention's output [S, B, H, W], as :func:`looplm.model.span_attention.span_attention` does."""
    # With unequal widths torch takes a kernel that materializes S x T.
    width = -(-max(key.size(3), value.size(3)) // _MULTIPLE) * _MULTIPLE
    q, k, v = (F.pad(x, (0, width - x.size(3))) if x.size(3) < width else x for x in (query, key, value))
    if spans_N5 is None:
        out = _whole_samples(q, k, v, scale)
    elif _TAKES_SCALE and q.dtype.itemsize == 2 and width <= _WIDEST and compute_capability() >= _AMPERE:
        out = _variable_lengths(q, k, v, spans_N5, scale)
    else:
        out = _span_by_span(q, k, v, spans_N5, scale)
    return out[..., : value.size(3)]


def _whole_samples(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q_BHSK, k_BGSK, v_BGSK = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    grouped = key.size(2) != query.size(2)
    out_BHSK = F.scaled_dot_product_attention(q_BHSK, k_BGSK, v_BGSK, is_causal=True, scale=scale, enable_gqa=grouped)
    return out_BHSK.permute(2, 0, 1, 3)


def _variable_lengths(query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor, scale: float) -> Tensor:
    length, samples, heads, _ = query.shape
    _, query_start_N, query_end_N, key_start_N, key_end_N = spans_N5.unbind(1)
    lengths = (query_end_N - query_start_N, key_end_N - key_start_N)
    query_offset_N, key_offset_N = (
        F.pad(one.cumsum(0), (1, 0)).int().to(query.device, non_blocking=True) for one in lengths
    )
    keys, values = (
        torch.cat([x[start:end, sample] for sample, start, end in _key_runs(spans_N5)]) for x in (key, value)
    )
    grouped: dict[str, Any] = {"enable_gqa": key.size(2) != heads} if _ASKS_FOR_GROUPS else {}
    out_NHK: Any = varlen_attn(
        query.transpose(0, 1).flatten(0, 1),
        keys,
        values,
        query_offset_N,
        key_offset_N,
        int(lengths[0].max()),
        int(lengths[1].max()),
        scale=scale,
        window_size=(-1, 0),  # causal
        **grouped,
    )
    out_BSHK: Tensor = out_NHK.unflatten(0, (samples, length))
    return out_BSHK.transpose(0, 1)


def _key_runs(spans_N5: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (sample, start, end) of the keys of all spans in order, consecutive ones in one piece."""
    rows = [Span(*row) for row in spans_N5.tolist()]
    start = rows[0].key_start
    for span, after in zip(rows, [*rows[1:], None], strict=True):
        if after is None or (after.sample, after.key_start) != (span.sample, span.key_end):
            yield span.sample, start, span.key_end
            start = 0 if after is None else after.key_start


def _span_by_span(query: Tensor, key: Tensor, value: Tensor, spans_N5: Tensor, scale: float) -> Tensor:
    length, samples, heads, _ = query.shape
    if key.size(2) != heads:  # torch's bias for unequal lengths has no kernel for grouped heads
        key, value = (x.repeat_interleave(heads // x.size(2), 2) for x in (key, value))
    outs = []
    for span in (Span(*row) for row in spans_N5.tolist()):
        q_1HLK = query[span.query_start : span.query_end, span.sample].transpose(0, 1).unsqueeze(0)
        k_1HTK, v_1HTK = (
            x[span.key_start : span.key_end, span.sample].transpose(0, 1).unsqueeze(0) for x in (key, value)
        )
        bias = causal_lower_right(q_1HLK.size(2), k_1HTK.size(2))
        out_1HLK = F.scaled_dot_product_attention(q_1HLK, k_1HTK, v_1HTK, attn_mask=bias, scale=scale)
        outs.append(out_1HLK[0].transpose(0, 1))
    out_BSHK: Tensor = torch.cat(outs).unflatten(0, (samples, length))
    return out_BSHK.transpose(0, 1)
