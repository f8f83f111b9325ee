"""Loss through the decode path: what it costs to share a cache between the loops, and to exit them early.

The first tokens of a text are read as a prompt, in which no loops share a cache. The others are decoded one by one,
each step given the text's own next token. Only decoded tokens count. With ``per_loop`` at threshold 1, the loss is the
cacheless model's.

Shapes: B samples, S sequence, N rows side by side.
"""

import sys
from collections.abc import Iterable, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from looplm.evaluation.record import CacheLoss, perplexity
from looplm.inference.depth_batch import DepthBatch, ExitedTokens
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.prefill import Prefill
from looplm.inference.sampling import NextLogits
from looplm.inference.stack import LoopedStack
from looplm.megatron import process_groups
from looplm.model import LoopLM


class Text(NamedTuple):
    """Token ids, the label of each, and whether it counts."""

    ids: list[int]
    labels: list[int]
    counts: list[bool]


class LossSums(NamedTuple):
    """Sums over the decoded tokens that count."""

    tokens: float
    loss: float
    depth: float
    right: float


class LockstepDecoder:
    """Decodes given tokens, one at a time in each row; rows wait for each other.

    With a ``per_loop`` cache all loops run, and logits are read at the exit loop. With a shared cache, tokens that exit
    take part in no further loop.

    Args:
        model: in eval mode.
        rule: when tokens exit.
        mode: of the cache.
        prompts: one per row, read at once.
        piece: the most prompt tokens that run through the stack at once.

    Attributes:
        prompt_logits: for the token after each prompt.
    """

    @torch.inference_mode()
    def __init__(
        self, model: LoopLM, rule: ExitRule, mode: CacheMode, prompts: Sequence[Sequence[int]], piece: int = 1 << 30
    ) -> None:
        stack = LoopedStack(model)
        self._batch = DepthBatch(stack, rule, mode, len(prompts))
        prefill = Prefill(stack, rule, mode, prompts, piece)
        while not prefill.done:
            prefill.advance()
        for row in range(len(prompts)):
            self._batch.seat(row, prefill, row)
        self.prompt_logits = prefill.next_logits()

    @torch.inference_mode()
    def decode(self, ids: Sequence[int]) -> NextLogits:
        """Decode one more token in each of the first ``len(ids)`` rows, and return the logits after it."""
        self._batch.append(range(len(ids)), ids)
        passes: list[ExitedTokens] = []
        while sum(len(exited.rows) for exited in passes) < len(ids):
            passes.append(self._batch.advance())
        return self._batch.read(passes)


def texts_of(ids_BS: Tensor, labels_SB: Tensor, mask_SB: Tensor, document_start_SB: Tensor | None) -> list[Text]:
    """Return the samples as texts, one per document if the documents of a sample do not see each other."""
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
) -> LossSums:
    """Decode all texts that are longer than the prompt.

    Args:
        model: in eval mode.
        texts: in any order.
        prompt: tokens of each text that are read as a prompt.
        rows: texts side by side.
        mode: of the cache.
        rule: when tokens exit.
    """
    longer = sorted((text for text in texts if len(text.ids) > prompt), key=lambda text: -len(text.ids))
    groups = [longer[start : start + rows] for start in range(0, len(longer), rows)]
    sums = [_decode_group(model, group, prompt, mode, rule) for group in groups]
    return LossSums(*(sum(part) for part in zip(*sums, strict=True))) if sums else LossSums(0.0, 0.0, 0.0, 0.0)


def _decode_group(model: LoopLM, group: Sequence[Text], prompt: int, mode: CacheMode, rule: ExitRule) -> LossSums:
    """Decode texts side by side, the longest in the first row, so that those that end are in the last rows."""
    decoder = LockstepDecoder(model, rule, mode, [text.ids[:prompt] for text in group])
    tokens = loss = depth = right = 0.0
    for place in range(prompt, len(group[0].ids)):
        longer = [text for text in group if place < len(text.ids)]
        _, logits_NV, depths = decoder.decode([text.ids[place] for text in longer])
        labels_N = torch.tensor([text.labels[place] for text in longer], device=logits_NV.device)
        counts_N = torch.tensor([text.counts[place] for text in longer], device=logits_NV.device)
        loss += float(F.cross_entropy(logits_NV[counts_N], labels_N[counts_N], reduction="sum"))
        right += int((logits_NV.argmax(-1) == labels_N)[counts_N].sum())
        tokens += int(counts_N.sum())
        depth += sum(d for d, text in zip(depths, longer, strict=True) if text.counts[place])
    return LossSums(tokens, loss, depth, right)


def cache_losses(
    model: LoopLM,
    texts: Sequence[Text],
    prompt: int,
    rows: int,
    modes: Sequence[CacheMode],
    rules: Sequence[ExitRule],
    group: dist.ProcessGroup,
) -> tuple[CacheLoss, ...]:
    """Return the losses through each cache under each rule, as means over the tokens of every rank of ``group``."""
    losses, hidden = [], not (process_groups.is_rank_0() and sys.stderr.isatty())
    for mode, rule in tqdm(list(product(modes, rules)), desc="decoding", unit="setting", disable=hidden):
        sums = torch.tensor(decode_texts(model, texts, prompt, rows, mode, rule), dtype=torch.float64)
        dist.all_reduce(sums, group=group)
        tokens, loss, depth, right = sums.tolist()
        loss, depth = loss / max(1, tokens), depth / max(1, tokens)
        losses.append(
            CacheLoss(
                kv_cache=mode,
                exit_signal=rule.signal,
                exit_threshold=rule.threshold,
                tokens=int(tokens),
                loss=loss,
                perplexity=perplexity(loss),
                mean_depth=depth,
                accuracy=right / max(1, tokens),
            )
        )
    return tuple(losses)
