"""Two runs in one output directory, and locks that are left behind."""

import dataclasses
import json
import os
import re
import signal
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from looplm import lock
from looplm.config import HealthConfig
from looplm.failures import Hang, StorageFailure, UserError
from looplm.lock import FolderLock
from pretrain import run, watchdog
from pretrain.run_lock import hold
from pretrain.stopping import STOPPED
from pretrain.trainer import Trainer
from tests.faults import harness
from tests.pretrain.test_stopping import before, slow_steps
from tests.support.launch import SERVER
from tests.support.tiny import run_config, train_rows

pytestmark = pytest.mark.slow  # every test here starts a process or trains


def _hold(folder: Path, ready: Connection) -> None:
    FolderLock(folder, "runs/a", print).acquire()
    child = os.fork()
    if child == 0:  # like a DataLoader's worker, which lives on for a while after its parent
        signal.pause()
    ready.send(child)
    signal.pause()


def held(folder: Path) -> tuple[int, int]:
    """Lock ``folder`` in another process; return its pid and the pid of a child of it."""
    here, there = SERVER.Pipe()
    process = SERVER.Process(target=_hold, args=(folder, there))
    process.start()
    child: int = here.recv()
    assert process.pid is not None
    return process.pid, child


def attempt(folder: Path) -> tuple[str, list[str]]:
    """Try to lock and release ``folder``; return the refusal, if any, and the lines printed on the way."""
    said = list[str]()
    try:
        with FolderLock(folder, "runs/a", said.append):
            return "", said
    except UserError as error:
        return str(error), said


def test_a_second_holder_is_told_the_first_and_a_kill_releases_the_lock(tmp_path: Path) -> None:
    pid, child = held(tmp_path)
    try:
        refusal, said = attempt(tmp_path)
        pattern = rf"output_dir: another run is writing runs/a \(process {pid} on \S+, since [^)]+\); wait for it, "
        assert re.match(pattern, refusal) and "\n" not in refusal and not said
    finally:
        os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while (found := attempt(tmp_path))[0]:  # the kernel needs a moment to end the process
        assert time.monotonic() < end
    refusal, said = found
    assert len(said) == 1
    assert f"process {pid} on" in said[0] and said[0].endswith("has ended without removing its lock; taking it over")
    os.kill(child, signal.SIGKILL)
    assert attempt(tmp_path) == ("", []) and not list(tmp_path.iterdir()), "a released lock leaves nothing behind"


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    with FolderLock(tmp_path, "runs/a", print):
        refusal, _ = attempt(tmp_path)
        assert f"process {os.getpid()} on" in refusal
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert attempt(tmp_path) == ("", [])


def write_holder(folder: Path, **changed: object) -> None:
    """Leave the lock file of a run on another host, whose kernel's lock this host cannot see."""
    holder = {"host": "n07", "boot": "another", "pid": 1, "started": "1", "job": "4711", "since": "yesterday"}
    (folder / ".lock").write_text(json.dumps(holder | changed))


def _touch(path: Path) -> None:
    for _ in range(1000):
        os.utime(path)
        signal.sigtimedwait([], 0.05)


def test_a_holder_on_another_host_is_alive_as_long_as_it_touches_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.4)
    write_holder(tmp_path)
    beat = SERVER.Process(target=_touch, args=(tmp_path / ".lock",))
    beat.start()
    before = (tmp_path / ".lock").stat().st_mtime_ns
    while (tmp_path / ".lock").stat().st_mtime_ns == before:
        pass
    try:
        refusal, said = attempt(tmp_path)
        assert "(process 1 on n07, job 4711, since yesterday)" in refusal
        assert said == ["runs/a: locked by process 1 on n07, job 4711, since yesterday; waiting 0 s for a sign of life"]
    finally:
        beat.kill()
        beat.join()
    refusal, said = attempt(tmp_path)
    assert not refusal and said[1].endswith("taking it over")


