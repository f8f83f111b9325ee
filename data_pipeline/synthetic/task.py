"""What every synthetic task is: a vocabulary, and samples that depend only on a seed, a split and their index.

Shapes: N samples or items, S tokens of a sample, I numbers that identify an item.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Ints = NDArray[np.int64]

END = "<end>"  # symbol 0 of every task: ends an item, fills what is left of a sample
NO_LEVEL = -1  # level of a position that has no label

_SHARES = 16  # of these shares of all items, one is for validation, one for the test
_MULTIPLIER, _MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


class Examples(NamedTuple):
    """Samples of a task."""

    ids_NS: Ints
    label_NS: Ints  # 0 where there is none
    level_NS: Ints  # how hard the label is, in the task's own measure; NO_LEVEL where there is no label


class Task(ABC):
    """A synthetic task.

    Attributes:
        symbols: names of the token ids, from 0 on; the first is :data:`END`.
        level_name: what a level counts, such as "position" or "hops".
    """

    symbols: tuple[str, ...]
    level_name: str

    @abstractmethod
    def generate(self, random: np.random.Generator, count: int, length: int, split: Split) -> Examples:
        """Return ``count`` samples of ``length`` tokens, of which no item is in another split.

        Raises:
            UserError: a sample of that length holds no item.
        """


def split_of(item_NI: Ints) -> NDArray[np.uint8]:
    """Return the split of each item, as an index of :data:`SPLITS`: a hash of its numbers decides, and nothing else.

    So no item of one split occurs in another, however many are drawn.
    """
    with np.errstate(over="ignore"):
        hash_N = np.full(len(item_NI), item_NI.shape[1], np.uint64)
        for column_N in item_NI.astype(np.uint64).T:
            hash_N = (hash_N ^ column_N) * _MULTIPLIER
            hash_N ^= hash_N >> np.uint64(29)
        hash_N = hash_N * _MIXER
        share_N = (hash_N >> np.uint64(32)) % np.uint64(_SHARES)
    return np.where(share_N < 2, share_N + np.uint64(1), np.uint64(0)).astype(np.uint8)


def draw(make: Callable[[int], Ints], count: int, split: Split) -> Ints:
    """Return ``count`` items of ``split``: [count, I].

    Args:
        make: returns that many random items, each a row of numbers.
        count: number of items.
        split: items of other splits are dropped.
    """
    wanted, kept, have = SPLITS.index(split), list[Ints](), 0
    rate = 1 / _SHARES if wanted else 1 - 2 / _SHARES
    while have < count:
        item_NI = make(int((count - have) / rate * 1.1) + 16)
        kept.append(item_NI[split_of(item_NI) == wanted])
        have += len(kept[-1])
    return np.concatenate(kept)[:count]
