"""Faults of jobs as users start them: ``torchrun`` and ``python -m pretrain.train`` with all their imports."""

import dataclasses
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from looplm.cli import to_dict
from looplm.config import RunConfig
from tests.faults import harness
from tests.support.tiny import run_config, train_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = [sys.executable, "-m", "pretrain.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Command:
    """A command with its output in a file, in a process group of its own that is killed in the end."""

    def __init__(self, words: list[str], output: Path) -> None:
        self.output, self.status_file = output, output.with_suffix(".status")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "LOOPLM_STATUS_FILE": str(self.status_file)}
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something has happened; fail if the command ends before."""
        end = time.monotonic() + harness.DEADLINE
        while not happened():
            assert self.process.poll() is None and time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.02)

    def worker(self, rank: int) -> int:
        """Return the process id of a rank that torchrun has started."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                    return int(path.name)
            except OSError:  # it has ended
                continue
        raise AssertionError(f"no process of rank {rank}")

    def ends(self) -> tuple[int, str]:
        """Wait for the command; return its exit status and its output."""
        try:
            status = self.process.wait(harness.DEADLINE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs\n{self.output.read_text()[-3000:]}") from None
        return status, self.output.read_text()


@contextmanager
def started(words: list[str], output: Path) -> Iterator[Command]:
    """Start a command; kill what is left of it at the end."""
    command = Command(words, output)
    try:
        yield command
    finally:
        pids = [command.process.pid, *_descendants(command.process.pid)]
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        command.process.wait()


def _descendants(pid: int) -> list[int]:
    children = [int(word) for path in Path(f"/proc/{pid}/task").glob("*/children") for word in path.read_text().split()]
    return [found for child in children for found in (child, *_descendants(child))]


def written(config: RunConfig) -> list[str]:
    """Write a configuration beside its run; return the arguments that name it."""
    path = Path(f"{config.output_dir}.yaml")
    path.write_text(yaml.safe_dump(to_dict(config)))
    return ["--config", str(path)]


def long_run(corpus: Path, folder: Path, **health: Any) -> RunConfig:
    return run_config(
        corpus,
        folder,
        optim={"train_steps": 200},
        checkpoint={"save_every": 10},
        logging={"tensorboard": False},
        health=health,
    )


def has_step(config: RunConfig, step: int) -> Callable[[], bool]:
    """Return a function that tells whether metrics.jsonl has a step's line."""
    path = Path(config.output_dir) / "metrics.jsonl"
    return lambda: path.exists() and any(row["step"] >= step for row in train_rows(config.output_dir))


REFUSED = {
    "unknown key": (["--model.num_lops", "3"], "--model.num_lops: unknown key; did you mean model.num_loops?"),
    "indivisible batch": (["--data.global_batch_size", "6"], "data.global_batch_size: 6 is not allowed"),
    "impossible layout": (["--parallel.tensor", "2", "--parallel.pipeline", "2"], "parallel"),
}


@pytest.mark.parametrize("mistake", REFUSED)
@pytest.mark.promise(
    text="An unknown key, an indivisible batch or an impossible layout is refused before any rank connects",
    expected="status 2 and one line, although the other rank was never started; no folder is made",
)
def test_a_mistake_is_refused_before_the_ranks_connect(corpus, tmp_path, record_property, mistake):
    arguments, words = REFUSED[mistake]
    with harness.Job(run_config(corpus, tmp_path / "run"), 1, arguments=arguments, of=2) as job:
        (end,) = job.ends(60)
    assert (end.status, end.output.count("\n")) == (2, 1), end.output
    assert end.last_line.startswith("error: ") and words in end.last_line
    assert not (tmp_path / "run").exists()
    record_property("seen", f"status 2, {end.last_line}")


@pytest.mark.hard
@pytest.mark.promise(
    text="When a rank is killed, torchrun ends the whole job, and the same command continues it exactly",
    expected="torchrun's status 1 in bounded time; losses equal to the bit",
)
def test_torchrun_ends_when_a_rank_is_killed(corpus, tmp_path, record_property):
    whole = long_run(corpus, tmp_path / "whole")
    harness.complete(whole, 2)
    config = dataclasses.replace(whole, output_dir=str(tmp_path / "run"))
    words = [*TORCHRUN, "-m", "pretrain.train", *written(config)]
    with started(words, tmp_path / "first.txt") as command:
        command.wait_for(has_step(config, 25))
        os.kill(command.worker(1), signal.SIGKILL)
        status, _ = command.ends()
    assert status == 1
    with started(words, tmp_path / "second.txt") as command:
        status, output = command.ends()
    assert status == 0 and "resuming after step" in output
    assert harness.exact_rows(config.output_dir) == harness.exact_rows(whole.output_dir)
    record_property("seen", "torchrun's status 1; the continued run equals the uninterrupted one")


@pytest.mark.hard
@pytest.mark.promise(
    text="A rank that stops responding (SIGSTOP) is named, and the job ends",
    expected="one line that names the rank and the step; status 4 for the launcher, torchrun's own is 1",
)
def test_the_watchdog_names_a_stopped_rank(corpus, tmp_path, record_property):
    config = long_run(corpus, tmp_path / "run", step_timeout=5.0)
    words = [*TORCHRUN, "--shutdown-timeout", "5", "-m", "pretrain.train", *written(config)]
    with started(words, tmp_path / "out.txt") as command:
        command.wait_for(has_step(config, 5))
        os.kill(command.worker(1), signal.SIGSTOP)
        status, output = command.ends()
        recorded = command.status_file.read_text().strip()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "rank 1 is not responding" in line and "health.step_timeout" in line, output[-3000:]
    assert (status, recorded) == (1, "4")
    assert (tmp_path / "run/stacks/rank_0.txt").read_text().startswith(("Thread", "Current thread"))
    record_property("seen", "status 4: error: rank 0: … rank 1 is not responding (stopped or dead)")


@pytest.mark.hard
@pytest.mark.parametrize("target", ["SIGTERM to torchrun", "SIGUSR1 to rank 1"])
@pytest.mark.promise(
    text="SIGTERM to torchrun, or SIGUSR1 to one rank, saves and ends the whole job",
    expected="status 143 for the launcher, the step is saved, and the same command continues",
)
def test_torchrun_stops_on_a_signal(corpus, tmp_path, record_property, target):
    config = long_run(corpus, tmp_path / "run")
    words = [*TORCHRUN, "--shutdown-timeout", "540", "-m", "pretrain.train", *written(config)]
    with started(words, tmp_path / "out.txt") as command:
        command.wait_for(has_step(config, 15))
        if target == "SIGTERM to torchrun":
            os.kill(command.process.pid, signal.SIGTERM)
        else:
            os.kill(command.worker(1), signal.SIGUSR1)
        status, output = command.ends()
        recorded = command.status_file.read_text().strip()
    assert (status != 0, recorded) == (True, "143"), output[-3000:]
    assert "the same command continues" in output
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert int(latest.removeprefix("step_")) == train_rows(config.output_dir)[-1]["step"]
    record_property("seen", f"{target}: status 143, last step saved")


@pytest.mark.hard
@pytest.mark.promise(
    text="A run whose terminal is closed saves and ends; under nohup it continues",
    expected="status 143 and the last step saved; under nohup status 0",
)
@pytest.mark.parametrize("prefix", [[], ["nohup"]], ids=["plain", "nohup"])
def test_a_closed_terminal(corpus, tmp_path, record_property, prefix):
    config = long_run(corpus, tmp_path / "run")
    words = [*prefix, *TRAIN, *written(config)]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
        os.chdir(tmp_path)  # for nohup.out
        os.execvpe(words[0], words, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    begun, seen, end = has_step(config, 5), b"", time.monotonic() + harness.DEADLINE
    while not begun():
        assert time.monotonic() < end, seen.decode()
        time.sleep(0.02)
        if not prefix and select.select([terminal], [], [], 0)[0]:  # nohup has closed its end
            seen += os.read(terminal, 4096)
    os.close(terminal)
    if prefix:
        os.kill(pid, signal.SIGHUP)  # what a shell sends its jobs
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == (0 if prefix else 143)
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    last = train_rows(config.output_dir)[-1]["step"]
    assert int(latest.removeprefix("step_")) == last and (last == 200) == bool(prefix)
    record_property("seen", f"{'nohup: ' if prefix else ''}status {status}, last step saved")


@pytest.mark.hard
@pytest.mark.promise(
    text="Ctrl-C, which also ends the `tee` behind a run, loses nothing",
    expected="status 143 and the last step saved, although nobody reads what the run prints",
)
def test_a_reader_that_has_gone(corpus, tmp_path, record_property):
    config = long_run(corpus, tmp_path / "run")
    keys: Any = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
    with subprocess.Popen([*TRAIN, *written(config)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **keys) as run:
        assert run.stdout is not None
        while b"step 5/" not in (line := run.stdout.readline()):
            assert line
        run.stdout.close()
        os.kill(run.pid, signal.SIGINT)
        status = run.wait(harness.DEADLINE)
    assert status == 143
    latest = (tmp_path / "run/checkpoints/latest").read_text().strip()
    assert int(latest.removeprefix("step_")) == train_rows(config.output_dir)[-1]["step"] < 200
    record_property("seen", "status 143, last step saved")


@pytest.mark.hard
@pytest.mark.promise(
    text="Of two runs in one output_dir, the second is refused and the first is not disturbed",
    expected="status 2 and one line that names the first; the first ends with 0, each step once in metrics.jsonl",
)
def test_two_runs_in_one_folder(corpus, tmp_path, record_property):
    config = long_run(corpus, tmp_path / "run")
    words = [*TRAIN, *written(config), "--optim.train_steps", "600"]
    with started(words, tmp_path / "first.txt") as first:
        first.wait_for(has_step(config, 3))
        with started(words, tmp_path / "second.txt") as second:
            status, output = second.ends()
        assert first.process.poll() is None, "the first run was meant to be still training"
        assert status == 2 and f"process {first.process.pid} on " in output, output
        assert output.splitlines()[-1].startswith("error: output_dir: another run is writing ")
        assert first.ends()[0] == 0
    assert [row["step"] for row in train_rows(config.output_dir)] == list(range(1, 601))
    record_property("seen", "status 2: error: output_dir: another run is writing … (process … on …)")