def test_a_requeued_job_does_not_wait_for_its_predecessor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_holder(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    refusal, said = attempt(tmp_path)
    assert not refusal and len(said) == 1 and said[0].endswith("taking it over")


@pytest.mark.parametrize("damage", ["", "{", "[1]", "\0" * 40])
def test_a_damaged_lock_file_does_not_block(tmp_path: Path, damage: str) -> None:
    (tmp_path / ".lock").write_text(damage)
    assert attempt(tmp_path) == ("", [])


def _die_in_step_2(rank: int) -> None:
    before(Trainer, "_run", 2, lambda: os._exit(9))


@pytest.mark.promise(
    text="A second run in the same output_dir is refused and told the first; a killed run does not block the next",
    expected="status 2, one line with process, host and time; after kill -9 the next start succeeds at once",
)
def test_two_runs_in_one_directory(corpus, tmp_path, record_property):
    config = run_config(corpus, tmp_path / "run", logging={"tensorboard": False})
    with harness.Job(config, 2, partial(slow_steps, 0.5)) as first:
        first.wait_for_step(1)
        before_second = (tmp_path / "run/metrics.jsonl").read_text()
        seconds = harness.finish(config, 2)
        assert [end.status for end in seconds] == [2, 2]
        line = seconds[0].last_line
        pid = first.processes[0].pid
        assert (
            f"another run is writing {tmp_path}/run (process {pid} on " in line and "Traceback" not in seconds[0].output
        )
        assert (tmp_path / "run/metrics.jsonl").read_text().startswith(before_second), "nothing is cut off"
        assert all(process.exitcode is None for process in first.processes), "the first one goes on"
        first.kill_all()
    harness.complete(config, 2)
    assert [row["step"] for row in train_rows(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    record_property("seen", "status 2: output_dir: another run is writing … (process … on …, since …)")


@pytest.mark.promise(
    text="A run that crashes again and again without a new checkpoint is not started forever",
    expected="after health.max_starts starts: status 2, one line that says how to continue",
)
def test_starts_without_progress_are_bounded(corpus, tmp_path, record_property):
    health, checkpoints = {"max_starts": 2}, {"save_every": 4}
    config = run_config(corpus, tmp_path / "run", health=health, checkpoint=checkpoints, logging={"tensorboard": False})
    assert [harness.finish(config, 1, _die_in_step_2)[0].status for _ in range(2)] == [9, 9]
    (end,) = harness.finish(config, 1)
    assert end.status == 2 and "was started 2 times without a checkpoint after step 0" in end.last_line
    assert end.last_line.endswith("find the cause in its log, then add --health.max_starts 0 once")
    harness.complete(dataclasses.replace(config, health=HealthConfig(max_starts=0)), 1)
    assert not harness.leftovers(tmp_path / "run"), "the count is gone"
    record_property("seen", "status 2: … was started 2 times without a checkpoint after step 0 …")


def _hang_in_start_up(victim: int, rank: int) -> None:
    def signaled() -> None:
        if rank == victim:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    watchdog.STARTUP_GRACE = 0.5
    before(run, "build", 1, signaled)


@pytest.mark.parametrize("signaled", [0, 1])
def test_a_stop_during_start_up_is_no_start_without_progress(signaled, corpus, tmp_path):
    config = run_config(corpus, tmp_path / "run", health={"max_starts": 1}, logging={"tensorboard": False})
    for _ in range(2):
        ends = harness.finish(config, 2, partial(_hang_in_start_up, signaled))
        assert [end.status for end in ends] == [STOPPED, STOPPED], ends
        assert ends[signaled].last_line == f"rank {signaled}: stopped during start-up (model); nothing is lost"
    assert not list((tmp_path / "run").glob(".starts*"))


def test_what_counts_as_a_start_without_progress(tmp_path, single_process):
    """Crashes and hangs count until there is a newer checkpoint; a run that ended by itself does not."""
    folder = tmp_path / "run"

    def start(error: Exception | None = None) -> None:
        with hold(folder, 2):
            if error is not None:
                raise error

    for _ in range(4):
        start()
        with pytest.raises(StorageFailure):
            start(StorageFailure("the disk is full"))
    assert not folder.exists(), "an empty folder is removed"
    for error in (ValueError("crash"), Hang("late")):
        with pytest.raises(type(error)):
            start(error)
    with pytest.raises(UserError, match="started 2 times without a checkpoint after step 0"):
        start()
    (folder / "checkpoints/step_00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match="crash"):
        start(ValueError("crash"))
    start()
    assert not (folder / ".starts.json").exists()
