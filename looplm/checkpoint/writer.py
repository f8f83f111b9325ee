"""The process that writes one rank's part of checkpoints, beside training.

It is forked early in a run, while little memory is in use, and gets its jobs through a pipe and shared memory. For
each job, the process writes, fsyncs and hashes this rank's files (:mod:`looplm.checkpoint.job`). On rank 0 it then
waits for the fingerprints of all ranks and publishes the checkpoint, so that training never waits for the disk. It dies
with the rank that started it.
"""

import ctypes
import gc
import os
import signal
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from looplm.checkpoint.job import Job, Written, describe, publish, write
from looplm.checkpoint.memory import SharedMemory
from looplm.megatron import device

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1
_NICENESS = 10  # training goes first


class Writer:
    """A process that writes checkpoints."""

    def __init__(self) -> None:
        self._memory = SharedMemory()
        self._thread = ThreadPoolExecutor(1)
        self._copied: Future[None] | None = None
        self._final: Path | None = None
        self._channel, theirs = Pipe()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self._pid = 0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: other threads exist; see _run
                self._pid = os.fork()
            if self._pid == 0:
                self._channel.close()
                _run(theirs, parent, self._memory)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._end = weakref.finalize(self, _kill, self._pid, self._channel)

    @property
    def is_new(self) -> bool:
        """True before the first job."""
        return self._final is None

    def start(self, job: Job) -> None:
        """Begin a job. A thread copies its tensors, which must not change before :meth:`settle`."""
        self._final = job.final
        self._copied = self._thread.submit(self._hand_over, job, device.stream_from_now())

    def settle(self) -> None:
        """Return once the job's tensors are copied, or could not be."""
        if self._copied is not None:
            wait([self._copied])

    def _hand_over(self, job: Job, stream: device.Stream | None) -> None:
        slots = self._memory.store(job.plan.tensors(), stream)
        with suppress(ConnectionError):  # it was killed; the next receive() says so
            self._channel.send(job._replace(plan=job.plan.with_tensors(slots)))

    def receive(self) -> Written | bool:
        """Return this rank's result once it is there, True once the checkpoint is published, and False until then.

        Raises:
            ChildProcessError: the process has failed or was killed, or had no memory; the message says why.
        """
        if self._copied is not None and self._copied.done() and (error := self._copied.exception()) is not None:
            raise ChildProcessError(describe(error, self._final))
        try:
            message: Written | bool | str = self._channel.recv() if self._channel.poll() else False
        except (EOFError, ConnectionError):
            status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            self._end.detach()
            how = f"was killed (signal {-status})" if status < 0 else f"ended with status {status}"
            message = f"{self._final}: the process that wrote this checkpoint {how}; repeat the command to resume"
            raise ChildProcessError(message) from None
        if isinstance(message, str):
            raise ChildProcessError(message)
        return message

    def publish(self, written: list[Written]) -> None:
        """Hand the results of all ranks to rank 0's process, which then publishes the checkpoint."""
        with suppress(ConnectionError):  # it was killed; the next receive() says so
            self._channel.send(written)

    def end(self) -> None:
        """Kill the process if it still runs."""
        self._end()


def _kill(pid: int, channel: Connection) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    channel.close()


def _run(channel: Connection, parent: int, memory: SharedMemory) -> NoReturn:
    """Do the work of the forked process and end it.

    Only the forking thread exists here, and locks that others held stay locked. Nothing below takes one: no logging, no
    OpenMP, no CUDA. Garbage collection is off, because it would free CUDA tensors of the parent.
    """
    current: Job | None = None
    try:
        gc.disable()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        for number in _SIGNALS:  # they ask the parent to stop, which waits for this process
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.nice(_NICENESS)
        while True:
            sent: Job = channel.recv()
            current = sent._replace(plan=sent.plan.with_tensors(memory.load(sent.plan.tensors())))
            channel.send(write(current))
            if current.plan.metadata is not None:
                publish(current, channel.recv())
                channel.send(True)
    except EOFError:  # the parent has ended
        os._exit(0)
    except BaseException as error:
        with suppress(BaseException):
            channel.send(describe(error, None if current is None else current.final))
        os._exit(1)
