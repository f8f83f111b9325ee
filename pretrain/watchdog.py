"""A thread beside the main one that ends a run which has stopped advancing, and names the ranks that are late.

The ranks meet in torch's store, which answers while the main thread waits in a collective. Any rank can set the key
``call``, with a reason; the others look for it every second. Then every rank writes the stacks of its threads to
OUTPUT_DIR/stacks and reports its place. A rank that does not report is dead or stopped. A rank is late if it has begun
fewer collectives than the others of a group, which wait for it. The caller prints one line, and all ranks end alike.
"""

import faulthandler
import itertools
import json
import math
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm.config import HealthConfig
from looplm.failures import Failure, Hang, NumericalFailure, StorageFailure, UserError
from looplm.files import storage_failure
from looplm.megatron import process_groups
from looplm.megatron.device import lost_gpu
from pretrain import launcher, run_lock
from pretrain.stopping import STOPPED, StopRequest, end_workers

INTERVAL = 1.0  # seconds between two looks at the store and at the deadlines
SUSPENDED = 10.0  # seconds without a look after which the whole process must have been stopped
GRACE = 3.0  # seconds in which other ranks answer a call, or end by themselves after a failure
STARTUP_GRACE = 20.0  # seconds from a signal to the end of a start-up, less than torchrun's 30; nothing is lost
ENDING = 60.0  # seconds for what follows a failure: closing process groups that may wait for a dead rank
NAMED = 8  # ranks that a message lists
_numbers = itertools.count()  # of watchdogs that shared this process's store
_KINDS = {kind.status: kind for kind in (UserError, NumericalFailure, Hang, StorageFailure)}


class Phase(NamedTuple):
    """What the main thread is doing, since when, and until when it may."""

    name: str
    since: float
    end: float
    key: str  # of the configuration, for that limit


