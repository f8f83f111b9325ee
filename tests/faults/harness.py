"""Fault injector: real trainings on several processes that a test watches, hurts, restarts and compares.

Ranks are forked from the server of tests.support.launch and then run ``python -m pretrain.train`` as torchrun would
start it, exit status included. Each rank leads a process group of its own, which is killed at the end with everything
that it has started. A rank that still runs at the deadline fails the test: nothing may hang.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
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

from looplm import checkpoint
from looplm.cli import run_main, to_dict
from looplm.config import RunConfig
from pretrain import data
from pretrain.train import main
from pretrain.trainer import Trainer
from tests.support.launch import SERVER
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
        arguments: of the command, after ``--config``.
        of: number of processes that the ranks are told, if some are never started.
    """

    def __init__(
        self, config: RunConfig, ranks: int, *faults: Fault, arguments: Sequence[str] = (), of: int = 0
    ) -> None:
        self.folder, self._pids = Path(config.output_dir), list[int]()
        self.logs = self.folder.parent / f"{self.folder.name}.logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        attempt = len(list(self.logs.glob("*.yaml")))
        path = self.logs / f"attempt{attempt}.yaml"
        path.write_text(yaml.safe_dump(to_dict(config)))
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.outputs = [self.logs / f"attempt{attempt}_rank{rank}.txt" for rank in range(ranks)]
        self.processes = [
            SERVER.Process(
                target=_rank,
                args=(rank, of or ranks, self._store.port, (str(path), *arguments), self.outputs[rank], faults),
            )
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
    """Return the hidden and temporary files that a run has left behind; the cache of indices keeps its lock."""
    hidden = [path for path in Path(folder).rglob(".*") if path.name != ".metadata" and "index_cache" not in path.parts]
    return sorted(str(path.relative_to(folder)) for path in hidden)


# ---- what happens in a rank


def _rank(rank: int, ranks: int, port: int, words: Sequence[str], log: Path, faults: Sequence[Fault]) -> None:
    """Run the training command with torchrun's environment variables and with its output written to ``log``."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables["LOCAL_WORLD_SIZE"] = ranks
    os.environ |= {name: str(value) for name, value in variables.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)
    note_samples(rank, log.parent)
    for fault in faults:
        fault(rank)
    sys.argv = ["pretrain.train", "--config", *words]
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
    vars(data)["DataLoader"] = lambda dataset, **keys: DataLoader(_Watched(dataset, seen), **keys)

    def train_and_note(self: Trainer, *arguments: Any, **keys: Any) -> Any:
        seen.clear()
        result = train(self, *arguments, **keys)
        replica = self.groups.dp.rank()
        row = {"step": self.scheduler.num_steps, "replica": replica, "samples": sorted(set(seen))}
        with target.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return result

    Trainer.train = train_and_note  # type: ignore[method-assign]


class Moment(NamedTuple):
    """An event of a rank: the ``nth`` (from 1) that :func:`events` calls ``label``."""

    label: str
    nth: int = 1


class _Trace:
    """Events of one rank: its collectives and changes of files, in the rank itself and in the writer that it forks.

    A label says what the rank is doing (start, step 3, evaluation 1, save 2, end), the writer's process if it is that,
    and the event: ``save 2: writer: open checkpoints/.step_00000004.partial/config.yaml``.
    """

    def __init__(self, folder: str, target: Path, moment: Moment | None, spares_the_rank: bool) -> None:
        self._folder, self._moment, self._spares_the_rank = folder, moment, spares_the_rank
        self._pid, self._counts, self._found = os.getpid(), Counter[str](), Counter[str]()
        self._doing = "start"
        self._lock, self._dying = threading.Lock(), False
        self._file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def enter(self, name: str) -> None:
        """Begin the next step, evaluation or save."""
        self._counts[name] += 1
        self._doing = f"{name} {self._counts[name]}"

    def is_last(self, event: str) -> str | None:
        """Note an event; return its label if the process has to die here."""
        is_writer = os.getpid() != self._pid  # its threads write files at the same time, but each only its own
        if not is_writer and threading.current_thread() is not threading.main_thread():
            return None
        label = f"{self._doing}: {'writer: ' if is_writer else ''}{event}"
        with self._lock:
            if self._dying:  # nothing is noted between the last event and the death
                return None
            self._found[label] += 1
            os.write(self._file, f"{label}\n".encode())
            self._dying = self._moment == (label, self._found[label])
            return label if self._dying else None

    def die(self, label: str) -> None:
        """Kill the rank, and this process if it is the rank's writer."""
        os.write(self._file, f"killed at {label}\n".encode())
        if not self._spares_the_rank:
            os.kill(self._pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note a change of a file."""
        if event not in FILE_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        path, flags = os.fspath(arguments[0]), arguments[2] if event == "open" else 0
        writes = event != "open" or flags & (os.O_WRONLY | os.O_RDWR)
        if writes and isinstance(path, str) and path.startswith(self._folder):
            name = re.sub(r"\.[0-9a-f]{8}\.partial", ".partial", path[len(self._folder) :])  # new each time
            label = self.is_last(f"{event} {name}")
            if label is not None:
                if flags & os.O_TRUNC:  # die after the truncation, before the content
                    os.close(os.open(path, flags))
                self.die(label)


def trace(folder: str, targets: Path, victim: int, moment: Moment | None, spares_the_rank: bool, rank: int) -> None:
    """Fault: note the events of each rank, and kill ``victim`` at a moment."""
    mine = moment if rank == victim else None
    found = _Trace(folder + "/", targets / f"events_rank{rank}.txt", mine, spares_the_rank)
    for name in ("all_reduce", "barrier", "broadcast_object_list", "gather_object"):
        setattr(dist, name, _noted(getattr(dist, name), name, found))
    _announce(Trainer, "train", "step", found)
    _announce(Trainer, "evaluate_until", "evaluation", found)
    _announce(checkpoint.Saver, "save", "save", found)
    sys.addaudithook(found.audit)


def _announce(owner: type, method: str, name: str, found: _Trace) -> None:
    function = getattr(owner, method)

    def call(*arguments: Any, **keys: Any) -> Any:
        found.enter(name)
        return function(*arguments, **keys)

    setattr(owner, method, call)


def _noted(function: Callable[..., Any], event: str, found: _Trace) -> Callable[..., Any]:
    def call(*arguments: Any, **keys: Any) -> Any:
        if (label := found.is_last(event)) is not None:
            found.die(label)
        return function(*arguments, **keys)

    return call


def killed_at(config: RunConfig, victim: int, moment: Moment | None, spares_the_rank: bool = False) -> Fault:
    """Return the fault that kills a rank with its writer, or the writer alone; without a moment, only note events."""
    logs = Path(f"{config.output_dir}.logs")
    return partial(trace, config.output_dir, logs, victim, moment, spares_the_rank)


def events(config: RunConfig, rank: int) -> list[str]:
    """Return the labels of a rank's events in the last traced attempt; its death is the last one."""
    return (Path(f"{config.output_dir}.logs") / f"events_rank{rank}.txt").read_text().splitlines()
