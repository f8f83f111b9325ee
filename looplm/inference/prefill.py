"""Prefill: prompts run through the loops in pieces.

::

    ids_SN --embed, prelude--> h_SND --+-- stack, piece after piece, causal, entries -> cache --+--> coda --> h_SND
                                       +-------------------- max_depth times -------------------+

Each loop runs over the whole prompt before the next begins, so a piece can attend to its own loop's entries of all
earlier pieces, whatever the cache keeps of a prompt afterwards. Prompts are padded on the right: under a causal mask no
token sees the padding. Other work may run between two pieces, so a long prompt does not hold up other rows.

Shapes: S sequence, N prompts side by side, D hidden, T positions, W entry.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from looplm.inference.attention import Attention, Query
from looplm.inference.early_exit import ExitDecider, ExitRule, PromptExits, last_token
from looplm.inference.kv_cache import CacheMode, KVCache
from looplm.inference.sampling import NextLogits
from looplm.inference.stack import LoopedStack


class Prefill:
    """Some prompts on their way through the loops, and their cache.

    Args:
        stack: the model's.
        rule: decides at which depth the logits of a prompt's last token are read; all tokens run all loops.
        mode: of the cache.
        prompts: token ids, at least one each.
        piece: the most tokens in one piece, over all prompts.
    """

    def __init__(
        self, stack: LoopedStack, rule: ExitRule, mode: CacheMode, prompts: Sequence[Sequence[int]], piece: int
    ) -> None:
        self.lengths = [len(prompt) for prompt in prompts]
        rows, longest, device = len(prompts), max(self.lengths), stack.device
        self._stack, self._width, self._max_depth = stack, max(1, piece // rows), rule.max_depth
        ids_NS = torch.zeros(rows, longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids_NS[row, : len(prompt)] = torch.tensor(prompt)
        self._h_SND = stack.embed(ids_NS.to(device).t())
        self._entered_SND = torch.empty_like(self._h_SND) if stack.injects else self._h_SND
        self._turn_SN1K = stack.turns(torch.arange(longest, device=device), longest).unsqueeze(1)
        self._length_N = torch.tensor(self.lengths, device=device)

        def new_cache(mode: CacheMode, num_loops: int) -> KVCache:
            cache = KVCache(stack.model_config, mode, rows, num_loops, stack.dtype, device, block=longest)
            cache.reserve(longest)
            return cache

        self.cache = new_cache(mode, rule.max_depth)
        # Pieces attend to the current loop's entries, which mean and first do not keep.
        apart = mode in ("mean", "first") and self._width < longest
        self._loop_cache = new_cache("last", 1) if apart else self.cache
        self.decider = ExitDecider(stack, rule, rows)
        self.decider.begin(rows, longest)
        self._exits = PromptExits(stack, rule, self._h_SND) if stack.has_coda and rule.decides else None
        self._exit_h_ND = torch.empty_like(self._h_SND[0])
        self._depths = [0] * rows  # 0: not exited yet
        self._loop = self._start = 0

    @property
    def done(self) -> bool:
        """True once all prompts have run all loops, and the coda."""
        return self._loop == self._max_depth + self._stack.has_coda

    def next_logits(self) -> NextLogits:
        """Return the logits for each prompt's first new token. All loops must be done."""
        return NextLogits(list(range(len(self.lengths))), self._stack.head(self._read_ND), self._depths)

    def advance(self) -> int:
        """Run one piece through one loop or the coda, and return its number of tokens."""
        h_SND, start = self._h_SND, self._start
        end = min(start + self._width, len(h_SND))
        whole = end - start == len(h_SND)
        if start == 0:
            self._before_ND = last_token(h_SND, self._length_N)
            if self._exits is not None:
                self._before_SND = h_SND.clone()
        mask_11ST: Tensor | None = None
        if not whole:
            mask_11ST = h_SND.new_full((1, 1, end - start, end), float("-inf")).triu(start + 1)

        def attend(layer: int, attention: Attention, query: Query, entry_SNW: Tensor) -> Tensor:
            loop = self._loop if layer < self._stack.model_config.num_layers else 0
            self.cache.write_prompt(layer, loop, start, entry_SNW)
            if whole:
                return attention.attend_prompt(query, entry_SNW, None)
            if self._loop_cache is not self.cache:
                self._loop_cache.write_prompt(layer, 0, start, entry_SNW)
            return attention.attend_prompt(query, self._loop_cache.read_prompt(layer, loop, end), mask_11ST)

        piece_SND, turn_SN1K = h_SND[start:end], self._turn_SN1K[start:end]
        if self._loop == 0 and self._stack.has_prelude:
            piece_SND = self._stack.prelude(piece_SND, turn_SN1K, attend)
        if self._loop == 0 and self._stack.injects:
            self._entered_SND[start:end] = piece_SND
        if self._loop < self._max_depth:
            loops = [self._loop] * len(self.lengths)
            piece_SND = self._stack.enter_loop(piece_SND, self._entered_SND[start:end], loops)
            h_SND[start:end] = self._stack.run(piece_SND, turn_SN1K, attend)
        else:
            h_SND[start:end] = self._stack.coda(piece_SND, turn_SN1K, attend)
        self._start = end
        if end == len(h_SND):
            self._end_loop()
        return (end - start) * len(self.lengths)

    def _end_loop(self) -> None:
        """Keep the hidden states of the last tokens that exit after this loop; after the last one, read them."""
        rows = range(len(self.lengths))
        if self._loop == self._max_depth:
            self._loop, self._read_ND = self._loop + 1, last_token(self._h_SND, self._length_N)
            return
        decision = self.decider.decide(self._before_ND, self._h_SND, rows, [self._loop] * len(rows), self._length_N)
        if self._exits is not None:
            self._exits.record(self._before_SND, self._h_SND, self._loop)
        self._loop, self._start = self._loop + 1, 0
        exiting = [row for row in rows if decision.exits[row] and not self._depths[row]]
        if exiting:
            self._exit_h_ND[exiting] = last_token(self._h_SND, self._length_N)[exiting]
        for row in exiting:
            self._depths[row] = self._loop
        if self._loop == self._max_depth:
            self._read_ND = self._stack.readable(self._exit_h_ND)
            if self._exits is not None:
                self._h_SND = self._exits.left_SND
            self._h_SND[self._length_N - 1, torch.arange(len(rows), device=self._stack.device)] = self._exit_h_ND
