"""What generation keeps of the past: a cache per loop, or one cache that the loops share.

    per_loop   R caches, one per loop: exact
    last       one; each loop overwrites it: a past token shows the last loop it ran
    mean       one; the mean over the loops a token ran
    first      one; the first loop's

A prompt is attended to with each loop's own entries whatever the mode; sharing starts with the first generated token.
Sharing in the prompt too costs more than 10 points on GSM8K; after it, last and mean cost next to nothing, and first
nearly everything (Ouro, arXiv 2510.25741).

In every mode a token sees *its own* entry of the loop it is in; the mode says what it sees of others. A
token that left early has no hole to fill: a shared cache holds what it last computed.

Shapes: S sequence, N rows taking part, B rows in all, W entry, T positions, X lanes: a cache of a row each.
"""

from typing import Literal

import torch
from torch import Tensor

from looplm.accounting import cache_values_per_token
from looplm.config import ModelConfig

CacheMode = Literal["per_loop", "last", "mean", "first"]


class KVCache:
    """Entries of ``rows`` rows, preallocated and grown by blocks of positions.

    Args:
        shape: the model's.
        mode: see above.
        rows: how many texts are generated side by side (B).
        num_loops: most loops a token will run.
        dtype: of the entries.
        device: where they lie.
        block: positions added at a time.
    """

    def __init__(
        self,
        shape: ModelConfig,
        mode: CacheMode,
        rows: int,
        num_loops: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int = 256,
    ) -> None:
        self.mode, self.rows, self.block = mode, rows, block
        self.num_caches = num_loops if mode == "per_loop" else 1
        width = cache_values_per_token(shape, num_caches=1) // shape.num_layers
        # Zeros, not empty: what a mask hides is multiplied by 0, and 0 * NaN is NaN.
        empty = torch.zeros(self.num_caches * rows, 0, width, dtype=dtype, device=device)
        self._layers = [empty] * shape.num_layers

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self._layers[0].size(1)

    def bytes_per_token(self) -> int:
        """Bytes that one token of one row takes, over all layers and caches, read off the allocation."""
        return self.num_caches * sum(layer.size(-1) * layer.element_size() for layer in self._layers)

    def allocated_bytes(self) -> int:
        """Bytes held now."""
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions."""
        if length <= self.capacity:
            return
        capacity = -(-length // self.block) * self.block
        for index, old in enumerate(self._layers):
            self._layers[index] = old.new_zeros(old.size(0), capacity, old.size(2))
            self._layers[index][:, : old.size(1)] = old

    def write_prompt(self, layer: int, loop: int, rows_N: Tensor, entry_SNW: Tensor) -> None:
        """Put down a prompt's entries of one loop, from position 0."""
        store_XTW, place = self._layers[layer], (self._lanes(rows_N, loop), slice(entry_SNW.size(0)))
        store_XTW[place] = self._blend(store_XTW, place, entry_SNW.transpose(0, 1), loop)

    def update(self, layer: int, loop: int, rows_N: Tensor, position_N: Tensor, entry_NW: Tensor, span: int) -> Tensor:
        """Put down one token's entry per row, and return what these tokens see.

        Returns:
            entries [N, ``span``, W]: others' as the mode keeps them, the token's own as of this loop.
        """
        store_XTW, lane_N = self._layers[layer], self._lanes(rows_N, loop)
        kept_NW = self._blend(store_XTW, (lane_N, position_N), entry_NW, loop)
        store_XTW[lane_N, position_N] = kept_NW
        if rows_N.numel() == self.rows:  # all rows, in order: a view; some of them: a copy
            start = loop * self.rows if self.mode == "per_loop" else 0
            seen_NTW = store_XTW[start : start + self.rows, :span]
        else:
            seen_NTW = store_XTW[lane_N, :span]
        if kept_NW is not entry_NW:
            seen_NTW = seen_NTW.clone()
            seen_NTW[torch.arange(len(rows_N), device=rows_N.device), position_N] = entry_NW
        return seen_NTW

    def _lanes(self, rows_N: Tensor, loop: int) -> Tensor:
        """Where rows lie in the first dimension: cache after cache, row after row."""
        return rows_N + loop * self.rows if self.mode == "per_loop" else rows_N

    def _blend(self, store_XTW: Tensor, place: tuple[Tensor, Tensor | slice], new: Tensor, loop: int) -> Tensor:
        """What is kept of tokens that lie at ``place`` and now have the entries ``new``."""
        if loop == 0 or self.mode in ("per_loop", "last"):
            return new
        old = store_XTW[place]
        return old if self.mode == "first" else old + (new - old) / (loop + 1)
