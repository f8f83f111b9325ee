"""Signals that ask a run to save and end: SIGTERM, SIGINT (Ctrl-C), SIGUSR1 (Slurm's --signal) and SIGHUP.

SIGHUP says that the terminal was closed, or the connection to it lost. Under nohup it stays ignored.

Python runs a signal's handler between two bytecodes of the main thread, never while that thread waits in a collective.
So the handlers here do nothing: the C part of Python writes each signal's number to a pipe at once, and the watchdog's
thread reads it.
"""

import errno
import io
import multiprocessing
import os
import signal
import stat
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from looplm.megatron.device import DEVICE

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
STOPPED = 128 + signal.SIGTERM  # exit status of a run that a signal ended and whose state is saved
ABANDONED = 128 + signal.SIGINT  # exit status after a second signal: nothing was saved
ECHO = 3.0  # seconds in which another signal is part of the same request: Slurm and torchrun both send theirs

_active: "StopRequest | None" = None


class StopRequest:
    """While active, a signal asks for a checkpoint and an orderly end. A second one, seconds later, ends at once.

    Forked children ignore these signals: torchrun and a terminal send them to the whole process group, but a writer of
    checkpoints must finish and a reader of data must keep reading until its parent has saved.

    Attributes:
        asked: the signal and the rank that received it, once :meth:`agree` has told all ranks; empty before.
        since: ``time.monotonic()`` of the request on this rank, of a signal or of :meth:`agree`; None before.
        pipe: file descriptor that becomes readable when a signal arrives.
    """

    asked: str = ""
    since: float | None = None
    pipe: int = -1

    def __init__(self) -> None:
        self._number = 0  # of the first signal on this rank
        self._lock = threading.Lock()

    def __enter__(self) -> "StopRequest":
        global _active
        self.pipe, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        handled = [number for number in SIGNALS if not (nohup and number == signal.SIGHUP)]
        self._before = {number: signal.signal(number, _do_nothing) for number in handled}
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = (_outlive_reader(stream) for stream in self._streams)
        _active = self
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        sys.stdout, sys.stderr = self._streams
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.pipe)
        os.close(self._writer)
        self.pipe = -1

    def poll(self) -> None:
        """Read the signals that have arrived. A second request ends the process."""
        with self._lock:
            for number in self._arrived():
                if self.since is None or not self._number:
                    self._number, self.since = number, self.since or time.monotonic()
                    _say_on_rank_0(f"{signal.Signals(number).name}: saving, then ending; a second one ends at once")
                elif time.monotonic() - self.since > ECHO:
                    name = signal.Signals(number).name
                    print(f"error: {name}: second request to end; nothing more is saved", file=sys.stderr, flush=True)
                    os._exit(ABANDONED)

    def agree(self) -> bool:
        """Return True if any rank has received a signal. Collective; cheap enough for every step."""
        self.poll()
        flag = torch.tensor([self._number and 64 * (dist.get_rank() + 1) + self._number], device=DEVICE)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        rank, number = divmod(int(flag.item()), 64)
        if number and not self.asked:
            self.asked = f"{signal.Signals(number).name} on rank {rank - 1}"
            self.since = self.since or time.monotonic()
        return bool(self.asked)

    def _arrived(self) -> list[int]:
        try:
            numbers = os.read(self.pipe, 4096) if self.pipe >= 0 else b""
        except BlockingIOError:
            return []
        return [number for number in numbers if number in SIGNALS]  # others may have Python handlers too


def ignore_signals(_: int = 0) -> None:
    """Let this child process ignore the signals of a :class:`StopRequest`. A DataLoader's workers call it too.

    torch resets their handlers, so that a signal to the process group would end them, and with them the run.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Kill the processes that prepare batches for this one.

    multiprocessing would end them at exit with SIGTERM, which they ignore (:func:`ignore_signals`), and wait forever.
    """
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class _Output(io.FileIO):
    """A file descriptor that swallows what is written after its terminal or the reader of its pipe has gone."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(content)


def _outlive_reader(stream: Any) -> Any:
    """Return a stream to the same place whose writes do not fail when nobody reads there any more.

    A closed terminal also sends SIGHUP, and Ctrl-C also ends the ``tee`` behind a pipe: the run must save nevertheless.
    """
    try:
        kind = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # a notebook's or a test's
        return stream
    if not (stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)):
        return stream
    stream.flush()
    buffered = io.BufferedWriter(_Output(stream.fileno(), "wb", closefd=False))
    return io.TextIOWrapper(buffered, stream.encoding, stream.errors, line_buffering=True)


def _do_nothing(number: int, frame: Any) -> None:
    pass


def _say_on_rank_0(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)


def _ignore_in_child() -> None:
    if _active is not None:
        ignore_signals()
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_ignore_in_child)
