"""Prefix arithmetic against a recursive evaluation."""

from collections import Counter

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import ManoConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples


def task(**keys) -> Task:
    return synthetic.open_named("mano", ManoConfig(**keys))


def evaluate(words: Words, place: int, modulus: int, parts: Answers) -> tuple[int, int, int]:
    """Return the value, the operators and the end of the part that begins at ``place``; note larger parts later."""
    if words[place] not in "+-*":
        return int(words[place]), 0, place + 1
    a, left, middle = evaluate(words, place + 1, modulus, parts)
    b, right, end = evaluate(words, middle, modulus, parts)
    value = {"+": a + b, "-": a - b, "*": a * b}[words[place]] % modulus
    parts[end - 1] = str(value), left + right + 1
    return value, left + right + 1, end


def reader(modulus: int, dense: bool = False):
    def answers(words: Words) -> Answers:
        found, place = Answers(), 0
        while place < len(words) and words[place] != "<end>":
            parts = Answers()
            value, operators, place = evaluate(words, place, modulus, parts)
            assert words[place] == "="
            found[place] = str(value), operators
            found.update(parts if dense else {})
            place += 1
        assert set(words[place:]) <= {"<end>"}
        return found

    return answers


def items(words: Words) -> list[str]:
    return [text.strip() for text in " ".join(words).split("=") if "<" not in text and text.strip()]


@pytest.mark.parametrize(("modulus", "dense", "most"), [(5, False, 1), (11, True, 4), (23, False, 10), (7, True, 3)])
def test_labels_are_those_of_a_recursive_evaluation(modulus: int, dense: bool, most: int) -> None:
    of = task(modulus=modulus, dense=dense, max_operators=most)
    check_labels(of, samples(of, 200, 2 * most + 20), reader(modulus, dense))
    check_labels(of, samples(of, 50, 2 * most + 2, "test"), reader(modulus, dense))


def test_every_number_of_operators_is_as_frequent_as_the_others() -> None:
    drawn = samples(task(min_operators=2, max_operators=5), 2000, 100)
    check_levels(drawn, {2, 3, 4, 5})
    counts = Counter(drawn.level_NS[drawn.level_NS > 0].tolist())
    assert max(counts.values()) < 1.05 * min(counts.values())


def test_expressions_have_every_shape() -> None:
    of = task(min_operators=3, max_operators=3)
    texts = [item for words in synthetic.words_of(of, samples(of, 500, 8)) for item in items(words)]
    shapes = {"".join("o" if word in "+-*" else "n" for word in text.split()) for text in texts}
    assert shapes == {"ooonnnn", "oonnonn", "oononnn", "onoonnn", "onononn"}


def test_samples_are_full() -> None:
    drawn = samples(task(), 500, 64)
    assert ((drawn.ids_NS == 0).sum(axis=1) < 10).all(), "an expression of 10 tokens still fits"


def test_splits_share_no_expression() -> None:
    check_disjoint(task(min_operators=3, modulus=23), items, 40, 4000)
    check_shares(task(modulus=23, max_operators=1), items, 4, 3 * 23**2)


def test_a_sample_too_short_for_the_longest_expression_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 9 is not allowed; .*mano.* 10 tokens"):
        samples(task(), 1, 9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modulus": 24}, r"mano\.modulus: 24 is not allowed"),
        (
            {"min_operators": 5},
            r"mano\.max_operators: 4 is not allowed; give at least .*min_operators=5",
        ),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        ManoConfig(**keys)
