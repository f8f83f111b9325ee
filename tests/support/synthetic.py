"""Checks that every synthetic task passes, given a slow reader of its text that is written for the test alone.

A reader sees the words of one sample. ``answers`` returns what the labels must be, by position: a word and a level.
``items`` returns what no two splits may share.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from data_pipeline.synthetic.registry import open_task
from data_pipeline.synthetic.task import NO_LEVEL, SPLITS, Examples, Split, Task
from looplm.config import TaskConfig

Words = list[str]
Answers = dict[int, tuple[str, int]]
AnswerReader = Callable[[Words], Answers]
ItemReader = Callable[[Words], Sequence[Hashable]]

SHARES = {"train": 14 / 16, "valid": 1 / 16, "test": 1 / 16}


def named(name: str, config: Any) -> TaskConfig:
    return TaskConfig(**{name: config})


def samples(task: Task, count: int, length: int, split: Split = "train", seed: int = 0) -> Examples:
    return task.generate(np.random.Generator(np.random.Philox([seed, SPLITS.index(split)])), count, length, split)


def words_of(task: Task, examples: Examples) -> Iterator[Words]:
    for ids_S in examples.ids_NS:
        yield [task.symbols[index] for index in ids_S]


def labels_of(task: Task, examples: Examples) -> Iterator[Answers]:
    for label_S, level_S in zip(examples.label_NS, examples.level_NS, strict=True):
        yield {int(s): (task.symbols[label_S[s]], int(level_S[s])) for s in np.flatnonzero(level_S != NO_LEVEL)}


def check_labels(task: Task, examples: Examples, answers: AnswerReader) -> None:
    """Compare every label and level with the reader's, and see that a wrong one is caught."""
    pairs = zip(words_of(task, examples), labels_of(task, examples), strict=True)
    for words, labels in pairs:
        assert labels == answers(words), " ".join(words)
    row, position = next(zip(*np.nonzero(examples.level_NS != NO_LEVEL), strict=True))
    wrong = Examples(*(x_NS[row : row + 1].copy() for x_NS in examples))
    wrong.label_NS[0, position] = (wrong.label_NS[0, position] + 1) % len(task.symbols)
    assert next(labels_of(task, wrong)) != answers(next(words_of(task, wrong)))


def check_levels(examples: Examples, levels: set[int]) -> None:
    assert set(np.unique(examples.level_NS).tolist()) - {NO_LEVEL} == levels


def items_by_split(task: Task, items: ItemReader, length: int, counts: dict[Split, int]) -> dict[str, set[Hashable]]:
    found = dict[str, set[Hashable]]()
    for split, count in counts.items():
        drawn = samples(task, count, length, split)
        found[split] = {item for words in words_of(task, drawn) for item in items(words)}
    return found


def check_disjoint(task: Task, items: ItemReader, length: int, count: int, least: int = 10_000) -> None:
    """Draw ``count`` samples of each split, of at least ``least`` different items: no item is in two of them."""
    train, valid, test = items_by_split(task, items, length, dict.fromkeys(SPLITS, count)).values()
    assert min(len(train), len(valid), len(test)) >= least, (len(train), len(valid), len(test))
    assert not train & valid and not train & test and not valid & test


def check_shares(task: Task, items: ItemReader, length: int, total: int, per_sample: int = 1) -> None:
    """Draw nearly all of a small task's ``total`` items: each split has its share of them, and no other exists."""
    counts: dict[Split, int] = {split: int(12 * total * SHARES[split] / per_sample) for split in SPLITS}
    found = items_by_split(task, items, length, counts)
    sizes = {split: len(of_split) for split, of_split in found.items()}
    assert 0.995 * total <= sum(sizes.values()) <= total
    for split, size in sizes.items():
        expected = total * SHARES[split]
        assert size == pytest.approx(expected, abs=5 * (total / 16) ** 0.5), (split, size, expected)


def open_named(name: str, config: Any) -> Task:
    return open_task(named(name, config))
