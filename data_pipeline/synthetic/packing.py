"""Pack items that are shorter than a sample: as many as fit, one after another, and END for the rest.

Shapes: M items, T tokens of the longest item, N samples, S tokens of a sample.
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from data_pipeline.synthetic.task import NO_LEVEL, Examples, Ints


class Items(NamedTuple):
    """Items of different lengths; what lies beyond an item's length is ignored."""

    ids_MT: Ints
    label_MT: Ints
    level_MT: Ints
    length_M: Ints


def pack(make: Callable[[int], Items], count: int, length: int) -> Examples:
    """Return ``count`` samples of ``length`` tokens, filled with items in the order in which they are made.

    An item that no longer fits opens the next sample, so that long items are as frequent as they are made.

    Args:
        make: returns that many random items, none longer than ``length``.
        count: number of samples.
        length: tokens of a sample.
    """
    items = make(count + 16)
    first_N, items_used = _first_items(items.length_M, count, length)
    while items_used is None:
        filled, have = len(first_N), len(items.length_M)
        more = make(int((count - filled + 1) * (have / max(filled, 1)) * 1.1) + 16)
        items = Items(*(np.concatenate(pair) for pair in zip(items, more, strict=True)))
        first_N, items_used = _first_items(items.length_M, count, length)
    ids_MT, label_MT, level_MT, length_M = (x[:items_used] for x in items)
    start_M = np.cumsum(length_M) - length_M
    row_M = np.repeat(np.arange(count), np.diff(first_N, append=items_used))
    place_M = start_M - start_M[first_N][row_M] + row_M * length
    token_T = np.arange(ids_MT.shape[1])
    is_token_MT = token_T < length_M[:, None]
    place_K = (place_M[:, None] + token_T)[is_token_MT]
    made = Examples(*(np.full(count * length, fill) for fill in (0, 0, NO_LEVEL)))
    for x_K, x_MT in zip(made, (ids_MT, label_MT, level_MT), strict=True):
        x_K[place_K] = x_MT[is_token_MT]
    return Examples(*(x_K.reshape(count, length) for x_K in made))


def _first_items(length_M: Ints, count: int, length: int) -> tuple[Ints, int | None]:
    """Return the first item of each sample, and how many items fill ``count`` samples; None if there are too few."""
    end = np.cumsum(length_M).tolist()
    first, item = list[int](), 0
    while item < len(end) and len(first) < count:
        first.append(item)
        item = bisect_right(end, (end[item - 1] if item else 0) + length, item)
    enough = len(first) == count and item < len(end)  # the last sample is full: one more item did not fit
    return np.array(first, dtype=np.int64), item if enough else None