class Watchdog:
    """Deadlines of a run's phases, and the signals that ask it to stop. Inside ``with``, its thread watches both.

    Args:
        health: the deadlines.
        folder: the run's output_dir.

    Attributes:
        stop: the signals.
    """

    def __init__(self, health: HealthConfig, folder: Path) -> None:
        self.stop = StopRequest()
        self._health, self._folder = health, folder
        self._begin = self._looked = time.monotonic()
        self._startup: list[tuple[str, float]] | None = []  # names and times of the phases so far; None once it is over
        self._phase = Phase("start-up", self._begin, math.inf, "")
        self._store: Any = None
        self._leaves = False  # the block that the ranks share has ended; the store stays for a look that is under way
        self._rank, self._groups = int(os.environ.get("RANK", "0")), dict[str, Any]()
        self._status = Hang.status  # if closing hangs
        self._ended, self._warned = threading.Event(), False

    def __enter__(self) -> "Watchdog":
        self.stop.__enter__()
        self._wake, self._waker = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        os.close(self._waker)  # wakes the thread
        self._thread.join()
        os.close(self._wake)
        self.stop.__exit__()

    @property
    def collective_timeout(self) -> timedelta:
        """Timeout of a collective: after every deadline here, because this thread knows better what to say."""
        health = self._health
        limits = (health.step_timeout, health.startup_timeout, health.stop_timeout)
        return timedelta(days=30) if 0 in limits else timedelta(seconds=max(limits) + 300)

    def start_up(self, name: str) -> None:
        """Begin the part ``name`` of what comes before the first step."""
        now, limit = time.monotonic(), self._health.startup_timeout
        if self._startup is not None:
            self._startup.append((name, now))
        self._phase = Phase(name, now, self._begin + limit if limit else math.inf, "health.startup_timeout")

    def started(self) -> str:
        """End the start-up; return its parts with their times."""
        begun, self._startup = self._startup or [], None
        now = time.monotonic()
        ends = [*(moment for _, moment in begun[1:]), now]
        parts = (f"{name} {end - since:.1f} s" for (name, since), end in zip(begun, ends, strict=True))
        return f"start-up took {now - self._begin:.1f} s: {', '.join(parts)}"

    def enter(self, name: str) -> None:
        """Begin a step, a validation or a save, each with a deadline of its own."""
        now, limit = time.monotonic(), self._health.step_timeout
        self._phase = Phase(name, now, now + limit if limit else math.inf, "health.step_timeout")

    def join(self, groups: ProcessGroupCollection) -> None:
        """Begin to watch the other ranks, and to be watched."""
        if dist.get_world_size() > 1:
            # Without the groups of pipeline parallelism: its ranks send different numbers of messages.
            self._groups = {"all": dist.group.WORLD, "tensor": groups.tp, "data": groups.dp_cp}
            mine: Any = dist.distributed_c10d._get_default_store()
            store = mine.clone()  # a connection that this thread alone uses
            self._store = dist.PrefixStore(f"watchdog/{next(_numbers)}", store)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """If the block fails on this rank, let the other ranks know, and give it time to close."""
        try:
            yield
        except Exception as error:
            raise self._judge(error) from error
        finally:
            self._leaves = True
            end_workers()
            self._phase = Phase("closing", time.monotonic(), time.monotonic() + ENDING, "")

    def _judge(self, error: Exception) -> Exception:
        """Tell the other ranks of this rank's failure; return the failure of another rank if that is its cause."""
        lost = process_groups.lost_peer(error) if isinstance(error, RuntimeError) else None
        broken, disk = lost_gpu(error), None if isinstance(error, Failure) else storage_failure(error)
        if broken is not None:
            traceback.print_exception(error)  # where, should it be a kernel's own fault
        found = lost or broken or disk or error
        self._status = getattr(found, "status", 1)
        if self._store is None:
            return found
        if lost is not None and not self._store.check(["call"]):
            return Hang(self._find_late(f"{self._phase.name}: {lost}"))
        line = next(iter(str(found).splitlines()), "")
        call = self._set_call(self._status, line if isinstance(found, Failure) else f"{type(error).__name__}: {line}")
        if lost is None or call["status"] is None:
            return found
        self._status = call["status"]
        return _KINDS.get(self._status, Failure)(f"rank {call['rank']} has failed: {call['line']}")

    def _watch(self) -> None:
        self._looked = time.monotonic()
        while not self._ended.is_set():
            select.select([self.stop.pipe, self._wake], [], [], INTERVAL)
            if not self._ended.is_set():
                self._look()

    def _look(self) -> None:
        self.stop.poll()
        phase, now = self._without_suspension(), time.monotonic()
        self._look_at_stop(phase, now)
        if now > phase.end:
            if phase.name == "closing":
                print(f"rank {self._rank}: closing: not finished after {ENDING:.0f} s; ended", file=sys.stderr)
                _end(self._status)
            self._call(f"{phase.name}: not finished after {now - phase.since:.0f} s ({phase.key})")
        try:
            if self._store is not None and not self._leaves and self._store.check(["call"]):
                self._answer(json.loads(self._store.get("call")))
        except dist.DistError:  # whoever holds the store has ended; the deadlines remain
            self._store = None

    def _without_suspension(self) -> Phase:
        """Return the phase; if the process was suspended, as Slurm and shells do it, its deadline is later by that."""
        phase, now = self._phase, time.monotonic()
        missed, self._looked = now - self._looked - INTERVAL, now
        if missed < SUSPENDED:
            return phase
        print(f"rank {self._rank}: {phase.name}: suspended for {missed:.0f} s, which do not count", file=sys.stderr)
        self._begin += missed
        later = phase._replace(since=phase.since + missed, end=phase.end + missed)
        if self._phase is phase:
            self._phase = later
        return later

    def _look_at_stop(self, phase: Phase, now: float) -> None:
        if self.stop.since is None:
            return
        passed, limit = now - self.stop.since, self._health.stop_timeout
        if self._startup is not None and passed > STARTUP_GRACE:
            line = f"stopped during start-up ({phase.name}); nothing is lost"
            if self._store is not None:
                self._set_call(STOPPED, line)
            print(f"rank {self._rank}: {line}", file=sys.stderr)
            _end(STOPPED)
        if passed > limit:
            self._call(f"{phase.name}: not saved {passed:.0f} s after a signal (health.stop_timeout)")
        waits = launcher.seconds_after_signal()
        if waits is not None and passed > waits - 3 and not self._warned:
            self._warned = True
            fix = f"start it with --shutdown-timeout {limit + 60:.0f}"
            print(
                f"rank {self._rank}: not saved yet; torchrun kills its ranks {waits} s after a signal; {fix}",
                file=sys.stderr,
            )

    def _set_call(self, status: int | None, line: str) -> dict[str, Any]:
        """Set the key ``call`` unless another rank was first; return its value."""
        call = json.dumps({"rank": self._rank, "status": status, "line": line})
        found: dict[str, Any] = json.loads(self._store.compare_set("call", "", call))
        return found

    def _call(self, reason: str) -> NoReturn:
        """Find out which ranks are late, print a line and end all ranks."""
        print(f"error: rank {self._rank}: {self._find_late(reason)}", file=sys.stderr)
        _end(Hang.status)

    def _find_late(self, reason: str) -> str:
        """Let all ranks write their stacks; return the reason with the ranks that are late."""
        stacks = f"stacks in {self._folder / 'stacks'}"
        if self._store is None:
            self._write_stacks()
            return f"{reason}; {stacks}"
        call = self._set_call(None, reason)
        if call["rank"] != self._rank:
            self._answer(call)
        verdict = f"{reason}; {describe(self._reports(), dist.get_world_size())}; {stacks}"
        self._store.set("verdict", verdict)
        return verdict

    def _answer(self, call: dict[str, Any]) -> None:
        """Follow the call of another rank, or return if the main thread ends within the grace."""
        if call["rank"] == self._rank:
            return
        if call["status"] is None:
            self._report()
            with suppress(dist.DistError):
                self._store.wait(["verdict"], timedelta(seconds=3 * GRACE))
            _end(Hang.status)
        self._status = call["status"]
        if not self._ended.wait(GRACE):
            print(f"rank {self._rank}: ends because rank {call['rank']} has: {call['line']}", file=sys.stderr)
            _end(self._status)

    def _report(self) -> None:
        """Write this rank's stacks to a file, and its place to the store."""
        self._write_stacks()
        counts = {name: group._get_sequence_number_for_group() for name, group in self._groups.items()}
        members = {name: sorted(dist.get_process_group_ranks(group)) for name, group in self._groups.items()}
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        waits = False
        while frame is not None and not waits:
            waits, frame = "torch/distributed" in frame.f_code.co_filename, frame.f_back
        place = {"phase": self._phase.name, "counts": counts, "members": members, "waits": waits}
        self._store.set(f"report/{self._rank}", json.dumps(place))

    def _reports(self) -> dict[int, dict[str, Any]]:
        """Return the reports that arrive within the grace, this rank's included, by rank."""
        self._report()
        missing, found, end = set(range(dist.get_world_size())), dict[int, dict[str, Any]](), time.monotonic() + GRACE
        while missing and time.monotonic() < end:
            for rank in sorted(missing):
                if self._store.check([f"report/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"report/{rank}"))
            missing -= found.keys()
            time.sleep(0.05 if missing else 0)
        return found

    def _write_stacks(self) -> None:
        try:
            (self._folder / "stacks").mkdir(parents=True, exist_ok=True)
            with (self._folder / "stacks" / f"rank_{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback(sys.stderr)


def describe(reports: dict[int, dict[str, Any]], ranks: int) -> str:
    """Return which ranks do not respond, and which are late, by the reports of the others."""
    silent = [rank for rank in range(ranks) if rank not in reports]
    most: dict[str, int] = {}
    for report in reports.values():
        for name, count in report["counts"].items():
            key = f"{name} {report['members'][name]}"
            most[key] = max(count, most.get(key, 0))
    late = [
        rank
        for rank, report in sorted(reports.items())
        if any(count < most[f"{name} {report['members'][name]}"] for name, count in report["counts"].items())
    ]
    if not late and any(report["waits"] for report in reports.values()):
        late = [rank for rank, report in sorted(reports.items()) if not report["waits"]]
    parts = []
    if silent:
        parts.append(f"{_names(silent)} not responding (stopped or dead)")
    if late:
        where = ", ".join(sorted({reports[rank]["phase"] for rank in late}))
        parts.append(f"{_names(late)} late, in {where}")
    return "; ".join(parts) or "every rank responds and none is behind the others"


def _names(ranks: list[int]) -> str:
    listed = ", ".join(map(str, ranks[:NAMED])) + (f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else "")
    return f"rank {listed} is" if len(ranks) == 1 else f"ranks {listed} are"


def _end(status: int) -> NoReturn:
    launcher.record(status)
    if status == STOPPED:
        with suppress(OSError):
            run_lock.take_back()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
