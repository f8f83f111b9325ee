"""What holds for every synthetic task: vocabulary, determinism, shapes, and any configuration in the allowed ranges."""

import dataclasses
import json
import random
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline.synthetic.registry import TASKS, VERSION, fingerprint_of, open_task, tokenizer_of
from data_pipeline.synthetic.task import END, NO_LEVEL, SPLITS, Examples
from looplm.config import TaskConfig, WordProblemConfig
from looplm.failures import UserError
from tests.support.synthetic import open_named, samples

LENGTH = 80


def config_class(name: str) -> Any:
    return next(kind for kind in get_args(get_type_hints(TaskConfig)[name]) if kind is not type(None))


def check_examples(examples: Examples, count: int, length: int, symbols: int) -> None:
    """Check shapes and ranges."""
    for x_NS in examples:
        assert x_NS.shape == (count, length) and x_NS.dtype == np.int64
    labeled_NS = examples.level_NS != NO_LEVEL
    assert (examples.level_NS[labeled_NS] >= 0).all()
    assert examples.ids_NS.min() >= 0 and examples.ids_NS.max() < symbols
    assert examples.label_NS.min() >= 0 and examples.label_NS.max() < symbols
    assert not examples.label_NS[~labeled_NS].any()


def test_every_task_of_the_configuration_has_a_generator() -> None:
    assert list(TASKS) == [spec.name for spec in dataclasses.fields(TaskConfig)]


@pytest.mark.parametrize("name", TASKS)
def test_the_vocabulary_is_what_occurs(name: str) -> None:
    task = open_named(name, config_class(name)())
    assert task.symbols[0] == END and len(set(task.symbols)) == len(task.symbols)
    drawn = samples(task, 3000, LENGTH)
    seen = set(np.unique(drawn.ids_NS).tolist()) | set(np.unique(drawn.label_NS).tolist())
    assert seen | {0} == set(range(len(task.symbols)))
    tokenizer = Tokenizer.from_str(tokenizer_of(task))
    assert tokenizer.encode(" ".join(task.symbols)).ids == list(range(len(task.symbols)))


@pytest.mark.parametrize("name", TASKS)
def test_the_same_seed_makes_the_same_bytes(name: str) -> None:
    for split in SPLITS:
        one, two = (samples(open_named(name, config_class(name)()), 100, LENGTH, split, seed=3) for _ in range(2))
        assert [x_NS.tobytes() for x_NS in one] == [x_NS.tobytes() for x_NS in two]
        other = samples(open_named(name, config_class(name)()), 100, LENGTH, split, seed=4)
        assert not np.array_equal(one.ids_NS, other.ids_NS)


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_of_their_version(name: str) -> None:
    """A generator that returns something else needs another registry.VERSION, and new hashes here."""
    golden = json.loads((Path(__file__).parent / "golden_samples.json").read_text())
    drawn = samples(open_named(name, config_class(name)()), 50, LENGTH)
    found = sha256(b"".join(x_NS.tobytes() for x_NS in drawn)).hexdigest()
    assert (golden["version"], golden[name]) == (VERSION, found)


@pytest.mark.parametrize("name", TASKS)
def test_a_label_follows_from_what_was_read(name: str) -> None:
    task = open_named(name, config_class(name)())
    drawn = samples(task, 300, LENGTH)
    known: dict[tuple[int, ...], int] = {}
    for ids_S, label_S, level_S in zip(*drawn, strict=True):
        for position in np.flatnonzero(level_S != NO_LEVEL):
            prefix = tuple(ids_S[: position + 1].tolist())
            if name != "capo":  # the next word of a biography is free
                assert known.setdefault(prefix, int(label_S[position])) == label_S[position]


def random_config(name: str, rng: random.Random) -> Any:
    """Return a configuration of small random numbers, or raise as it does."""
    values: dict[str, Any] = {}
    specs: tuple[Any, ...] = dataclasses.fields(config_class(name))
    for spec in specs:
        if spec.name == "group":
            values[spec.name] = rng.choice(("S3", "A4", "S4", "Z2", "Z7", "A5"))
        elif isinstance(spec.default, tuple):
            values[spec.name] = tuple(rng.sample(range(1, 5), rng.randint(1, 3)))
        elif isinstance(spec.default, bool):
            values[spec.name] = rng.random() < 0.5
        elif isinstance(spec.default, float):
            values[spec.name] = rng.choice((0.1, 0.5, 1.0))
        elif spec.name == "prime":
            values[spec.name] = rng.choice((97, 101, 211))
        else:
            values[spec.name] = max(0, int(spec.default) + rng.randint(-2, 3))
    return config_class(name)(**values)


@pytest.mark.parametrize("name", TASKS)
def test_any_configuration_makes_samples_or_is_refused_in_one_line(name: str) -> None:
    rng, made = random.Random(0), 0
    for _ in range(120):
        length = rng.randint(2, 160)
        try:
            task = open_named(name, random_config(name, rng))
            for split in SPLITS:
                drawn = samples(task, 3, length, split, seed=rng.randrange(99))
                check_examples(drawn, 3, length, len(task.symbols))
                made += bool((drawn.level_NS != NO_LEVEL).any())
        except UserError as error:
            assert "\n" not in str(error) and str(error).startswith("data.") and ";" in str(error)
    assert made > 25


def test_a_fingerprint_depends_on_the_named_task_alone() -> None:
    prints = {fingerprint_of(TaskConfig(**{name: config_class(name)()})) for name in TASKS}
    assert len(prints) == len(TASKS)
    s3 = TaskConfig(word_problem=WordProblemConfig(group="S3"))
    assert fingerprint_of(s3) in prints
    assert fingerprint_of(TaskConfig(word_problem=WordProblemConfig(group="A5"))) not in prints
    assert len(open_task(s3).symbols) == 7
