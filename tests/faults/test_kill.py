"""kill -9 of one rank or of all ranks, at any moment: the resumed run equals the uninterrupted one."""

import random
import signal
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from looplm.config import RunConfig
from tests.faults import harness
from tests.support.tiny import run_config

pytestmark = pytest.mark.slow
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two replicas": (2, {"distributed_optimizer": True}),
    "tensor parallel": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
}
STEPS = 8
KILLED = -signal.SIGKILL


class Reference(NamedTuple):
    """An uninterrupted run."""

    rows: list[tuple[str, ...]]
    samples: dict[int, list[int]]
    events: list[list[str]]  # of each rank


def config_of(layout: str, corpus: Path, folder: Path) -> RunConfig:
    return run_config(
        corpus,
        folder,
        optim={"train_steps": STEPS},
        parallel=LAYOUTS[layout][1],
        checkpoint={"save_every": 2},
        logging={"eval_every": 3, "tensorboard": False},
    )


@pytest.fixture(scope="module")
def references(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that trains without interruption in a layout, once."""

    @cache
    def reference(layout: str) -> Reference:
        config, ranks = config_of(layout, corpus, tmp_path_factory.mktemp("whole") / "run"), LAYOUTS[layout][0]
        harness.complete(config, ranks, harness.killed_at(config, 0, None))
        folder = config.output_dir
        found = Reference(
            harness.exact_rows(folder),
            harness.samples_by_step(folder),
            [harness.events(config, rank) for rank in range(ranks)],
        )
        assert [row[0] for row in found.rows] == [str(step) for step in range(1, STEPS + 1)]
        assert list(chain.from_iterable(found.samples.values())) == list(range(4 * STEPS)), "each once, in order"
        return found

    return reference


def moments(events: list[str], count: int, seed: str) -> list[int]:
    """Return numbers of random events: half of them in saves, the others in anything."""
    numbers = range(1, int(0.9 * len(events)))
    saving = [number for number in numbers if "checkpoints" in events[number - 1]] or list(numbers)
    draw = random.Random(seed)
    return [draw.choice(saving if index % 2 else numbers) for index in range(count)]


def survive(config: RunConfig, ranks: int, whole: Reference, victim: int, event: int, all_ranks: bool) -> None:
    """Kill a run at an event, resume it, and compare it with the uninterrupted one."""
    label = f"rank {victim} killed at {whole.events[victim][event - 1]} (event {event})"
    with harness.Job(config, ranks, harness.killed_at(config, victim, event)) as job:
        if all_ranks:
            job.wait_for_a_death()
            job.kill_all()
        ends = job.ends()
    assert ends[victim].status == KILLED, f"{label}: ended with {ends[victim].status}\n{ends[victim].output[-2000:]}"
    for rank, end in enumerate(ends):
        if not all_ranks and rank != victim:
            assert (end.status, end.last_line[:14]) == (4, f"error: rank {rank}:"), f"{label}:\n{end.output[-3000:]}"
    harness.complete(config, ranks)
    assert harness.exact_rows(config.output_dir) == whole.rows, label
    assert harness.samples_by_step(config.output_dir) == whole.samples, label
    assert not harness.leftovers(config.output_dir), label


@pytest.mark.promise(
    text="After kill -9 in a step and in a save, a run on two ranks resumes as if nothing had happened",
    expected="losses equal to the bit, no sample lost or repeated, nothing left behind",
)
def test_two_kills(corpus: Path, tmp_path: Path, references: Any, record_property: Any) -> None:
    whole = references("two replicas")
    in_step = whole.events[1].index("all_reduce", len(whole.events[1]) // 2) + 1
    saves = [number for number, event in enumerate(whole.events[0], 1) if ".step_00000004.partial/" in event]
    for name, victim, event, all_ranks in (("a", 1, in_step, False), ("b", 0, saves[-1], True)):
        survive(config_of("two replicas", corpus, tmp_path / name), 2, whole, victim, event, all_ranks)
    record_property("seen", "both resumed runs equal the uninterrupted one")


@pytest.mark.hard
@pytest.mark.parametrize("who", ["one rank", "all ranks"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.promise(
    text="After kill -9 of one rank or of all ranks at random moments, half of them in saves, a run resumes as if "
    "nothing had happened, in every layout",
    expected="losses equal to the bit, no sample lost or repeated, nothing left behind",
)
def test_kills_at_random_moments(
    corpus: Path, tmp_path: Path, references: Any, record_property: Any, layout: str, who: str
) -> None:
    ranks, whole = LAYOUTS[layout][0], references(layout)
    if ranks == 1 and who == "one rank":
        pytest.skip("the same as all ranks")
    for index in range(7):
        victim = index % ranks
        (event,) = moments(whole.events[victim], 1, f"{layout} {who} {index}")
        config = config_of(layout, corpus, tmp_path / str(index))
        survive(config, ranks, whole, victim, event, who == "all ranks")
    record_property("seen", "7 of 7 resumed runs equal the uninterrupted one")
