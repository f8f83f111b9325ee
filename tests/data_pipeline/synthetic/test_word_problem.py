"""Products of words against permutations that are applied one after the other, and chains of such products."""

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import WordProblemConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, samples


def task(**keys) -> Task:
    return synthetic.open_named("word_problem", WordProblemConfig(**keys))


def then(first: str, second: str) -> str:
    """Return the permutation that applies ``first`` and then ``second``; "231" maps 1 to 2, 2 to 3 and 3 to 1."""
    return "".join(second[int(image) - 1] for image in first)


def products(letters: Words) -> Words:
    found: Words = []
    for letter in letters:
        found.append(then(letter, found[-1]) if found else letter)  # a b: first b, then a
    return found


def answers(words: Words) -> Answers:
    assert words[0] == "<end>"
    return {place: (product, place) for place, product in enumerate(products(words[1:]), start=1)}


def chain_answers(words: Words) -> Answers:
    letters = (len(words) - 1) // 2
    chain = products(words[1 : letters + 1])
    rest = len(words) - 2 * letters - 1
    assert words[0] == "<end>" and words[letters + 1 :] == ["<end>", *chain[:-1], *["<end>"] * rest]
    return {letters + place: (product, place) for place, product in enumerate(chain, start=1)}


def word_of(length: int):
    return lambda words: [tuple(words[1 : length + 1])]


@pytest.mark.parametrize("group", ["S3", "A4", "S4", "A5"])
def test_the_label_of_every_position_is_the_product_so_far(group: str) -> None:
    opened = task(group=group)
    drawn = samples(opened, 300, 9)
    check_labels(opened, drawn, answers)
    check_levels(drawn, set(range(1, 9)))


def test_a_group_of_numbers_adds_modulo() -> None:
    def sums(words: Words) -> Answers:
        return {end: (str(sum(map(int, words[1 : end + 1])) % 7), end) for end in range(1, len(words))}

    opened = task(group="Z7")
    check_labels(opened, samples(opened, 300, 9), sums)


@pytest.mark.parametrize("length", [7, 8, 33])
def test_a_chain_writes_the_products_after_the_word(length: int) -> None:
    opened = task(chain=True)
    assert opened.writes_chain and not task().writes_chain
    drawn = samples(opened, 300, length)
    check_labels(opened, drawn, chain_answers)
    check_levels(drawn, set(range(1, (length - 1) // 2 + 1)))


@pytest.mark.parametrize(("chain", "length"), [(False, 9), (True, 17)])
def test_no_word_is_in_two_splits(chain: bool, length: int) -> None:
    check_disjoint(task(chain=chain), word_of(8), length, 20_000)


def test_a_sample_too_short_for_a_chain_is_refused() -> None:
    with pytest.raises(UserError, match=r"data.seq_length: 2 is not allowed"):
        samples(task(chain=True), 1, 2)
