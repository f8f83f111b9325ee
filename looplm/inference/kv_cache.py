"""Key-value caches of the looped stack: one per loop, or one that all loops share.

    per_loop   R caches, one per loop: exact
    last       one; each loop overwrites it, so a past token shows the last loop that it ran
    mean       one; the mean over the loops that a token ran
    first      one; the first loop's entries

Prompts always attend to each loop's own entries. Sharing starts with the first generated token: sharing in the prompt
too costs more than 10 points on GSM8K, whereas after it ``last`` and ``mean`` cost next to nothing, and ``first``
nearly everything (Ouro, arXiv 2510.25741).

In every mode a token attends to *its own* entry of the loop it is in. The mode decides which entry it sees of others. A
token that exits early leaves no hole: a shared cache holds the entry that it computed last.

The layers outside the loops have entries of their own, one of each token in every mode. A coda's entry is of the loop
in which the token exited.

Tokens that share a pass may be in different loops. Each attends to one *lane*: the cache of its row, or with
``per_loop`` the cache of its row and loop.

Shapes: N lanes of a pass, S tokens of each, W entry, T positions, X all lanes (caches times rows).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.config import ModelConfig

CacheMode = Literal["per_loop", "last", "mean", "first"]


class CacheIndex(NamedTuple):
    """Lanes and positions that the tokens of a pass write and read, computed once for all layers."""

    written: tuple[Tensor, Tensor]  # lane and position of each token: [N] and [N], or [N, 1] and [N, S]
    position_SN: Tensor
    lanes: slice | Tensor  # the lanes to read: a slice gives a view, a tensor a copy
    length: int  # positions to read
    weight_N1: Tensor | None  # for blending in a shared cache: 1 / depth (mean), or True in the first loop (first)


class KVCache:
    """Cache entries of ``rows`` texts, allocated in blocks of positions.

    Args:
        config: the model's.
        mode: see the module's docstring.
        rows: texts generated side by side.
        num_loops: the most loops that a token will run.
        dtype: of the entries.
        device: of the entries.
        block: positions that are allocated at a time.

    Attributes:
        layers_XTW: the entries of each layer: the stack's, which have a lane for each loop with ``per_loop``, then the
            prelude's and the coda's. These are written and read as if their tokens were in the first loop.
    """

    def __init__(
        self,
        config: ModelConfig,
        mode: CacheMode,
        rows: int,
        num_loops: int,
        dtype: torch.dtype,
        device: torch.device,
        block: int = 256,
    ) -> None:
        self.mode, self.rows, self._block = mode, rows, block
        lanes = rows * (num_loops if mode == "per_loop" else 1)
        # Zeros, not empty: masked entries are multiplied by 0, and 0 * NaN is NaN.
        empty_XTW = torch.zeros(lanes, 0, config.attention_widths.cached, dtype=dtype, device=device)
        self.layers_XTW = [empty_XTW] * config.num_layers + [empty_XTW[:rows]] * config.unlooped_layers

    def reserve(self, length: int) -> None:
        """Allocate room for ``length`` positions."""
        if (capacity := self.layers_XTW[0].size(1)) < length:
            new = -(-length // self._block) * self._block - capacity
            self.layers_XTW = [F.pad(layer, (0, 0, 0, new)) for layer in self.layers_XTW]

    def index(self, rows: Sequence[int], loops: Sequence[int], positions: Sequence[int], length: int = 1) -> CacheIndex:
        """Return the index of a pass, and reserve the positions that it needs.

        Args:
            rows: the row of each lane.
            loops: the 0-based loop of each lane's tokens.
            positions: the position of each lane's first token.
            length: number of tokens in each lane (S), at consecutive positions.
        """
        device, end = self.layers_XTW[0].device, max(positions) + length
        self.reserve(end)
        lanes = [self._first_lane(loop) + row for row, loop in zip(rows, loops, strict=True)]
        lane_N, position_N = torch.tensor([lanes, list(positions)], device=device)
        adjacent = slice(lanes[0], lanes[0] + len(lanes))
        read = adjacent if lanes == list(range(adjacent.start, adjacent.stop)) else lane_N
        if length == 1:
            return CacheIndex((lane_N, position_N), position_N.unsqueeze(0), read, end, self._weight(loops))
        position_NS = position_N[:, None] + torch.arange(length, device=device)
        return CacheIndex((lane_N[:, None], position_NS), position_NS.t(), read, end, self._weight(loops))

    def write(self, layer: int, index: CacheIndex, entry_SNW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Write the entries of the loops that the tokens are in.

        Returns:
            the entries [N, T, W] that the tokens attend to; and, if later tokens must not see the written ones, the
            entries to :meth:`replace` them with after attention.
        """
        entries_XTW = self.layers_XTW[layer]
        entry = entry_SNW[0] if index.written[0].dim() == 1 else entry_SNW.transpose(0, 1)
        blended = None if index.weight_N1 is None else self._blend(entries_XTW[index.written], entry, index.weight_N1)
        entries_XTW[index.written] = entry
        return entries_XTW[index.lanes, : index.length], blended

    def replace(self, layer: int, index: CacheIndex, blended: Tensor) -> None:
        """Replace the tokens' entries by those that later tokens see."""
        self.layers_XTW[layer][index.written] = blended

    def write_prompt(self, layer: int, loop: int, start: int, entry_SNW: Tensor) -> None:
        """Write one loop's entries for a piece of every row's prompt, from position ``start``."""
        entry_NSW, weight = entry_SNW.transpose(0, 1), self._weight([loop])
        old_NSW = self._loop_entries(layer, loop)[:, start : start + entry_NSW.size(1)]
        old_NSW.copy_(entry_NSW if weight is None else self._blend(old_NSW, entry_NSW, weight))

    def read_prompt(self, layer: int, loop: int, end: int) -> Tensor:
        """Return the entries of all rows before position ``end``, [T, N, W]."""
        return self._loop_entries(layer, loop)[:, :end].transpose(0, 1)

    def copy_row(self, row: int, source: "KVCache", source_row: int, length: int) -> None:
        """Copy the first ``length`` positions of a row of this cache, or another of the same mode, to ``row``."""
        self.reserve(length)
        for ours_XTW, theirs_XTW in zip(self.layers_XTW, source.layers_XTW, strict=True):
            ours_XTW[row :: self.rows, :length] = theirs_XTW[source_row :: source.rows, :length]

    def zero_row(self, row: int) -> None:
        """Zero a row that contains NaNs."""
        for layer_XTW in self.layers_XTW:
            layer_XTW[row :: self.rows] = 0

    def _first_lane(self, loop: int) -> int:
        return loop * self.rows if self.mode == "per_loop" else 0

    def _loop_entries(self, layer: int, loop: int) -> Tensor:
        first = self._first_lane(loop)
        return self.layers_XTW[layer][first : first + self.rows]

    def _weight(self, loops: Sequence[int]) -> Tensor | None:
        if self.mode in ("per_loop", "last") or not any(loops):
            return None
        dtype, device = self.layers_XTW[0].dtype, self.layers_XTW[0].device
        if self.mode == "first":
            return torch.tensor([[loop == 0] for loop in loops], device=device)
        return torch.tensor([[1 / (loop + 1)] for loop in loops], dtype=dtype, device=device)

    def _blend(self, old: Tensor, new: Tensor, weight: Tensor) -> Tensor:
        """Return the entries to keep of tokens that had ``old`` and now computed ``new``."""
        return torch.where(weight, new, old) if self.mode == "first" else torch.lerp(old, new, weight)
