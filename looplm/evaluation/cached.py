"""Loss through the decode path: what sharing a cache between the loops, and leaving them early, really costs.

A text's first tokens are read as a prompt, in which nothing is shared; the rest is decoded token by token, each text's
own next token handed in. Only tokens that were decoded count. ``per_loop`` at threshold 1 is the cacheless model's loss.

Shapes: B samples, S sequence, N rows side by side, V vocabulary.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.lockstep import Decoder
from looplm.megatron import process_groups
from looplm.model import LoopLM


class Text(NamedTuple):
    """Token ids, what follows each of them, and whether that counts."""

    ids: list[int]
    labels: list[int]
    counts: list[bool]


class Decoded(NamedTuple):
    """Sums over the tokens that were decoded and count."""

    tokens: float
    loss: float
    depth: float


def texts_of(ids_BS: Tensor, labels_SB: Tensor, mask_SB: Tensor, document_start_SB: Tensor | None) -> list[Text]:
    """Samples as texts; where documents in a sample do not see each other, each document's part is a text of its own."""
    texts = []
    for sample in range(len(ids_BS)):
        ids, labels = ids_BS[sample].tolist(), labels_SB[:, sample].tolist()
        counts = mask_SB[:, sample].bool().tolist()
        starts = [0] if document_start_SB is None else document_start_SB[:, sample].unique().tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            texts.append(Text(ids[start:end], labels[start:end], counts[start:end]))
    return texts


def decode_texts(
    model: LoopLM, texts: Iterable[Text], prompt: int, rows: int, mode: CacheMode, rule: ExitRule
) -> Decoded:
    """Decode all texts that are longer than the prompt.

    Args:
        model: in eval mode.
        texts: in any order.
        prompt: tokens of each that are read at once.
        rows: texts side by side.
        mode: what the cache keeps.
        rule: when tokens leave the loops.
    """
    longer = sorted((text for text in texts if len(text.ids) > prompt), key=lambda text: -len(text.ids))
    groups = [longer[start : start + rows] for start in range(0, len(longer), rows)]
    sums = [_decode_group(model, group, prompt, mode, rule) for group in groups]
    return Decoded(*(sum(part) for part in zip(*sums, strict=True))) if sums else Decoded(0.0, 0.0, 0.0)


def _decode_group(model: LoopLM, group: Sequence[Text], prompt: int, mode: CacheMode, rule: ExitRule) -> Decoded:
    """Texts side by side, the longest first: those that end are the last rows."""
    decoder = Decoder(model, rule, mode, len(group))
    decoder.prefill([text.ids[:prompt] for text in group])
    tokens = loss = depth = 0.0
    for place in range(prompt, len(group[0].ids)):
        going = [text for text in group if place < len(text.ids)]
        step = decoder.decode([text.ids[place] for text in going], range(len(going)))
        labels_N = torch.tensor([text.labels[place] for text in going], device=step.logits_NV.device)
        counts_N = torch.tensor([text.counts[place] for text in going], device=step.logits_NV.device)
        loss += float(F.cross_entropy(step.logits_NV[counts_N], labels_N[counts_N], reduction="sum"))
        tokens += int(counts_N.sum())
        depth += sum(d for d, text in zip(step.depths, going, strict=True) if text.counts[place])
    return Decoded(tokens, loss, depth)


def decoding_report(
    model: LoopLM,
    texts: Sequence[Text],
    prompt: int,
    rows: int,
    modes: Sequence[CacheMode],
    rules: Sequence[ExitRule],
    group: dist.ProcessGroup,
) -> list[dict[str, Any]]:
    """Each cache under each rule: means over the tokens of every rank of ``group``, as evaluation.json holds them."""
    report, hidden = [], not (process_groups.is_rank_0() and sys.stderr.isatty())
    for mode, rule in tqdm(list(product(modes, rules)), desc="decoding", unit="setting", disable=hidden):
        sums = torch.tensor(decode_texts(model, texts, prompt, rows, mode, rule), dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        tokens, loss, depth = sums.tolist()
        loss, depth = loss / max(1, tokens), depth / max(1, tokens)
        report.append(
            {
                "kv_cache": mode,
                "exit_signal": rule.signal,
                "exit_threshold": rule.threshold,
                "tokens": int(tokens),
                "loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "mean_depth": depth,
            }
        )
    return report
