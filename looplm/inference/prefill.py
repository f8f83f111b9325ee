"""Prompts read in pieces, loop by loop.

::

    ids_SN --embed--> h_SND --+-- stack, piece after piece, causal within the prompt, entries -> cache --+--> h_SND
                              +------------------------------- max_depth times --------------------------+

Each loop runs over the whole prompt before the next begins, so that a piece finds its own loop's entries of all pieces
before it, whatever the cache keeps of a prompt afterwards. Prompts are padded on the right: under a causal mask no token
sees the padding. A reading may be interrupted between pieces, so that a long prompt does not hold up other rows.

Shapes: S sequence, N prompts side by side, D hidden, V vocabulary, T positions, W entry.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.inference.attention import Query
from looplm.inference.early_exit import ExitGateReader, ExitMeter, ExitRule, last_token
from looplm.inference.kv_cache import CacheMode, KVCache
from looplm.inference.stack import Attention, LoopedStack
from looplm.model import LoopLM


class Step(NamedTuple):
    """What the next token of some rows is drawn from: logits [N, V] in fp32, and the depths they were read at."""

    rows: list[int]
    logits_NV: Tensor
    depths: list[int]


class Prefill:
    """Some prompts on their way through the loops, and the cache they leave.

    Args:
        model: whose gate is asked.
        stack: of the model.
        rule: the depth at which a prompt's last token is read; all tokens run all loops.
        mode: what the cache keeps.
        prompts: token ids, at least one each.
        piece: tokens that one piece has at most, over all prompts.
    """

    def __init__(
        self,
        model: LoopLM,
        stack: LoopedStack,
        rule: ExitRule,
        mode: CacheMode,
        prompts: Sequence[Sequence[int]],
        piece: int,
    ) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        self._stack, rows, longest, device = stack, len(prompts), max(self.lengths), stack.device
        self._width = max(1, piece // rows)
        ids_NS = torch.zeros(rows, longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_NS[row, : len(prompt)] = torch.tensor(prompt)
        self._h_SND = stack.embed(ids_NS.to(device).t())
        self._turn_SN1K = stack.turns(torch.arange(longest, device=device), longest).unsqueeze(1)
        self._length_N = torch.tensor(self.lengths, device=device)
        self.cache = KVCache(stack.model_config, mode, rows, rule.max_depth, stack.dtype, device, block=longest)
        self.cache.reserve(longest)
        # Pieces see each other as in their own loop, which mean and first do not keep.
        self._own = self.cache
        if mode in ("mean", "first") and self._width < longest:
            self._own = KVCache(stack.model_config, "last", rows, 1, stack.dtype, device, block=longest)
            self._own.reserve(longest)
        self.gate = ExitGateReader(model.gate, stack.model_config.num_loops, rows)
        self.gate.begin(rows, longest if self.gate.sequence_level else 1)
        self._meter = ExitMeter(rule, self.gate, stack.head)
        self._chosen_ND = torch.empty_like(self._h_SND[0])
        self._depths = [0] * rows
        self._loop = self._start = 0

    @property
    def done(self) -> bool:
        """Whether :attr:`step` can be had."""
        return self._loop == self._meter.rule.max_depth

    @property
    def step(self) -> Step:
        """What the first new tokens are drawn from."""
        return Step(list(range(len(self.lengths))), self._stack.head(self._chosen_ND), self._depths)

    def advance(self) -> int:
        """Take one piece through one loop; returns how many tokens that were."""
        h_SND, start = self._h_SND, self._start
        end = min(start + self._width, len(h_SND))
        if start == 0:
            self._before_ND = last_token(h_SND, self._length_N)

        def attend(layer: int, attention: Attention, query: Query, entry_SNW: Tensor) -> Tensor:
            self.cache.write_prompt(layer, self._loop, start, entry_SNW)
            if end - start == len(h_SND):
                return attention.attend_prompt(query, entry_SNW, None)
            if self._own is not self.cache:
                self._own.write_prompt(layer, 0, start, entry_SNW)
            return attention.attend_prompt(query, self._own.read_prompt(layer, self._loop, end), mask_11ST)

        mask_11ST: Tensor | None = None
        if end - start < len(h_SND):
            mask_11ST = h_SND.new_full((1, 1, end - start, end), float("-inf")).triu(start + 1)
        piece_SND = self._stack.run(h_SND[start:end], self._turn_SN1K[start:end], attend)
        if end - start == len(h_SND):
            self._h_SND = piece_SND
        else:
            h_SND[start:end] = piece_SND
        self._start = end
        if end == len(h_SND):
            self._end_loop()
        return (end - start) * len(self.lengths)

    def _end_loop(self) -> None:
        """Read the last tokens that leave here."""
        rows = len(self.lengths)
        verdict = self._meter.judge(self._before_ND, self._h_SND, range(rows), [self._loop] * rows, self._length_N)
        self._loop, self._start = self._loop + 1, 0
        leaving = [row for row in range(rows) if verdict.leaves[row] and not self._depths[row]]
        if leaving:
            self._chosen_ND[leaving] = last_token(self._h_SND, self._length_N)[leaving]
        for row in leaving:
            self._depths[row] = self._loop
