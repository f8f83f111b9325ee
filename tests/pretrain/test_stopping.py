"""Signals to one rank of two at chosen moments, in real processes: every rank saves, and the run continues exactly."""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from looplm.checkpoint import saving
from looplm.config import HealthConfig
from pretrain import run, stopping, watchdog
from pretrain.stopping import ABANDONED, STOPPED
from pretrain.trainer import Trainer
from tests.faults import harness
from tests.support.tiny import run_config

pytestmark = pytest.mark.slow  # every test here starts a process or trains

VALIDATION = {"eval_every": 2, "eval_samples": 32, "tensorboard": False}  # eight micro-batches on each rank


def before(owner: Any, name: str, call: int, action: Callable[[], object]) -> None:
    """Let the call number ``call`` (from 1) of a function run ``action`` first."""
    real, calls = getattr(owner, name), [0]

    def replaced(*args: Any, **keys: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            action()
        return real(*args, **keys)

    setattr(owner, name, replaced)


def signal_group(number: int) -> None:
    """Signal this rank's process group, as torchrun does: writers of checkpoints and readers of data get it too."""
    os.killpg(os.getpid(), number)
    time.sleep(0.1)


def slow_steps(seconds: float, rank: int) -> None:
    """Fault: let every step take longer."""
    real = Trainer.train

    def slow(self: Trainer, *args: Any) -> Any:
        time.sleep(seconds)
        return real(self, *args)

    setattr(Trainer, "train", slow)  # noqa: B010  # mypy accepts no other signature


def at(owner: Any, name: str, call: int, number: int, rank: int) -> None:
    """Fault: send ``number`` to rank 1's process group at a call of a function."""
    if rank == 1:
        before(owner, name, call, partial(signal_group, number))


# Calls of _run: one for a step, one for each half of a validation. The first run is stopped in step 2, when its reader
# of data is running. The second makes up for the validation of step 2 (two calls), trains steps 3 and 4, and is stopped
# in the first half of their validation. The third is stopped while it looks after its first save, of step 6, at the end
# of step 7: the ranks talk in the middle of a step, so it ends with step 8.
MOMENTS: list[tuple[str, str, harness.Fault]] = [
    ("SIGTERM", "in a step", partial(at, Trainer, "_run", 2, signal.SIGTERM)),
    ("SIGUSR1", "in a validation", partial(at, Trainer, "_run", 5, signal.SIGUSR1)),
    ("SIGINT", "in a save", partial(at, saving.Saving, "advance", 1, signal.SIGINT)),
]


@pytest.mark.promise(
    text="SIGTERM, SIGUSR1 or Ctrl-C on one rank of two, in a step, a validation or a save, loses nothing",
    expected="status 143 on both ranks, which name signal and rank; the continued run is bit-identical",
)
def test_a_signal_on_one_rank_stops_all_and_the_run_continues_exactly(corpus, tmp_path, record_property):
    def config(folder: str) -> Any:
        sections = {"data": {"num_workers": 1}, "checkpoint": {"save_every": 2}, "optim": {"train_steps": 9}}
        return run_config(corpus, tmp_path / folder, **sections, logging=VALIDATION)

    def rows(folder: str) -> tuple[list[Any], list[Any]]:
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return harness.exact_rows(tmp_path / folder), [row for row in lines if row["kind"] == "valid"]

    harness.complete(config("whole"), 2)
    reached = []
    for name, where, fault in MOMENTS:
        ends = harness.finish(config("run"), 2, fault)
        assert [end.status for end in ends] == [STOPPED, STOPPED], (where, ends[0].output, ends[1].output)
        assert f" by {name} on rank 1; the same command continues" in ends[0].last_line, ends[0].output
        assert "Traceback" not in ends[0].output + ends[1].output
        step = (tmp_path / "run/checkpoints/latest").read_text().strip()
        assert f"stopped after step {int(step[5:])} by" in ends[0].last_line
        reached.append(int(step[5:]))
        cut = f"validation cut short by {name} on rank 1; it is repeated when the run continues" in ends[0].output
        assert cut == (where == "in a validation")
        record_property("seen", f"{name} {where}: status 143 on both, saved step {int(step[5:])}")
    harness.complete(config("run"), 2)
    assert rows("run") == rows("whole")
    assert reached == [2, 4, 8]
    assert not harness.leftovers(tmp_path / "run")


def _signal_while_building(rank: int) -> None:
    at(run, "build", 1, signal.SIGTERM, rank)


@pytest.mark.promise(
    text="A signal before the first step ends every rank and leaves nothing behind",
    expected="status 143 on both ranks, one line, no file",
)
def test_a_signal_during_start_up_leaves_nothing(corpus, tmp_path, record_property):
    config = run_config(corpus, tmp_path / "run", data={"cache_dir": str(tmp_path / "cache")})
    ends = harness.finish(config, 2, _signal_while_building)
    assert [end.status for end in ends] == [STOPPED, STOPPED], ends
    assert ends[0].last_line == "stopped before the first step by SIGTERM on rank 1; nothing was written"
    assert not (tmp_path / "run").exists()
    record_property("seen", f"status 143 on both: {ends[0].last_line}")


def _signal_twice(rank: int) -> None:
    stopping.ECHO = 0.5

    def twice() -> None:
        for pause in (
            0.1,
            0.8,
            60,
        ):  # the second signal belongs to the first request, as when Slurm and torchrun send one
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(pause)

    before(Trainer, "_run", 2, twice)


@pytest.mark.promise(
    text="A second Ctrl-C ends a run at once, even in the middle of a step",
    expected="status 130, one line; the checkpoint before it stays",
)
def test_a_second_signal_ends_at_once(corpus, tmp_path, record_property):
    config = run_config(corpus, tmp_path / "run", checkpoint={"save_every": 1}, logging={"tensorboard": False})
    (end,) = harness.finish(config, 1, _signal_twice)
    assert (end.status, end.last_line) == (ABANDONED, "error: SIGINT: second request to end; nothing more is saved")
    assert "SIGINT: saving, then ending; a second one ends at once" in end.output
    record_property("seen", f"status 130: {end.last_line}")


def test_children_ignore_the_signals_only_while_a_run_is_active():
    """A child that is forked then, such as a writer of checkpoints, has to finish its work."""

    def in_child() -> tuple[Any, int]:
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(write, str(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN).encode())
            os._exit(signal.set_wakeup_fd(-1) != -1)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return os.read(read, 9), status

    with stopping.StopRequest() as stop:
        assert in_child() == (b"True", 0), "ignored, and no signal of a child reaches this process's pipe"
        os.kill(os.getpid(), signal.SIGUSR1)
        stop.poll()
        assert stop.since is not None and not stop.asked, "not agreed yet"
    assert in_child() == (b"False", 0)


def _no_patience(rank: int) -> None:
    watchdog.STARTUP_GRACE = 0.5


@pytest.mark.promise(
    text="A rank that waits for others to join ends on a signal, and at health.startup_timeout",
    expected="status 143 after a signal, status 4 after the time; one line",
)
def test_a_rank_that_waits_for_the_others(corpus, tmp_path, record_property):
    config = run_config(corpus, tmp_path / "run", health={"startup_timeout": 2.0})
    with harness.Job(config, 1, of=2) as job:
        (end,) = job.ends()
    assert end.status == 4 and end.last_line.startswith("error: rank 0: process groups: not finished after ")
    with harness.Job(dataclasses.replace(config, health=HealthConfig()), 1, _no_patience, of=2) as job:
        job.wait_for(lambda: job.outputs[0].exists())
        time.sleep(1.0)
        job.kill(0, signal.SIGTERM)
        (end,) = job.ends()
    assert (end.status, end.last_line) == (STOPPED, "rank 0: stopped during start-up (process groups); nothing is lost")
    record_property("seen", f"status 4: process groups: not finished after …; status 143: {end.last_line}")


def test_the_thread_of_a_lonely_process_needs_no_other_rank(corpus, tmp_path):
    """Without torchrun, the job of one process saves on Ctrl-C too."""
    config = run_config(corpus, tmp_path / "run", logging={"tensorboard": False})
    with harness.Job(config, 1, partial(slow_steps, 0.3)) as job:
        job.wait_for_step(1)
        job.kill(0, signal.SIGINT)
        (end,) = job.ends()
    assert end.status == STOPPED and "by SIGINT on rank 0" in end.last_line
    assert Path(tmp_path / "run/checkpoints/latest").exists()
