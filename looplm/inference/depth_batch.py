"""Continuous depth batching (arXiv 2608.09444): tokens at different loops share a pass of the stack.

All loops have the same weights, so a pass does not depend on which loops its tokens are in::

    pass          1      2      3      4      5
    row 0       a loop1 a loop2 b loop1 c loop1 c loop2      a exits after loop 2, b after loop 1
    row 1       p loop1 p loop2 p loop3 p loop4 q loop1      p runs all four

When a token exits, the head computes its logits, and the row's next token enters loop 1 in the very next pass. With a
shared cache the token then takes part in no further pass. With a cache per loop, later tokens need its entries of the
later loops, so it runs on behind its successor, which never overtakes it. That is exactly the cacheless model, in fewer
passes.

Loop, position and row of each token are numbers on the host; only hidden states and the gate's state are tensors.

Shapes: N tokens in a pass, each a lane of its own (S = 1), D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.inference.batch import TextBatch
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.inference.sampling import NewTokens, NextLogits, Sampler
from looplm.inference.stack import LoopedStack


@dataclass
class _LoopingToken:
    """A token in the loops."""

    row: int
    position: int
    loop: int = 0  # of its next pass
    exited: bool = False  # its logits are known; it only runs on for its cache entries
    finished: bool = False  # it takes part in no further pass


class ExitedTokens(NamedTuple):
    """Tokens that exited in a pass: where, depths, hidden states, and logits if the exit rule needed them."""

    rows: list[int]
    positions: list[int]
    depths: list[int]
    h_ND: Tensor
    logits_NV: Tensor | None


class DepthBatch(TextBatch):
    """Texts whose tokens enter and leave the loops independently; see :class:`TextBatch` for the arguments.

    Attributes:
        runs_on: whether a token that has exited takes part in the passes up to the last loop.
    """

    def __init__(self, stack: LoopedStack, rule: ExitRule, mode: CacheMode, rows: int) -> None:
        super().__init__(stack, rule, mode, rows)
        self.runs_on = mode == "per_loop"
        self._tokens: list[_LoopingToken] = []
        self._h_1ND = torch.empty(1, 0, stack.model_config.hidden_size, dtype=stack.dtype, device=stack.device)
        self._entered_1ND = self._h_1ND  # what they entered the first loop with; unused without an injection

    @property
    def in_flight(self) -> bool:
        """True if any token takes part in the next pass."""
        return bool(self._pending) or not all(token.finished for token in self._tokens)

    def free(self, row: int, broken: bool) -> None:
        """Free a row, and end its tokens' passes; ``broken`` if its logits were not finite."""
        super().free(row, broken)
        for token in self._tokens:
            token.finished |= token.row == row

    def move(self, source: int, target: int) -> None:
        """Move a text, and its tokens in the loops, to another row."""
        super().move(source, target)
        for token in self._tokens:
            if token.row == source:
                token.row = target

    def decode(self, sampler: Sampler) -> list[NewTokens]:
        """Run one pass, and sample the successors of the tokens that exit."""
        exited = self.advance()
        return sampler.sample(self.read([exited])) if exited.rows else []

    def advance(self) -> ExitedTokens:
        """Run the next loop of every token, and return those that exit after it, for :meth:`read`."""
        self._regroup()
        tokens, before_1ND = self._tokens, self._h_1ND
        rows, loops = [token.row for token in tokens], [token.loop for token in tokens]
        positions = [token.position for token in tokens]
        self._h_1ND = self.run_pass(before_1ND, self._entered_1ND, rows, loops, positions)
        decision = self.decider.decide(before_1ND[0], self._h_1ND, rows, loops)
        exiting = [index for index, token in enumerate(tokens) if decision.exits[index] and not token.exited]
        for token, exits in zip(tokens, decision.exits, strict=True):
            token.loop += 1
            token.exited |= exits
            token.finished = token.exited and not (self.runs_on and token.loop < self._rule.max_depth)
        positions, depths = [tokens[i].position for i in exiting], [tokens[i].loop for i in exiting]
        logits_NV = None if decision.logits_NV is None else decision.logits_NV[exiting]
        return ExitedTokens([rows[i] for i in exiting], positions, depths, self._h_1ND[0, exiting], logits_NV)

    def read(self, passes: Sequence[ExitedTokens]) -> NextLogits:
        """Return the logits of the tokens that exited in some passes, in the order of their rows."""
        passes = [exited for exited in passes if exited.rows]
        found = chain.from_iterable(zip(exited.rows, exited.positions, exited.depths, strict=True) for exited in passes)
        unordered = list(found)
        order = sorted(range(len(unordered)), key=unordered.__getitem__)
        rows, positions, depths = (list(part) for part in zip(*(unordered[i] for i in order), strict=True))
        known = [exited.logits_NV for exited in passes if exited.logits_NV is not None]
        # If the exit rule needs logits, they are missing only for passes in which all tokens had reached the last loop.
        if len(known) == len(passes):
            return NextLogits(rows, torch.cat(known)[order], depths)
        h_1ND = torch.cat([exited.h_ND for exited in passes])[order].unsqueeze(0)
        return NextLogits(rows, self.logits(h_1ND, rows, positions)[0], depths)

    def _regroup(self) -> None:
        """Drop finished tokens, admit pending ones, and order all by row, so that the cache is read without a copy."""
        joining = [_LoopingToken(row, self._length[row]) for row in self._pending]
        candidates = [*self._tokens, *joining]
        order = [index for index, token in enumerate(candidates) if not token.finished]
        order.sort(key=lambda index: (candidates[index].row, candidates[index].position))
        if order == list(range(len(self._tokens))):
            return
        order_N = torch.tensor(order, device=self._stack.device)
        if joining:
            ids_1N = torch.tensor([list(self._pending.values())], device=self._stack.device)
            entered_1ND = self.enter(ids_1N, list(self._pending), [token.position for token in joining])
            self._h_1ND = torch.cat((self._h_1ND, entered_1ND), dim=1)
            if self._stack.injects:
                self._entered_1ND = torch.cat((self._entered_1ND, entered_1ND), dim=1)
            for token in joining:
                self._length[token.row] += 1
            self._pending.clear()
        self._h_1ND = self._h_1ND[:, order_N]
        if self._stack.injects:
            self._entered_1ND = self._entered_1ND[:, order_N]
        self.decider.regroup(order_N, len(joining))
        self._tokens = [candidates[index] for index in order]
