"""kill -9 of one rank or of all ranks, at any moment: the resumed run equals the uninterrupted one."""

import random
import signal
from pathlib import Path
from typing import Any

import pytest

from looplm.config import RunConfig
from tests.faults import harness
from tests.faults.layouts import LAYOUTS, Reference, config_of

pytestmark = pytest.mark.slow
KILLED = -signal.SIGKILL


def moment(events: list[str], seed: str) -> harness.Moment:
    """Return a random moment: a save or the work of its writer, a step, an evaluation, or the start, in this order."""
    draw = random.Random(seed)
    kind = draw.choice(["save", "writer", "step", "save", "writer", "evaluation", "start"])
    chosen = [number for number, label in enumerate(events) if kind in label.partition(": ")[0] + label[:20]]
    number = draw.choice(chosen or range(len(events)))
    label = events[number]
    return harness.Moment(label, min(events[: number + 1].count(label), 5))  # while it waits, a rank polls often


def survive(config: RunConfig, ranks: int, whole: Reference, victim: int, at: harness.Moment, all_ranks: bool) -> bool:
    """Kill a run, resume it, and compare it with the uninterrupted one. Return False if it ended before the moment."""
    label = f"rank {victim} killed at {at}"
    with harness.Job(config, ranks, harness.killed_at(config, victim, at)) as job:
        if all_ranks:
            job.wait_for_a_death()
            job.kill_all()
        ends = job.ends()
    killed = harness.events(config, victim)[-1] == f"killed at {at.label}"
    for rank, end in enumerate(ends if killed and not all_ranks else []):
        report = f"{label}: rank {rank} ended with {end.status}\n{end.output[-3000:]}"
        if rank == victim:
            assert end.status == KILLED, report
        else:
            assert end.status == 4 and end.last_line.startswith(f"error: rank {rank}: "), report
            assert f"rank {victim} is not responding" in end.last_line, report
    harness.complete(config, ranks)
    assert harness.exact_rows(config.output_dir) == whole.rows, label
    assert harness.samples_by_step(config.output_dir) == whole.samples, label
    assert not harness.leftovers(config.output_dir), label
    return killed


@pytest.mark.promise(
    text="After kill -9 in a step and in a save, a run on two ranks resumes as if nothing had happened",
    expected="the other rank ends with status 4 and names the dead one; losses are equal to the bit, no sample is lost "
    "or repeated, nothing is left behind",
)
def test_two_kills(corpus: Path, tmp_path: Path, references: Any, record_property: Any) -> None:
    whole = references("two replicas")
    writes = [label for label in whole.events[0] if "writer: open" in label and ".step_00000004.partial" in label]
    writing = writes[len(writes) // 2]
    for name, victim, label, all_ranks in (("a", 1, "step 6: all_reduce", False), ("b", 0, writing, True)):
        config = config_of("two replicas", corpus, tmp_path / name)
        assert survive(config, 2, whole, victim, harness.Moment(label), all_ranks)
    record_property("seen", "as expected, in step 6 (one rank) and in the save of step 4 (both ranks)")


@pytest.mark.hard
@pytest.mark.parametrize(
    ("layout", "who"), [(name, who) for name in LAYOUTS for who in ("all ranks", "one rank")[: LAYOUTS[name][0]]]
)
@pytest.mark.promise(
    text="After kill -9 of one rank or of all ranks at random moments, half of them in saves, a run resumes as if "
    "nothing had happened, in every layout",
    expected="the other ranks end with status 4 and name the dead one; losses are equal to the bit, no sample is lost "
    "or repeated, nothing is left behind",
)
def test_kills_at_random_moments(
    corpus: Path, tmp_path: Path, references: Any, record_property: Any, layout: str, who: str
) -> None:
    ranks, whole = LAYOUTS[layout][0], references(layout)
    kills = 0
    for index in range(7):
        victim = index % ranks
        at = moment(whole.events[victim], f"{layout} {who} {index}")
        config = config_of(layout, corpus, tmp_path / str(index))
        kills += survive(config, ranks, whole, victim, at, who == "all ranks")
    assert kills >= 5, "moments that depend on the writer's speed may pass before they come"
    record_property("seen", "7 of 7 resumed runs equal the uninterrupted one")
