"""Chains of sums against Python's integers."""

import re

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import SumsConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples

CHAIN = re.compile(r"((?:\d\d[+-])*\d\d)=")


def task(**keys) -> Task:
    return synthetic.open_named("sums", SumsConfig(**keys))


def text_of(words: Words) -> str:
    assert all(len(word) == 1 or word == "<end>" for word in words)
    return "".join(words).replace("<end>", "_")


def total(chain: str) -> int:
    result = 0
    for sign, number in re.findall(r"([+-]?)(\d\d)", chain):
        result += int(number[::-1]) * (-1 if sign == "-" else 1)
        assert result >= 0
    return result


def reader(digits: int):
    def answers(words: Words) -> Answers:
        found, text, place = Answers(), text_of(words), 0
        while chain := CHAIN.match(text, place):
            reverse = f"{total(chain[1]):0{digits}d}"[::-1]
            terms = chain[1].count("+") + chain[1].count("-") + 1
            for index, digit in enumerate(reverse):
                found[chain.end() - 1 + index] = digit, terms
            place = chain.end() + digits - 1
            assert text[chain.end() : place] == reverse[:-1]
        assert set(text[place:]) <= {"_"}
        return found

    return answers


def items(words: Words) -> list[str]:
    text, place, found = text_of(words), 0, []
    while chain := CHAIN.match(text, place):
        found.append(chain[1])
        place = chain.end() + 2
    return found


@pytest.mark.parametrize(("most", "digits"), [(2, 3), (5, 3), (10, 3), (12, 5)])
def test_labels_are_the_digits_of_the_value(most: int, digits: int) -> None:
    of = task(max_terms=most, answer_digits=digits)
    check_labels(of, samples(of, 300, 3 * most + digits + 20), reader(digits))
    check_labels(of, samples(of, 50, 3 * most + digits - 1, "test"), reader(digits))


def test_every_number_of_terms_and_both_operators_occur() -> None:
    drawn = samples(task(min_terms=3, max_terms=6), 500, 60)
    check_levels(drawn, {3, 4, 5, 6})
    plus, minus = ((drawn.ids_NS == task().symbols.index(sign)).sum() for sign in "+-")
    assert 0.25 < minus / (plus + minus) < 0.5


def test_splits_share_no_chain() -> None:
    check_disjoint(task(min_terms=3), items, 40, 6000)
    check_shares(task(max_terms=2), items, 8, 90 * 90 + 90 * 91 // 2)


def test_a_sample_too_short_for_the_longest_chain_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 16 is not allowed; .*sums.* 17 tokens"):
        samples(task(), 1, 16)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_terms": 11}, r"sums\.max_terms: 11 is not allowed; .*answer_digits=3 hold sums of 10 numbers"),
        ({"min_terms": 6}, r"sums\.max_terms: 5 is not allowed"),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        SumsConfig(**keys)
