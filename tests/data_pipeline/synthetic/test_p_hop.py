"""Dense p-hop induction against a search through the letters."""

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import PHopConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples


def task(**keys) -> Task:
    return synthetic.open_named("p_hop", PHopConfig(**keys))


def answers(words: Words) -> Answers:
    hops, letters = int(words[0].removeprefix("hop")), words[1:]
    found: Answers = {}
    for start in range(len(letters)):
        place: int | None = start
        for _ in range(hops):
            before = [j for j in range(1, (place or 0) + 1) if letters[j - 1] == letters[place or 0]]
            place = max(before) if place is not None and before else None
        if place is not None:
            found[start + 1] = letters[place], hops
    return found


def items(words: Words) -> list[str]:
    return [" ".join(words[1:])]


@pytest.mark.parametrize("length", [11, 40])
def test_labels_are_those_of_a_search_through_the_letters(length: int) -> None:
    check_labels(task(), samples(task(), 300, length), answers)
    check_labels(task(alphabet=3, hops=(3,)), samples(task(alphabet=3, hops=(3,)), 100, length, "test"), answers)


def test_every_number_of_hops_occurs() -> None:
    check_levels(samples(task(), 1000, 30), {1, 2, 4, 8})
    check_levels(samples(task(alphabet=3, hops=(4,)), 2000, 7), {4})


def test_no_two_neighbors_are_equal() -> None:
    drawn = samples(task(), 500, 30)
    assert (drawn.ids_NS[:, 1:-1] != drawn.ids_NS[:, 2:]).all()


def test_splits_share_no_sequence() -> None:
    check_disjoint(task(), items, 20, 12_000)
    check_shares(task(alphabet=3, hops=(1,)), items, 13, 3 * 2**11)


def test_a_sample_too_short_for_the_hops_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 10 is not allowed; .*p_hop.* 11 tokens; give at least"):
        samples(task(), 1, 10)


def test_a_task_with_too_few_sequences_is_refused() -> None:
    with pytest.raises(UserError, match=r"items of the split: 'test' is not allowed; .* too few"):
        samples(task(alphabet=3, hops=(1,)), 1, 4, "test")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alphabet": 2}, r"data\.task\.p_hop\.alphabet: 2 is not allowed"),
        ({"hops": ()}, r"data\.task\.p_hop\.hops: \[\] is not allowed; give at least one"),
        ({"hops": (1, 1)}, r"data\.task\.p_hop\.hops: \[1, 1\] is not allowed; give each number once"),
        ({"hops": (0,)}, r"data\.task\.p_hop\.hops: 0 is not allowed"),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        PHopConfig(**keys)
