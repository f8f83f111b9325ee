"""Fault injector: real trainings on several processes that a test watches, hurts, restarts and compares.

Ranks are forked from the server of tests.support.launch and then run ``python -m pretrain.train`` as torchrun would
start it, exit status included. Each rank leads a process group of its own, which is killed at the end with everything
that it has started. A rank that still runs at the deadline fails the test: nothing may hang.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import yaml
from torch.utils.data import DataLoader, Dataset

from looplm.cli import run_main, to_dict
from looplm.config import RunConfig
from pretrain import data
from pretrain.train import main
from pretrain.trainer import Trainer
from tests.support.launch import SERVER
from tests.support.saving import spare_the_spawn
from tests.support.tiny import train_rows

DEADLINE = 120.0  # seconds; a job here takes a few, but eight of them may share two cores
EXACT = ("step", "samples", "tokens", "loss", "loss_per_loop", "exit_distribution", "grad_norm", "learning_rate")
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "shutil.rmtree")

Fault = Callable[[int], None]  # runs in each rank before the training, with the rank's number


class End(NamedTuple):
    """The end of one rank."""

    status: int  # exit status, or minus the number of the signal that killed it
    output: str  # stdout and stderr

    @property
    def last_line(self) -> str:
        """The last line that is not empty."""
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


class Job:
    """A training on ``ranks`` forked processes; leaving the context kills what is left of it.

    Args:
        config: the run's; ``output_dir`` must be below a folder of the test.
        ranks: number of processes.
        faults: functions that each rank runs before it trains, to prepare its own misfortune.
    """

    def __init__(self, config: RunConfig, ranks: int, *faults: Fault) -> None:
        self.folder, self._pids = Path(config.output_dir), list[int]()
        self.logs = self.folder.parent / f"{self.folder.name}.logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        attempt = len(list(self.logs.glob("*.yaml")))
        path = self.logs / f"attempt{attempt}.yaml"
        path.write_text(yaml.safe_dump(to_dict(config)))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.outputs = [self.logs / f"attempt{attempt}_rank{rank}.txt" for rank in range(ranks)]
        self.processes = [
            SERVER.Process(target=_rank, args=(rank, ranks, self._store.port, path, self.outputs[rank], faults))
            for rank in range(ranks)
        ]

    def __enter__(self) -> "Job":
        for process in self.processes:
            process.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_all()

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill_all(self) -> None:
        """Kill every rank and everything that it has started."""
        for process in self.processes:
            if process.pid is not None:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:  # before its setsid, or long gone
                    process.kill()
        for process in self.processes:
            if process.pid is not None:
                process.join()

    def wait_for(self, happened: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Wait until something has happened; fail if a rank ends before."""
        end = time.monotonic() + deadline
        while not happened():
            assert time.monotonic() < end, self._report(f"nothing happened for {deadline} s")
            ended = [process.exitcode for process in self.processes if process.exitcode is not None]
            assert not ended, self._report(f"a rank ended with {ended}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Wait until metrics.jsonl has a step's line."""
        metrics = self.folder / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and any(row["step"] >= step for row in train_rows(self.folder)))

    def wait_for_a_death(self, deadline: float = DEADLINE) -> None:
        """Wait until any rank has ended."""
        assert wait([process.sentinel for process in self.processes], deadline), self._report("no rank ended")

    def ends(self, deadline: float = DEADLINE) -> list[End]:
        """Wait for every rank and return how each ended."""
        end, running = time.monotonic() + deadline, list(self.processes)
        while running and (left := end - time.monotonic()) > 0:
            wait([process.sentinel for process in running], left)
            running = [process for process in running if process.exitcode is None]
        late = [self.processes.index(process) for process in running]
        assert not late, self._report(f"ranks {late} still ran after {deadline} s")
        texts = [path.read_text(errors="replace") for path in self.outputs]
        return [End(process.exitcode or 0, text) for process, text in zip(self.processes, texts, strict=True)]

    def _report(self, problem: str) -> str:
        tails = [f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.outputs if path.exists()]
        return "\n".join([problem, *tails])


def finish(config: RunConfig, ranks: int, *faults: Fault) -> list[End]:
    """Run a training to its end, whatever that is."""
    with Job(config, ranks, *faults) as job:
        return job.ends()


def complete(config: RunConfig, ranks: int, *faults: Fault) -> None:
    """Run or resume a training, which must succeed."""
    for rank, end in enumerate(finish(config, ranks, *faults)):
        assert end.status == 0, f"rank {rank} ended with {end.status}\n{end.output[-3000:]}"


def exact_rows(folder: Path | str) -> list[tuple[str, ...]]:
    """Return everything in a run's training rows that must not depend on faults, to the bit."""
    return [tuple(json.dumps(row[key]) for key in EXACT) for row in train_rows(folder)]


