"""Tokens at different loops in one pass of the stack: continuous depth batching (arXiv 2608.09444).

Every loop has the same weights, so a pass does not care which loop its tokens are in::

    pass          1      2      3      4      5
    row 0       a loop1 a loop2 b loop1 c loop1 c loop2      a left after loop 2, b after loop 1
    row 1       p loop1 p loop2 p loop3 p loop4 q loop1      p ran all four

A token that leaves is read by the head; the row's next token enters loop 1 in the very next pass. With a shared cache it
leaves the compute too. With a cache per loop later tokens need its entries of the later loops: it runs on behind its
successor, which never overtakes it. That is exactly the cacheless model, in fewer passes.

Loop, position and row of each token are numbers on the host; only hidden states and the gate's state are tensors.

Shapes: N tokens in the pass, each its own lane (S = 1), D hidden, V vocabulary, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.inference.attention import Query
from looplm.inference.early_exit import ExitGateReader, ExitMeter, ExitRule
from looplm.inference.kv_cache import CacheMode, KVCache, Places
from looplm.inference.prefill import Prefill, Step
from looplm.inference.stack import Attention, LoopedStack
from looplm.model import LoopLM


@dataclass
class _Flight:
    """A token in the loops."""

    row: int
    position: int
    loop: int = 0  # it runs in the next pass
    read: bool = False  # it has left, and runs on for its entries only
    gone: bool = False


class Left(NamedTuple):
    """Tokens that left in a pass: rows, depths, hidden states, and logits if the rule has asked for them."""

    rows: list[int]
    depths: list[int]
    h_ND: Tensor
    logits_NV: Tensor | None


class DepthBatch:
    """The texts of ``rows`` rows, and their tokens in the loops.

    Args:
        model: in eval mode.
        stack: of the model.
        rule: when tokens leave.
        mode: what the cache keeps.
        rows: texts side by side.

    Attributes:
        cache: what is kept of the past.
        meter: judges who leaves.
        runs_on: whether a token that has left stays in the compute up to the last loop.
    """

    def __init__(self, model: LoopLM, stack: LoopedStack, rule: ExitRule, mode: CacheMode, rows: int) -> None:
        self._stack, self._rule = stack, rule
        self.cache = KVCache(stack.model_config, mode, rows, rule.max_depth, stack.dtype, stack.device)
        self._gate = ExitGateReader(model.gate, stack.model_config.num_loops, rows)
        self.meter = ExitMeter(rule, self._gate, stack.head)
        self.runs_on = mode == "per_loop"
        self._next = [0] * rows  # position of each row's next token
        self._flights: list[_Flight] = []
        self._new: list[tuple[_Flight, int]] = []
        self._h_1ND = torch.empty(1, 0, stack.model_config.hidden_size, dtype=stack.dtype, device=stack.device)

    @property
    def in_flight(self) -> bool:
        """Whether a pass has anything to do."""
        return bool(self._new) or any(not flight.gone for flight in self._flights)

    def seat(self, row: int, prefill: Prefill, prefill_row: int) -> None:
        """Put a prompt that has been read into a row."""
        length = prefill.lengths[prefill_row]
        self.cache.adopt(row, prefill.cache, prefill_row, length)
        self._gate.adopt(row, prefill.gate, prefill_row)
        self._next[row] = length

    def start(self, rows: Sequence[int], ids: Sequence[int]) -> None:
        """The next token of these rows enters loop 1 in the next pass."""
        for row, token_id in zip(rows, ids, strict=True):
            self._new.append((_Flight(row, self._next[row]), token_id))
            self._next[row] += 1

    def release(self, row: int, broken: bool = False) -> None:
        """A row's text has ended; ``broken`` if its numbers are none."""
        for flight in self._flights:
            flight.gone |= flight.row == row
        if broken:
            self.cache.clear(row)

    def move(self, source: int, target: int) -> None:
        """A text goes on in another row."""
        self.cache.move(source, target, self._next[source])
        self._gate.adopt(target, self._gate, source)
        self._next[target] = self._next[source]
        for flight in [*self._flights, *(flight for flight, _ in self._new)]:
            if flight.row == source:
                flight.row = target

    def advance(self) -> Left:
        """One pass: every token in flight runs its next loop. Returns those that left, for :meth:`read`."""
        self._regroup()
        flights = self._flights
        rows, loops = [flight.row for flight in flights], [flight.loop for flight in flights]
        places = self.cache.places(rows, loops, [flight.position for flight in flights])
        before_1ND = self._h_1ND
        self._h_1ND = run_cached(self._stack, self.cache, places, before_1ND)
        verdict = self.meter.judge(before_1ND[0], self._h_1ND, rows, loops)
        leaving = [index for index, leaves in enumerate(verdict.leaves) if leaves and not flights[index].read]
        for flight, leaves in zip(flights, verdict.leaves, strict=True):
            flight.loop += 1
            flight.read |= leaves
            flight.gone = flight.read and not (self.runs_on and flight.loop < self._rule.max_depth)
        everyone = len(leaving) == len(flights)
        h_ND = self._h_1ND[0] if everyone else self._h_1ND[0, leaving]
        logits_NV = verdict.logits_NV if everyone or verdict.logits_NV is None else verdict.logits_NV[leaving]
        return Left([rows[index] for index in leaving], [loops[index] + 1 for index in leaving], h_ND, logits_NV)

    def read(self, left: Sequence[Left]) -> Step:
        """The head, once over the tokens that left in some passes; in the order of their rows."""
        found = sorted(
            (row, depth, index)
            for index, (row, depth) in enumerate(
                pair for some in left for pair in zip(some.rows, some.depths, strict=True)
            )
        )
        order = [index for *_, index in found]
        known = [some.logits_NV for some in left if some.logits_NV is not None and some.rows]
        # Where the score was made from logits, all tokens have them but those of a pass in which all were at the end.
        if len(known) == sum(bool(some.rows) for some in left):
            logits_NV = torch.cat(known)
        else:
            logits_NV = self._stack.head(torch.cat([some.h_ND for some in left]))
        if order != list(range(len(order))):
            logits_NV = logits_NV[order]
        return Step([row for row, *_ in found], logits_NV, [depth for _, depth, _ in found])

    def _regroup(self) -> None:
        """Tokens that are gone make way, new ones join; in the order of their rows, so that the cache need not be copied."""
        old = self._flights
        candidates = [*old, *(flight for flight, _ in self._new)]
        order = [index for index, flight in enumerate(candidates) if not flight.gone]
        order.sort(key=lambda index: (candidates[index].row, candidates[index].position))
        if order == list(range(len(old))):
            return
        order_N = torch.tensor(order, device=self._h_1ND.device)
        if self._new:
            ids_1N = torch.tensor([[token_id for _, token_id in self._new]], device=order_N.device)
            new_1ND = self._stack.embed(ids_1N)
            self._h_1ND = torch.cat((self._h_1ND, new_1ND), dim=1)
        self._h_1ND = self._h_1ND[:, order_N]
        if self._rule.decides:
            self._gate.regroup(order_N, len(self._new))
        self._flights, self._new = [candidates[index] for index in order], []


def run_cached(stack: LoopedStack, cache: KVCache, places: Places, h_SND: Tensor) -> Tensor:
    """One pass of the stack over tokens that look at a cache: their hidden states after it."""
    position_SN, span = places.position_SN, places.span
    visible_SNT = torch.arange(span, device=h_SND.device) <= position_SN[..., None]
    mask_N1QT: Tensor | None = None
    if not visible_SNT.all():
        mask_SNT = torch.zeros_like(visible_SNT, dtype=h_SND.dtype).masked_fill_(~visible_SNT, float("-inf"))
        mask_N1QT = mask_SNT.transpose(0, 1).unsqueeze(1)
        if len(position_SN) > 1:
            mask_N1QT = mask_N1QT.repeat_interleave(stack.queries_per_entry, dim=2)

    def attend(layer: int, attention: Attention, query: Query, entry_SNW: Tensor) -> Tensor:
        seen_NTW, kept = cache.enter(layer, places, entry_SNW)
        context = attention.attend_cached(query, seen_NTW, mask_N1QT)
        if kept is not None:
            cache.settle(layer, places, kept)
        return context

    return stack.run(h_SND, stack.turns(position_SN, span), attend)
