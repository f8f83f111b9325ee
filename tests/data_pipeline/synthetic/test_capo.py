"""Biographies, and the bits that a model must hold to tell them."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest

from data_pipeline.synthetic import capo
from data_pipeline.synthetic.task import SPLITS, Task
from looplm.config import CapoConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples


def task(**keys) -> Task:
    return synthetic.open_named("capo", CapoConfig(**keys))


def biographies(words: Words) -> list[Words]:
    """Return the biographies without their first END; a sample's last END may only fill it."""
    texts = " ".join(words).split("<end>")
    return [text.split() for text in texts if text.strip()]


def answers(words: Words) -> Answers:
    last = max(index for index, word in enumerate(words) if word != "<end>")
    found = Answers()
    for position in range(last):
        word = words[position + 1]
        if word.startswith(("first", "middle", "last")):
            level = 1
        elif word.startswith("v"):
            level = 2 + int(word[1:].split(".")[0])
        else:
            level = 0
        found[position] = word, level
    return found


def items(words: Words) -> list[tuple[str, ...]]:
    return [tuple(word for word in biography if word.startswith("is")) for biography in biographies(words)]


def people_of(of: Task, split, count: int) -> dict[tuple[str, ...], frozenset[str]]:
    """Return every person's values, and see that each value follows its attribute and never changes."""
    people = dict[tuple[str, ...], frozenset[str]]()
    for words in synthetic.words_of(of, samples(of, count, 70, split)):
        for biography in biographies(words):
            name, told = tuple(biography[:3]), biography[3:]
            for word, value in zip(told[::2], told[1::2], strict=True):
                assert word.split(".")[0].removeprefix("is") == value.split(".")[0].removeprefix("v")
            assert people.setdefault(name, frozenset(told[1::2])) == frozenset(told[1::2])
    return people


def test_labels_are_the_next_tokens() -> None:
    for length in (14, 42, 100):
        check_labels(task(), samples(task(), 100, length), answers)
    check_levels(samples(task(attributes=3, wordings=6), 100, 30), {0, 1, 2, 3, 4})


def test_all_splits_tell_the_same_facts_about_everyone() -> None:
    train, valid, test = (people_of(task(), split, 400) for split in SPLITS)
    assert len(train) == 1000 and train == valid == test
    values = Counter(value for person in train.values() for value in person)
    assert len(values) == 5 * 32 and max(values.values()) < 80, "about 31 people for each value"
    assert train == people_of(task(wordings=9), "train", 400) and train != people_of(task(people_seed=1), "train", 400)


def test_nobody_occurs_twice_in_a_sample_and_all_are_told_equally_often() -> None:
    of = task(people=20)
    drawn = [biographies(words) for words in synthetic.words_of(of, samples(of, 1000, 14 * 7))]
    names = [[tuple(biography[:3]) for biography in sample] for sample in drawn]
    assert all(len(set(sample)) == len(sample) == 7 for sample in names)
    counts = Counter(name for sample in names for name in sample)
    assert len(counts) == 20 and max(counts.values()) < 1.15 * min(counts.values())
    assert sum(counts.values()) / 20 == 350


def test_splits_share_no_telling() -> None:
    check_disjoint(task(wordings=40), items, 70, 3000)
    check_shares(task(wordings=2), items, 14 * 4, math.factorial(5) * 2**5, per_sample=4)


def most_bits(config: CapoConfig) -> float:
    """Return the bits of a model that knows everything: its names are uniform over the N people."""
    return capo.bits_learned(config, name_loss=math.log(config.people), value_loss=0)


def test_a_perfect_memory_has_the_most_bits_and_ignorance_none() -> None:
    """Losses of the best model of the names as a sequence of tokens, counted from the people themselves."""
    config = CapoConfig(people=500, name_parts=16)
    of = task(people=500, name_parts=16)
    assert isinstance(of, capo.Capo)
    prefixes = defaultdict[tuple[int, ...], int](int)
    for name in of.name_PT.tolist():
        for part in range(4):
            prefixes[tuple(name[:part])] += 1
    losses = [
        sum(-math.log(prefixes[tuple(name[: part + 1])] / prefixes[tuple(name[:part])]) for part in range(3))
        for name in of.name_PT.tolist()
    ]
    assert np.mean(losses) == pytest.approx(math.log(500)), "names are uniform over the people"
    bits = capo.bits_learned(config, float(np.mean(losses)), 0.0)
    assert bits == pytest.approx(most_bits(config)) == pytest.approx(500 * (12 - math.log2(500) + 5 * 5))
    assert capo.bits_learned(config, 3 * math.log(16), 5 * math.log(32)) == pytest.approx(0)


def test_the_most_bits_are_close_to_the_logarithm_of_the_number_of_worlds() -> None:
    """An encoding needs log2 of the number of possible populations. The bound is below it, by N log2(e) at most."""
    config = CapoConfig(people=300, name_parts=20, attributes=4, values=10)
    worlds = math.comb(20**3, 300) * 10 ** (4 * 300)
    exact = math.log2(worlds)
    assert exact - 300 * math.log2(math.e) < most_bits(config) < exact


def test_half_of_the_values_known_is_half_of_their_bits() -> None:
    config = CapoConfig()
    unknown = capo.losses_of(config, {0: 9.0, 1: math.log(32), **{2 + a: math.log(32) for a in range(5)}})
    half = capo.losses_of(config, {0: 9.0, 1: math.log(32), **{2 + a: math.log(32) / 2 for a in range(5)}})
    assert unknown == pytest.approx((3 * math.log(32), 5 * math.log(32)))
    assert capo.bits_learned(config, *unknown) == pytest.approx(0)
    assert capo.bits_learned(config, *half) == pytest.approx(1000 * 5 * 5 / 2)


def test_the_bits_of_the_papers_own_population() -> None:
    """arXiv 2404.05405: log2(S0) of bioS is about 47.6 bits a person; here with five attributes of equal size."""
    values = (2 * 12 * 28 * 200 * 200 * 300 * 100 * 263) ** 0.2
    assert 5 * math.log2(values) == pytest.approx(47.6, abs=0.05)
    config = CapoConfig(people=1000, name_parts=543, values=round(values))  # 400 * 400 * 1000 names
    assert most_bits(config) / 1000 == pytest.approx(47.6 + math.log2(400 * 400 * 1000 / 1000), abs=0.1)


@pytest.mark.parametrize("length", [13, 15 * 14])
def test_a_sample_that_holds_nobody_or_more_than_everyone_is_refused(length: int) -> None:
    with pytest.raises(UserError, match=rf"^data\.seq_length: {length} is not allowed; .*give at (least|most)"):
        samples(task(people=14), 1, length)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name_parts": 9}, r"capo\.people: 1000 is not allowed; .*name_parts=9 makes 729 names"),
        ({"wordings": 1}, r"capo\.wordings: 1 is not allowed; there are only 120 ways"),
        ({"values": 1}, r"capo\.values: 1 is not allowed"),
        ({"values": 2**62}, r"capo\.values: \d+ is not allowed; give a number of at least 2 and at most 10000$"),
        ({"wordings": 2**62}, r"capo\.wordings: \d+ is not allowed; give a number above 0 and at most 10000$"),
        (
            {"people": 10**9, "name_parts": 2000},
            r"people: \d+ is not allowed; give a number above 0 and at most 20000000$",
        ),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        CapoConfig(**keys)