def samples_by_step(folder: Path | str) -> dict[int, list[int]]:
    """Return the sample numbers of each step that counts, over all ranks that hold different data.

    A step that was repeated after a restart counts as last done. Each repetition must have had the same samples.
    """
    lines = [json.loads(line) for path in sorted(records(folder)) for line in path.read_text().splitlines()]
    found: dict[int, dict[int, list[int]]] = {}
    for line in lines:
        of_step = found.setdefault(line["step"], {})
        before = of_step.setdefault(line["replica"], line["samples"])
        assert before == line["samples"], f"step {line['step']} had samples {before}, and then {line['samples']}"
    return {step: sorted(chain.from_iterable(found[step].values())) for step in sorted(found)}


def records(folder: Path | str) -> list[Path]:
    """Return the files in which the ranks of a run noted their samples."""
    return list(Path(f"{folder}.logs").glob("samples_rank*.jsonl"))


def leftovers(folder: Path | str) -> list[str]:
    """Return the hidden and temporary files that a run has left behind."""
    paths = Path(folder).rglob("*")
    return sorted(
        str(path.relative_to(folder)) for path in paths if path.name.startswith(".") and path.name != ".metadata"
    )


# ---- what happens in a rank


def _rank(rank: int, ranks: int, port: int, config: Path, log: Path, faults: Sequence[Fault]) -> None:
    """Run the training command with torchrun's environment variables and with its output written to ``log``."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables["LOCAL_WORLD_SIZE"] = ranks
    os.environ |= {name: str(value) for name, value in variables.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    spare_the_spawn()
    note_samples(rank, log.parent)
    for fault in faults:
        fault(rank)
    sys.argv = ["pretrain.train", "--config", str(config)]
    run_main(main)


class _Watched(Dataset[Any]):
    """A data set that notes which samples are read."""

    def __init__(self, inner: Dataset[Any], seen: list[int]) -> None:
        self._inner, self._seen = inner, seen

    def __len__(self) -> int:
        return len(self._inner)  # type: ignore[arg-type]  # Dataset declares no length

    def __getitem__(self, index: int) -> Any:
        self._seen.append(index)
        return self._inner[index]


def note_samples(rank: int, folder: Path) -> None:
    """Append the samples of each training step to ``samples_rank{rank}.jsonl``."""
    seen, target, train = list[int](), folder / f"samples_rank{rank}.jsonl", Trainer.train
    data.DataLoader = lambda dataset, **keys: DataLoader(_Watched(dataset, seen), **keys)  # type: ignore[attr-defined]

    def train_and_note(self: Trainer, *arguments: Any, **keys: Any) -> Any:
        seen.clear()
        result = train(self, *arguments, **keys)
        replica = self.groups.dp.rank()
        row = {"step": self.scheduler.num_steps, "replica": replica, "samples": sorted(set(seen))}
        with target.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return result

    Trainer.train = train_and_note  # type: ignore[method-assign]


class _Trace:
    """Numbered events of one rank: its steps, evaluations, collectives and changes of files in the run's folder."""

    def __init__(self, folder: str, target: Path, last: int | None) -> None:
        self._folder, self._last, self._number, self._pid = folder, last, 0, os.getpid()
        self._file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def note(self, label: str) -> None:
        """Note an event of the rank itself, and kill the rank if it is the last one."""
        if os.getpid() != self._pid:
            return
        self._number += 1
        os.write(self._file, f"{label}\n".encode())
        if self._number == self._last:
            os.kill(self._pid, signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a change of a file."""
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path, flags = os.fspath(arguments[0]), arguments[2] if event == "open" else 0
        writes = event != "open" or flags & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(path, str) and path.startswith(self._folder):
            if flags & os.O_TRUNC and self._number + 1 == self._last:  # die after the truncation, before the content
                self._last += 1
                os.close(os.open(path, flags))
            self.note(f"{event} {path[len(self._folder) :]}")


def trace(folder: str, targets: Path, victim: int, last: int | None, rank: int) -> None:
    """Fault: number the events of each rank, and kill ``victim`` at the event number ``last``."""
    found = _Trace(folder + "/", targets / f"events_rank{rank}.txt", last if rank == victim else None)
    for name in ("all_reduce", "barrier", "broadcast_object_list"):
        setattr(dist, name, _noted(getattr(dist, name), name, found))
    for name in ("train", "evaluate"):
        setattr(Trainer, name, _noted(getattr(Trainer, name), name, found))
    sys.addaudithook(found.audit)


def _noted(function: Callable[..., Any], label: str, found: _Trace) -> Callable[..., Any]:
    def call(*arguments: Any, **keys: Any) -> Any:
        found.note(label)
        return function(*arguments, **keys)

    return call


def killed_at(config: RunConfig, victim: int, last: int | None) -> Fault:
    """Return the fault that kills ``victim`` at its event number ``last``; with None it only counts."""
    logs = Path(f"{config.output_dir}.logs")
    return partial(trace, config.output_dir, logs, victim, last)


def events(config: RunConfig, rank: int) -> list[str]:
    """Return the events of a rank in the last traced run."""
    return (Path(f"{config.output_dir}.logs") / f"events_rank{rank}.txt").read_text().splitlines()
