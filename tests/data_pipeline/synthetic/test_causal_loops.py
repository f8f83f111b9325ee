"""Programs against an interpreter that reads their text."""

from collections.abc import Iterator

import numpy as np
import pytest

from data_pipeline.synthetic.task import NO_LEVEL, Task
from looplm.config import CausalLoopsConfig
from looplm.failures import UserError
from tests.support import synthetic
from tests.support.synthetic import Answers, Words, check_disjoint, check_labels, samples


def task(**keys) -> Task:
    return synthetic.open_named("causal_loops", CausalLoopsConfig(**keys))


class Interpreter:
    """Runs one program of a sample: values and steps by variable, and the labels of its tokens."""

    def __init__(self, words: Words, place: int, prime: int) -> None:
        self.words, self.place, self.prime = words, place, prime
        self.value, self.steps, self.labels = dict[str, int](), dict[str, int](), Answers()
        self.loops = self.deepest = self.rules = self.applied = 0
        self.joins = False
        while self.words[self.place].startswith("n") and self.words[self.place + 1].isdigit():
            self.value[words[self.place]], self.steps[words[self.place]] = int(words[self.place + 1]), 0
            self.place += 2
        start = self.place
        self.block(depth=0)
        kind = {0: 3 if self.joins else 1, 1: 2, 2: 4}[self.deepest]
        assert words[self.place] == "?", words[start:]
        self.place += 1
        asked = words[self.place : self.place + len(self.value)]
        assert sorted(asked) == sorted(self.value)
        for variable in asked:
            self.labels[self.place] = str(self.value[variable]), self.steps[variable]
            self.place += 1
        self.kind = kind
        self.labels = {place: (word, 100 * kind + steps) for place, (word, steps) in self.labels.items()}

    def block(self, depth: int) -> None:
        """Run rules and loops until the block ends."""
        self.deepest = max(self.deepest, depth)
        while self.words[self.place] not in ("end", "?"):
            if self.words[self.place] == "loop":
                begin, limit = self.place + 2, int(self.words[self.place + 1])
                for _ in range(limit):
                    self.place, before = begin, dict(self.value)
                    self.block(depth + 1)
                    if self.value == before:
                        break
                assert self.words[self.place] == "end"
                self.place += 1
            else:
                self.rule()

    def rule(self) -> None:
        target, source, operation, operand = self.words[self.place : self.place + 4]
        self.joins |= operand.startswith("n")
        a, b = self.value[source], self.value[operand] if operand.startswith("n") else int(operand)
        result = {"+": a + b, "-": a - b, "*": a * b, "mod": a % b if operation == "mod" else 0}[operation]
        steps = 1 + max(self.steps[source], self.steps.get(operand, 0))
        self.value[target], self.steps[target] = result % self.prime, steps
        self.labels.setdefault(self.place + 3, (str(result % self.prime), steps))
        self.applied += 1
        self.place += 4


def programs_of(words: Words, prime: int = 97) -> Iterator[Interpreter]:
    place = 0
    while place < len(words) and words[place] != "<end>":
        program = Interpreter(words, place, prime)
        place = program.place
        yield program
    assert set(words[place:]) <= {"<end>"}


def reader(prime: int):
    def answers(words: Words) -> Answers:
        return {place: label for program in programs_of(words, prime) for place, label in program.labels.items()}

    return answers


def items(words: Words) -> list[str]:
    text = " ".join(words).replace("<end>", "")
    parts, found = text.split("? "), []
    for part in parts[:-1]:
        words_left = part.split()
        while words_left and not (len(words_left) > 1 and words_left[1].isdigit()):
            words_left.pop(0)  # the questions of the program before
        found.append(" ".join(words_left))
    return found


@pytest.mark.parametrize("kind", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"min_variables": 5, "max_variables": 8, "names": 12, "prime": 101},
        {"min_variables": 2, "max_variables": 2, "min_rules": 5, "max_rules": 7, "max_constant": 90},
        {"prime": 11},
    ],
)
def test_labels_are_those_of_an_interpreter(kind: int, keys) -> None:
    of = task(kinds=(kind,), **keys)
    drawn = samples(of, 200, 120)
    check_labels(of, drawn, reader(keys.get("prime", 97)))
    assert set(np.unique(drawn.level_NS // 100).tolist()) == {-1, kind}


def test_programs_without_end_stop_at_their_limit_and_settled_ones_before() -> None:
    of = task(kinds=(2, 4), max_passes=4, max_rules=4)
    drawn = [program for words in synthetic.words_of(of, samples(of, 300, 60)) for program in programs_of(words)]
    assert {program.kind for program in drawn} == {2, 4}
    applied = {program.applied for program in drawn if program.kind == 2}
    assert min(applied) == 6 and max(applied) == 16, "3 rules twice to 4 rules four times"
    check_labels(of, samples(of, 300, 60, "test"), reader(97))


def test_kinds_are_equally_frequent_and_steps_go_up_to_the_number_of_rules() -> None:
    drawn = samples(task(), 1500, 60)
    kinds, counts = np.unique(drawn.level_NS[drawn.level_NS != NO_LEVEL] // 100, return_counts=True)
    assert kinds.tolist() == [1, 2, 3, 4] and counts.max() < 2.5 * counts.min()
    levels = set(np.unique(drawn.level_NS).tolist())
    assert {100 + steps for steps in range(7)} <= levels and 107 not in levels
    assert {200 + steps for steps in range(1, 19)} <= levels and max(levels) > 420
    assert {level for level in levels if 300 <= level < 400} == {300, 301, 302, 303, 304}, "two paths run side by side"


def test_rules_and_variables_vary_independently() -> None:
    of = task(kinds=(1,), min_variables=2, max_variables=5, min_rules=3, max_rules=9, names=9)
    sizes = np.array(
        [
            (len(program.value), program.applied)
            for words in synthetic.words_of(of, samples(of, 2000, 52))
            for program in programs_of(words)
        ]
    )
    assert set(map(tuple, sizes.tolist())) == {(v, r) for v in range(2, 6) for r in range(3, 10)}
    assert abs(np.corrcoef(sizes.T)[0, 1]) < 0.05


def test_splits_share_no_program() -> None:
    check_disjoint(task(), items, 86, 6000)


def test_a_sample_too_short_for_the_longest_program_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.seq_length: 42 is not allowed; .*causal_loops.* 43 tokens"):
        samples(task(), 1, 42)
    with pytest.raises(UserError, match=r"37 tokens"):
        samples(task(kinds=(1, 3)), 1, 36)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prime": 99}, r"causal_loops\.prime: 99 is not allowed; give a prime number"),
        ({"prime": 3}, r"causal_loops\.prime: 3 is not allowed"),
        ({"kinds": (1, 5)}, r"causal_loops\.kinds: 5 is not allowed"),
        ({"kinds": ()}, r"causal_loops\.kinds: \[\] is not allowed"),
        ({"max_variables": 9}, r"causal_loops\.names: 8 is not allowed; give at least .*max_variables=9"),
        ({"max_rules": 12}, r"causal_loops\.max_rules: 12 is not allowed; .* up to 102 steps"),
        ({"max_constant": 97}, r"causal_loops\.max_constant: 97 is not allowed; give a number below"),
        ({"min_rules": 2}, r"causal_loops\.min_rules: 2 is not allowed"),
    ],
)
def test_wrong_keys_are_refused(keys, message) -> None:
    with pytest.raises(UserError, match=message):
        CausalLoopsConfig(**keys)
