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

Tokens that share a pass may be in different loops. Each reads one *lane*: its row's cache, of its loop if there is one
per loop.

Shapes: N lanes read in a pass, S tokens of each, W entry, T positions, X lanes in all: caches times rows.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from looplm.accounting import cache_values_per_token
from looplm.config import ModelConfig

CacheMode = Literal["per_loop", "last", "mean", "first"]


class Places(NamedTuple):
    """Where the tokens of a pass lie, worked out once for all layers."""

    token: tuple[Tensor, Tensor]  # lane and position of each token: [N] and [N], or [N, 1] and [N, S]
    position_SN: Tensor
    seen: slice | Tensor  # the lanes they read: a slice is a view, a tensor makes a copy
    span: int  # positions they look at
    weight: (
        Tensor | None
    )  # what a shared cache's blend needs of each token: 1 / depth, or whether this is its first loop


class KVCache:
    """Entries of ``rows`` rows, preallocated and grown by blocks of positions.

    Args:
        shape: the model's.
        mode: see above.
        rows: how many texts are generated side by side.
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

    def places(self, rows: Sequence[int], loops: Sequence[int], positions: Sequence[int], length: int = 1) -> Places:
        """Plan a pass, and make room for it.

        Args:
            rows: of each lane's tokens.
            loops: they are in, 0-based.
            positions: of each lane's first token.
            length: tokens of each lane (S), at consecutive positions.
        """
        device = self._layers[0].device
        span = max(positions) + length
        self.reserve(span)
        offset = self.rows if self.mode == "per_loop" else 0
        lanes = [row + loop * offset for row, loop in zip(rows, loops, strict=True)]
        lane_N, position_N = torch.tensor([lanes, list(positions)], device=device)
        adjacent = lanes == list(range(lanes[0], lanes[0] + len(lanes)))
        seen = slice(lanes[0], lanes[0] + len(lanes)) if adjacent else lane_N
        if length == 1:
            token, position_SN = (lane_N, position_N), position_N.unsqueeze(0)
        else:
            position_NS = position_N[:, None] + torch.arange(length, device=device)
            token, position_SN = (lane_N[:, None], position_NS), position_NS.t()
        return Places(token, position_SN, seen, span, self._weight(loops))

    def enter(self, layer: int, places: Places, entry_SNW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Put down the tokens' entries of the loop they are in.

        Returns:
            what the tokens see, [N, ``span``, W]; and, if that is not what later tokens shall see of them, what is to
            be handed to :meth:`settle` once they have looked.
        """
        store_XTW = self._layers[layer]
        entry = entry_SNW[0] if places.token[0].dim() == 1 else entry_SNW.transpose(0, 1)
        kept = None if places.weight is None else self._blend(store_XTW[places.token], entry, places.weight)
        store_XTW[places.token] = entry
        return store_XTW[places.seen, : places.span], kept

    def settle(self, layer: int, places: Places, kept: Tensor) -> None:
        """Put down what later tokens see."""
        self._layers[layer][places.token] = kept

    def write_prompt(self, layer: int, loop: int, start: int, entry_SNW: Tensor) -> None:
        """Put down a piece of the prompts of all rows: entries of one loop, from position ``start``."""
        entry_NSW, store_NTW = entry_SNW.transpose(0, 1), self._loop(layer, loop)
        place_NSW = store_NTW[:, start : start + entry_NSW.size(1)]
        weight = self._weight([loop])
        place_NSW.copy_(entry_NSW if weight is None else self._blend(place_NSW, entry_NSW, weight))

    def read_prompt(self, layer: int, loop: int, end: int) -> Tensor:
        """What lies at the first positions of all rows, [T, N, W]."""
        return self._loop(layer, loop)[:, :end].transpose(0, 1)

    def adopt(self, row: int, other: "KVCache", other_row: int, length: int) -> None:
        """Take over a row of another cache of the same mode."""
        self.reserve(length)
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine[row :: self.rows, :length] = theirs[other_row :: other.rows, :length]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row over another."""
        self.adopt(target, self, source, length)

    def clear(self, row: int) -> None:
        """Forget a row that holds numbers that are none."""
        for layer in self._layers:
            layer[row :: self.rows] = 0

    def _loop(self, layer: int, loop: int) -> Tensor:
        start = loop * self.rows if self.mode == "per_loop" else 0
        return self._layers[layer][start : start + self.rows]

    def _weight(self, loops: Sequence[int]) -> Tensor | None:
        if self.mode in ("per_loop", "last") or not any(loops):
            return None
        dtype, device = self._layers[0].dtype, self._layers[0].device
        if self.mode == "first":
            return torch.tensor([[loop == 0] for loop in loops], device=device)
        return torch.tensor([[1 / (loop + 1)] for loop in loops], dtype=dtype, device=device)

    def _blend(self, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        """What is kept of tokens that had the entries ``old`` and now have ``new``."""
        return torch.where(weight, new, old) if self.mode == "first" else torch.lerp(old, new, weight)
