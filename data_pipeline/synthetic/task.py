"""The form of every synthetic task: a vocabulary, and samples that depend only on a seed, a split and their index.

Shapes: N samples or items, S tokens of a sample, I numbers that identify an item.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from looplm.bounds import require
from looplm.failures import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Ints = NDArray[np.int64]

END = "<end>"  # symbol 0 of every task: ends an item, fills what is left of a sample
NO_LEVEL = -1  # level of a position that has no label

_SHARES = 16  # of these shares of all items, one is for validation, one for the test
_PATIENCE = 1000  # items that should have been found in a split before it is called empty
_MULTIPLIER, _MIXER = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)


class Examples(NamedTuple):
    """Samples of a task."""

    ids_NS: Ints
    label_NS: Ints  # 0 where there is no label
    level_NS: Ints  # how hard the label is, in the task's own measure; NO_LEVEL where there is no label


class Task(ABC):
    """A synthetic task.

    Attributes:
        symbols: names of the token ids, from 0 on; the first is :data:`END`.
        level_name: what a level counts, such as "position" or "hops".
        writes_chain: True if each label is the next token, so that a model can write its answer step by step.
    """

    symbols: tuple[str, ...]
    level_name: str
    writes_chain = False

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
    share_N = (_hash(item_NI) >> np.uint64(32)) % np.uint64(_SHARES)
    return np.where(share_N < 2, share_N + np.uint64(1), np.uint64(0)).astype(np.uint8)


def draw(make: Callable[[int], Ints], count: int, split: Split, *, seen: float = 1) -> Ints:
    """Return ``count`` items of ``split``: [count, I].

    Args:
        make: returns that many random items, each a row of numbers.
        count: number of items.
        split: items of other splits are dropped.
        seen: share of the training items that occur; the others never do. Other splits are not affected.

    Raises:
        UserError: no item belongs to the split, because the task has only a few.
    """
    wanted, kept, have, tried = SPLITS.index(split), list[Ints](), 0, 0
    rate = 1 / _SHARES if wanted else (1 - 2 / _SHARES) * seen
    while have < count:
        item_NI = make(int((count - have) / rate * 1.1) + 64)
        belongs_N = split_of(item_NI) == wanted
        if not wanted and seen < 1:
            belongs_N &= _is_seen(item_NI, seen)
        kept.append(item_NI[belongs_N])
        have, tried = have + len(kept[-1]), tried + len(item_NI)
        fix = (
            "the task has too few different items; give its keys larger values, or data.seq_length where items fill it"
        )
        require(have > 0 or tried * rate < _PATIENCE, "data.task: items of the split", split, fix)
    return np.concatenate(kept)[:count]


def require_length(task: str, length: int, needed: int) -> None:
    """Raise a :class:`UserError` if a sample of ``length`` tokens does not hold an item of ``needed`` tokens."""
    if length < needed:
        fix = f"an item of data.task.{task} has up to {needed} tokens; give at least as many, or make its items smaller"
        raise UserError(f"data.seq_length: {length} is not allowed; {fix}")


def _is_seen(item_NI: Ints, seen: float) -> NDArray[np.bool_]:
    """Return True for a share of all items; other bits of the hash decide it than those of the split."""
    fraction_N = (_hash(item_NI) >> np.uint64(40)).astype(np.float64) / (1 << 24)
    return np.asarray(fraction_N < seen)


def _hash(item_NI: Ints) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        hash_N = np.full(len(item_NI), item_NI.shape[1], np.uint64)
        for column_N in np.ascontiguousarray(item_NI.T).view(np.uint64):
            hash_N = (hash_N ^ column_N) * _MULTIPLIER
            hash_N ^= hash_N >> np.uint64(29)
        return hash_N * _MIXER
