"""One rank of two that stops, hangs or fails, in real processes: the other one says so, and both end."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from looplm.config import HealthConfig
from looplm.failures import Hang
from pretrain import launcher, watchdog
from pretrain.trainer import Trainer
from pretrain.watchdog import Watchdog, describe
from tests.faults import harness
from tests.pretrain.test_stopping import before
from tests.support.tiny import run_config

PLAIN = {"tensorboard": False}


def oversleep() -> None:
    """Take longer over a step than the test takes."""
    time.sleep(1000)


def fail() -> None:
    raise ValueError("the cosmic ray of this test")


def on_rank_1(action: Any, rank: int) -> None:
    """Fault: run ``action`` before the second step, on rank 1 only."""
    if rank == 1:
        before(Trainer, "_run", 2, action)


def stop_and_oversleep() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    oversleep()


STOP = partial(os.kill, 0, signal.SIGSTOP)  # the process group that the rank leads


def ends(corpus: Path, folder: Path, action: Any, **health: float) -> list[harness.End]:
    """Return how both ranks ended; rank 1 is killed once rank 0 has ended, as torchrun would do."""
    config = run_config(corpus, folder, health=health, logging=PLAIN)
    with harness.Job(config, 2, partial(on_rank_1, action)) as job:
        job.processes[0].join(60)
        job.processes[1].join(0.1 if action is STOP else 10)
        job.processes[1].kill()
        return job.ends()


@pytest.mark.slow
@pytest.mark.promise(
    text="A rank that is stopped (SIGSTOP) in a step does not hold up the run: the watchdog names it",
    expected="status 4 on the other rank, one line with the rank's number; stacks on the disk",
)
def test_a_stopped_rank_is_named(corpus, tmp_path, record_property):
    found = ends(corpus, tmp_path / "run", STOP, step_timeout=3.0)
    assert [end.status for end in found] == [Hang.status, -signal.SIGKILL]
    line = found[0].last_line
    assert line.startswith("error: rank 0: step 2: not finished after ")
    assert "(health.step_timeout); rank 1 is not responding (stopped or dead); stacks in " in line
    stacks = (tmp_path / "run/stacks/rank_0.txt").read_text()
    assert "torch/distributed/" in stacks and "pretrain/trainer.py" in stacks, "it waits in a collective"
    record_property("seen", "status 4: step 2: … rank 1 is not responding (stopped or dead)")


@pytest.mark.slow
@pytest.mark.promise(
    text="A rank that hangs in a step is named, and every rank's stacks show where it is",
    expected="status 4 on both ranks, one line with the rank's number; its stack names the function",
)
def test_a_rank_that_hangs_is_named(corpus, tmp_path, record_property):
    found = ends(corpus, tmp_path / "run", oversleep, step_timeout=3.0)
    assert [end.status for end in found] == [Hang.status, Hang.status]
    lines = [end.last_line for end in found if "error:" in end.output]
    assert len(lines) == 1 and "; rank 1 is late, in step 2; stacks in " in lines[0], found
    assert "in oversleep" in (tmp_path / "run/stacks/rank_1.txt").read_text()
    record_property("seen", "status 4 on both: step 2: … rank 1 is late, in step 2; its stack ends in oversleep")


@pytest.mark.slow
@pytest.mark.promise(
    text="If a rank fails alone, the others end within seconds and repeat its message",
    expected="the failed rank's status on both; one line on the other",
)
def test_a_rank_that_fails_alone_ends_the_others(corpus, tmp_path, record_property):
    begin = time.monotonic()
    found = ends(corpus, tmp_path / "run", fail)
    assert [end.status for end in found] == [1, 1]
    assert "rank 1 has failed: ValueError: the cosmic ray of this test" in found[0].output, found[0].output
    assert "Traceback" not in found[0].output and "Traceback" in found[1].output
    assert time.monotonic() - begin < 45
    record_property("seen", f"status 1 on both: {found[0].last_line}")


@pytest.mark.slow
@pytest.mark.promise(
    text="If a rank hangs after a signal, the run ends by its own deadline instead of being killed without a word",
    expected="status 4 on both ranks, one line with the rank's number",
)
def test_a_rank_that_hangs_after_a_signal(corpus, tmp_path, record_property):
    found = ends(corpus, tmp_path / "run", stop_and_oversleep, stop_timeout=2.0)
    assert [end.status for end in found] == [Hang.status, Hang.status]
    assert "s after a signal (health.stop_timeout); rank 1 is late, in step 2; stacks in " in found[1].last_line
    record_property("seen", "status 4 on both: step 2: not saved … after a signal; rank 1 is late, in step 2")


def test_a_run_whose_gpu_fails_can_be_resumed(tmp_path, capsys):
    failures = (
        (torch.AcceleratorError("CUDA error: uncorrectable ECC error\nmore"), Hang),
        (ValueError("x"), ValueError),
    )
    for error, kind in (*failures, (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError)):
        with pytest.raises(kind) as caught, Watchdog(HealthConfig(), tmp_path).guard():
            raise error
        is_gpu = "the GPU has failed (CUDA error: uncorrectable ECC error); the run can be resumed" in str(caught.value)
        assert is_gpu == (kind is Hang)
        assert ("AcceleratorError" in capsys.readouterr().err) == is_gpu, "its traceback is there"


def report(counts: dict[str, int], phase: str = "step 2", waits: bool = True) -> dict[str, Any]:
    members = {"all": [0, 1, 2, 3], "left": [0, 1], "right": [2, 3]}
    return {"phase": phase, "counts": counts, "members": {name: members[name] for name in counts}, "waits": waits}


def test_description_of_late_ranks() -> None:
    together = report({"all": 9})
    assert describe(dict.fromkeys(range(4), together), 4) == "every rank responds and none is behind the others"
    assert describe({0: together, 2: together}, 4) == "ranks 1, 3 are not responding (stopped or dead)"
    behind = {0: together, 1: report({"all": 8}, "save of step 1"), 2: together}
    assert describe(behind, 4) == "rank 3 is not responding (stopped or dead); rank 1 is late, in save of step 1"
    # Ranks 2 and 3 have begun more in a group of their own, which proves nothing; rank 0 lags in its group.
    groups = {rank: report({"all": 9, "left" if rank < 2 else "right": 4 if rank < 2 else 9}) for rank in range(4)}
    groups[0] = report({"all": 9, "left": 3})
    assert describe(groups, 4) == "rank 0 is late, in step 2"
    outside = dict.fromkeys(range(3), together) | {3: report({"all": 9}, waits=False)}
    assert describe(outside, 4) == "rank 3 is late, in step 2", "equal counts, but it is in no collective"
    assert describe({}, 20).startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more are not responding")


def test_the_time_of_a_suspended_process_does_not_count(monkeypatch, tmp_path, capsys) -> None:
    """A run that was stopped for an hour and continues is no hang; one that hangs after it is."""
    clock, called = [0.0], list[str]()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dog = Watchdog(HealthConfig(step_timeout=100), tmp_path)
    monkeypatch.setattr(dog, "_call", called.append)
    dog.enter("step 7")
    for moment in (*range(1, 50), *range(3649, 3690)):
        clock[0] = moment
        dog._look()
    assert not called
    assert capsys.readouterr().err == "rank 0: step 7: suspended for 3599 s, which do not count\n"
    for moment in range(3690, 3701):
        clock[0] = moment
        dog._look()
    assert called == ["step 7: not finished after 101 s (health.step_timeout)"]


def test_times_of_the_start_up(tmp_path: Path) -> None:
    watchdog = Watchdog(HealthConfig(), tmp_path)
    watchdog.start_up("data check")
    watchdog.start_up("model")
    assert watchdog.started() == "start-up took 0.0 s: data check 0.0 s, model 0.0 s"


def test_a_phase_costs_microseconds(tmp_path: Path) -> None:
    watchdog, begin = Watchdog(HealthConfig(), tmp_path), time.perf_counter()
    for step in range(1000):
        watchdog.enter(f"step {step}")
    assert (time.perf_counter() - begin) / 1000 < 1e-4


def test_a_collective_waits_longer_than_the_watchdog(tmp_path: Path) -> None:
    """Otherwise the collective would fail first, and nobody would say which rank was late."""
    health = HealthConfig(step_timeout=10, startup_timeout=7200)
    assert Watchdog(health, tmp_path).collective_timeout.total_seconds() > 7200
    assert Watchdog(HealthConfig(step_timeout=0), tmp_path).collective_timeout.days > 1


@pytest.mark.parametrize(
    ("command", "variables", "seconds"),
    [
        ("torchrun --shutdown-timeout 540 -m pretrain.train", {}, 540),
        ("torchrun --shutdown_timeout=20 -m pretrain.train", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}, 20),
        ("torchrun -m pretrain.train", {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}, 90),
        ("torchrun -m pretrain.train", {}, 30),
    ],
)
def test_how_long_torchrun_waits(monkeypatch, tmp_path, command, variables, seconds):
    monkeypatch.setattr(launcher, "Path", lambda _: tmp_path / "cmdline")
    (tmp_path / "cmdline").write_bytes(command.replace(" ", "\0").encode())
    assert launcher.seconds_after_signal() is None, "without torchrun, nobody kills"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launcher.seconds_after_signal() == seconds
    lines = list(launcher.describe_signals(480.0))
    assert len(lines) == (seconds < 480)
    assert (
        not lines
        or f"kills its ranks {seconds} s after a signal, saved or not; start it with --shutdown-timeout 540" in lines[0]
    )


def test_the_first_status_is_kept_for_the_launcher(monkeypatch, tmp_path):
    monkeypatch.setenv(launcher.STATUS_FILE, str(tmp_path / "status"))
    with pytest.raises(Hang), launcher.recorded():
        raise Hang("x")
    with pytest.raises(SystemExit), launcher.recorded():
        sys.exit(143)
    assert (tmp_path / "status").read_text() == "4\n"
