"""Successors on a cycle against a walk along the pairs."""

import numpy as np
import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import DepoConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples


def task(**keys) -> Task:
    return synthetic.open_named("depo", DepoConfig(**keys))


def pairs_of(words: Words) -> dict[str, str]:
    first_question = next(index for index, word in enumerate(words) if word.startswith("k")) - 1
    return dict(zip(words[:first_question:2], words[1:first_question:2], strict=True))


def answers(words: Words) -> Answers:
    successor, node, found = pairs_of(words), "", Answers()
    for position, word in enumerate(words[2 * len(successor) :], 2 * len(successor)):
        if word.startswith("k"):
            hops, reached = int(word[1:]), node
            for _ in range(hops):
                reached = successor[reached]
            found[position] = reached, hops
        node = word if word.startswith("n") else node
    return found


def items(words: Words) -> list[tuple[tuple[str, str], ...]]:
    return [tuple(sorted(pairs_of(words).items()))]


@pytest.mark.parametrize("keys", [{}, {"names": 40, "max_nodes": 20, "hops": (1, 5, 2)}, {"min_nodes": 12}])
def test_labels_are_those_of_a_walk_along_the_pairs(keys) -> None:
    check_labels(task(**keys), samples(task(**keys), 200, 80), answers)
    check_labels(task(**keys), samples(task(**keys), 50, 45, "valid"), answers)


def test_the_pairs_are_one_cycle_of_each_size() -> None:
    sizes = set()
    for words in synthetic.words_of(task(), samples(task(), 300, 40)):
        successor = pairs_of(words)
        start = node = words[0]
        walked = [node := successor[node] for _ in successor]
        assert node == start and set(walked) == set(successor)
        sizes.add(len(successor))
    assert sizes == set(range(6, 13))


def test_most_positions_after_the_pairs_have_labels_and_every_level_occurs() -> None:
    drawn = samples(task(), 1000, 64)
    check_levels(drawn, {1, 2, 3, 4})
    assert (drawn.level_NS > 0).mean() > 0.5
    assert (drawn.level_NS[:, 24:] > 0).mean() > 0.75


def test_pairs_and_questions_come_in_every_order() -> None:
    drawn = samples(task(names=6, max_nodes=6, hops=(1, 2)), 2000, 15)
    assert len({tuple(row) for row in drawn.level_NS[:, 13:].tolist()}) == 2
    assert len(np.unique(drawn.ids_NS[:, 0])) == len(np.unique(drawn.ids_NS[:, 12])) == 6


def test_splits_share_no_cycle() -> None:
    check_disjoint(task(), items, 29, 11_000)
    check_shares(task(names=8, min_nodes=8, max_nodes=8, hops=(1,)), items, 18, 5040)


def test_a_sample_too_short_for_a_question_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 28 is not allowed; .*depo.* 29 tokens"):
        samples(task(), 1, 28)
    samples(task(), 1, 29)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_nodes": 13}, r"depo\.max_nodes: 12 is not allowed; give at least data\.task\.depo\.min_nodes=13"),
        ({"names": 11}, r"depo\.names: 11 is not allowed; give at least data\.task\.depo\.max_nodes=12"),
        ({"hops": (1, 6)}, r"depo\.hops: \[1, 6\] is not allowed; give numbers below"),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        DepoConfig(**keys)
