"""Questions over a world, answered with the facts that training itself tells."""

import pytest

from data_pipeline.synthetic.task import Task
from looplm.config import MultiHopConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, check_levels, check_shares, samples


def task(**keys) -> Task:
    return synthetic.open_named("multi_hop", MultiHopConfig(**keys))


def questions_of(words: Words) -> list[Words]:
    questions: list[Words] = []
    for word in words:
        if word.startswith("e"):
            questions.append([word])
        elif word != "<end>":
            questions[-1].append(word)
    return questions


def facts_of(of: Task) -> dict[tuple[str, str], str]:
    """Return every fact, read from the one-hop questions of training."""
    drawn, facts = samples(of, 2000, 40), dict[tuple[str, str], str]()
    for words, labels in zip(synthetic.words_of(of, drawn), synthetic.labels_of(of, drawn), strict=True):
        for position, (word, level) in labels.items():
            if level == 1:
                fact = words[position - 1], words[position]
                assert facts.setdefault(fact, word) == word
    return facts


def reader(facts: dict[tuple[str, str], str]):
    def answers(words: Words) -> Answers:
        found, place = Answers(), 0
        for entity, *relations in questions_of(words):
            for relation in relations:
                entity = facts[entity, relation]
            place += 1 + len(relations)
            found[place - 1] = entity, len(relations)
        assert set(words[place:]) <= {"<end>"}
        return found

    return answers


def items(words: Words) -> list[tuple[str, ...]]:
    return [tuple(question) for question in questions_of(words) if len(question) > 2]


def test_answers_follow_from_the_facts_that_training_tells() -> None:
    facts = facts_of(task())
    assert len(facts) == 4 * 8 * 20
    layers = [(int(start[1:].split(".")[0]), int(end[1:].split(".")[0])) for (start, _), end in facts.items()]
    assert all(after == before + 1 for before, after in layers)
    check_labels(task(), samples(task(), 300, 30), reader(facts))
    check_labels(task(), samples(task(), 300, 30, "test"), reader(facts))
    check_labels(task(max_hops=4, min_hops=4), samples(task(max_hops=4, min_hops=4), 300, 12), reader(facts))


def test_levels_are_equally_frequent_and_only_training_asks_for_facts() -> None:
    drawn = samples(task(), 2000, 60)
    check_levels(drawn, {1, 2, 3})
    counts = [int((drawn.level_NS == level).sum()) for level in (1, 2, 3)]
    assert max(counts) < 1.05 * min(counts)
    check_levels(samples(task(), 500, 60, "valid"), {2, 3})
    check_levels(samples(task(min_hops=3, max_hops=4), 500, 60), {3, 4})


def test_the_world_depends_on_its_own_seed_alone() -> None:
    assert facts_of(task()) == facts_of(task(max_hops=2, seen=0.5))
    assert facts_of(task()) != facts_of(task(world_seed=1))


def test_splits_share_no_question() -> None:
    check_disjoint(task(entities=300, relations=30, seen=1.0), items, 30, 3000)
    check_shares(task(layers=3, max_hops=2, min_hops=2, seen=1.0), items, 9, 20 * 8 * 8, per_sample=3)


@pytest.mark.parametrize("seen", [0.1, 0.5])
def test_training_asks_the_given_share_of_its_questions(seen: float) -> None:
    total = 20 * 8 * 8
    few = task(layers=3, max_hops=2, min_hops=2, seen=seen)
    found = synthetic.items_by_split(few, items, 9, {"train": 4000, "valid": 1000, "test": 1000})
    assert len(found["train"]) / total == pytest.approx(14 / 16 * seen, abs=0.05)
    assert len(found["test"]) / total == pytest.approx(1 / 16, abs=0.02)


def test_a_sample_too_short_for_the_longest_question_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 3 is not allowed; .*multi_hop.* 4 tokens"):
        samples(task(), 1, 3)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_hops": 5}, r"multi_hop\.max_hops: 5 is not allowed; give a number below .*layers=5"),
        ({"min_hops": 4}, r"multi_hop\.max_hops: 3 is not allowed; give at least .*min_hops=4"),
        ({"seen": 0.0}, r"multi_hop\.seen: 0\.0 is not allowed"),
        ({"entities": 10**9}, r"multi_hop\.entities: 1000000000 is not allowed; give a number of .* at most 100000$"),
        ({"layers": 2**62}, r"multi_hop\.layers: \d+ is not allowed; give a number of at least 3 and at most 1000$"),
        ({"relations": 2**62}, r"multi_hop\.relations: \d+ is not allowed; give a number above 0 and at most 10000$"),
        (
            {"entities": 10_000, "relations": 1000},
            r"entities: 10000 is not allowed; layers x entities x relations are 50,000,000; give at most 10,000,000 of",
        ),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        MultiHopConfig(**keys)
