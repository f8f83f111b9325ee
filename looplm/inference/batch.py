"""The texts that are decoded side by side, one per row, and one pass of the stack over their tokens.

A *pass* runs each of its tokens through one loop. Subclasses decide which tokens share a pass:
:class:`~looplm.inference.depth_batch.DepthBatch` and :class:`~looplm.inference.speculation.SpeculativeBatch`.

Shapes: S tokens of a lane, at consecutive positions, N lanes, D hidden, W entry, T cached positions, Q queries of a
lane.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from looplm.inference.attention import Attention, Query
from looplm.inference.early_exit import ExitDecider, ExitRule
from looplm.inference.kv_cache import CacheIndex, CacheMode, KVCache
from looplm.inference.prefill import Prefill
from looplm.inference.sampling import NewTokens, Sampler
from looplm.inference.stack import Attend, LoopedStack


class TextBatch:
    """Cache, exit state and pending token of each row.

    Args:
        stack: the model's.
        rule: when tokens exit.
        mode: of the cache.
        rows: number of texts side by side.
    """

    def __init__(self, stack: LoopedStack, rule: ExitRule, mode: CacheMode, rows: int) -> None:
        self._stack, self._rule = stack, rule
        self._cache = KVCache(stack.model_config, mode, rows, rule.max_depth, stack.dtype, stack.device)
        self.decider = ExitDecider(stack, rule, rows)
        self._length = [0] * rows  # tokens of each row that have entered the stack
        self._pending: dict[int, int] = {}  # for each row, the token that enters it next

    def seat(self, row: int, prefill: Prefill, prefill_row: int) -> None:
        """Start a row with a prompt that has been read."""
        self._length[row] = prefill.lengths[prefill_row]
        self._cache.copy_row(row, prefill.cache, prefill_row, self._length[row])
        self.decider.copy_row(row, prefill.decider, prefill_row)

    def append(self, rows: Sequence[int], ids: Sequence[int]) -> None:
        """Append one token to each of these rows. It enters the stack in the next pass."""
        self._pending.update(zip(rows, ids, strict=True))

    def free(self, row: int, broken: bool) -> None:
        """Free a row; ``broken`` if its logits were not finite."""
        self._pending.pop(row, None)
        if broken:
            self._cache.zero_row(row)

    def move(self, source: int, target: int) -> None:
        """Move a text to another row."""
        self._cache.copy_row(target, self._cache, source, self._length[source])
        self.decider.copy_row(target, self.decider, source)
        self._length[target] = self._length[source]
        if source in self._pending:
            self._pending[target] = self._pending.pop(source)

    def decode(self, sampler: Sampler) -> list[NewTokens]:
        """Run the rows' pending tokens, and return the tokens that were sampled after them."""
        raise NotImplementedError

    def run_pass(
        self, h_SND: Tensor, entered_SND: Tensor, rows: Sequence[int], loops: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Run one loop of each lane's tokens over the cache, and return their hidden states.

        Args:
            h_SND: hidden states before the loop.
            entered_SND: those before the first loop.
            rows: the row of each lane.
            loops: the 0-based loop of each lane's tokens.
            positions: the position of each lane's first token.
        """
        h_SND = self._stack.enter_loop(h_SND, entered_SND, loops)
        return self._run(self._stack.run, h_SND, self._cache.index(rows, loops, positions, len(h_SND)))

    def enter(self, ids_SN: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the hidden states [S, N, D] with which each lane's tokens enter the first loop."""
        h_SND = self._stack.embed(ids_SN)
        return self._run_once(self._stack.prelude, h_SND, rows, positions) if self._stack.has_prelude else h_SND

    def logits(self, h_SND: Tensor, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Return the logits [S, N, V] of each lane's tokens, which leave the loops with these hidden states."""
        if self._stack.has_coda:
            return self._stack.head(self._run_once(self._stack.coda, h_SND, rows, positions))
        return self._stack.head(self._stack.readable(h_SND))

    def _run_once(
        self, layers: Callable[..., Tensor], h_SND: Tensor, rows: Sequence[int], positions: Sequence[int]
    ) -> Tensor:
        """Run layers outside the loops."""
        return self._run(layers, h_SND, self._cache.index(rows, [0] * len(rows), positions, len(h_SND)))

    def _run(self, layers: Callable[[Tensor, Tensor, Attend], Tensor], h_SND: Tensor, index: CacheIndex) -> Tensor:
        """Run layers over the cache."""
        visible_SNT = torch.arange(index.length, device=h_SND.device) <= index.position_SN[..., None]
        mask_N1QT: Tensor | None = None
        if not visible_SNT.all():
            mask_SNT = torch.zeros_like(visible_SNT, dtype=h_SND.dtype).masked_fill_(~visible_SNT, float("-inf"))
            mask_N1QT = mask_SNT.transpose(0, 1).unsqueeze(1)
            if len(h_SND) > 1:
                mask_N1QT = mask_N1QT.repeat_interleave(self._stack.queries_per_entry, dim=2)

        def attend(layer: int, attention: Attention, query: Query, entry_SNW: Tensor) -> Tensor:
            entry_NTW, blended = self._cache.write(layer, index, entry_SNW)
            context = attention.attend_cached(query, entry_NTW, mask_N1QT)
            if blended is not None:
                self._cache.replace(layer, index, blended)
            return context

        return layers(h_SND, self._stack.turns(index.position_SN, index.length), attend)
