"""The process that writes one rank's part of checkpoints, beside training.

It is forked early in a run, while little memory is in use, and gets its jobs through a pipe and shared memory. Or it is
forked for a single job, and finds the tensors where they are.

For each job, the process writes, fsyncs and hashes this rank's files. On rank 0 it then waits for the fingerprints of
all ranks and publishes the checkpoint, so that training never waits for the disk. It dies with the rank that started
it.
"""

import ctypes
import gc
import os
import shutil
import signal
import warnings
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

import looplm.checkpoint.step_folder as step_folder
from looplm.checkpoint.memory import SharedMemory
from looplm.checkpoint.plan import STATE, Plan, PlannedFile, write_description, write_file
from looplm.checkpoint.verify import Fingerprint, fingerprint
from looplm.failures import Failure
from looplm.files import fsync, storage_failure
from looplm.megatron import device

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1
_NICENESS = 10  # training goes first

Content = bytes | dict[str, Any] | Path  # bytes, values for YAML, or a file or folder to copy


class Job(NamedTuple):
    """One rank's part of a checkpoint.

    Args:
        final: directory to be made.
        folder: directory in which the files are collected.
        plan: from :func:`looplm.checkpoint.plan.make_plan`, with tensors in host memory or in shared memory.
        files: further files of this rank by relative name.
        after: called by rank 0's process after it has published the checkpoint.
    """

    final: Path
    folder: Path
    plan: Plan
    files: Mapping[str, Content]
    after: Callable[[], None] | None

    def in_host_memory(self) -> "Job":
        """Return this job with its tensors copied from the GPU."""
        tensors = [tensor.to("cpu", non_blocking=True) for tensor in self.plan.tensors()]
        device.synchronize()
        return self._replace(plan=self.plan.with_tensors(tensors))


class Written(NamedTuple):
    """One rank's files on the disk: Megatron's results, and fingerprints by relative name."""

    results: list[list[object]]
    files: dict[str, Fingerprint]


class Writer:
    """A process that writes checkpoints.

    Args:
        job: the only one; None lets the process wait for :meth:`start`.
    """

    def __init__(self, job: Job | None = None) -> None:
        self._memory = SharedMemory()
        self._thread = ThreadPoolExecutor(1)
        self._copied: Future[None] | None = None
        self._final = None if job is None else job.final
        self._job = job  # pinned memory of its tensors would be reused if nothing here referred to it
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
                _run(theirs, parent, self._memory, job)
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
            raise ChildProcessError(_describe(error, self._final))
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


def _run(channel: Connection, parent: int, memory: SharedMemory, job: Job | None) -> NoReturn:
    """Do the work of the forked process and end it.

    Only the forking thread exists here, and locks that others held stay locked. Nothing below takes one: no logging, no
    OpenMP, no CUDA. Garbage collection is off, because it would free CUDA tensors of the parent.
    """
    current = job
    try:
        gc.disable()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        for number in _SIGNALS:  # they ask the parent to stop, which waits for this process
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        if job is None:
            os.nice(_NICENESS)
        while True:
            if job is None:
                sent: Job = channel.recv()
                current = sent._replace(plan=sent.plan.with_tensors(memory.load(sent.plan.tensors())))
            assert current is not None
            channel.send(_write(current))
            if current.plan.metadata is not None:
                _publish(current, channel.recv())
                channel.send(True)
            if job is not None:
                os._exit(0)
    except EOFError:  # the parent has ended
        os._exit(0)
    except BaseException as error:
        with suppress(BaseException):
            channel.send(_describe(error, None if current is None else current.final))
        os._exit(1)


def _describe(error: BaseException, final: Path | None) -> str:
    failure = error if isinstance(error, Failure) else storage_failure(error, final)
    return str(
        failure or f"{final}: could not be written ({type(error).__name__}: {error}); repeat the command to resume"
    )


def _write(job: Job) -> Written:
    files: dict[str, Fingerprint] = {}
    with ThreadPoolExecutor(max(1, len(job.plan.files))) as threads:  # memory, hashes and the disk work side by side
        planned = list(threads.map(lambda file: _write_planned(job.folder, file), job.plan.files))
    for file, (_, found) in zip(job.plan.files, planned, strict=True):
        files[f"{STATE}/{file.name}"] = found
    for name, content in {**job.plan.common, **job.files}.items():
        files |= _write_content(job.folder, name, content)
    return Written([results for results, _ in planned], files)


def _write_planned(folder: Path, file: PlannedFile) -> tuple[list[object], Fingerprint]:
    """Write one of Megatron's files; return its results and the file's fingerprint."""
    path, written = folder / STATE / file.name, Future[list[object]]()
    path.touch()
    with ThreadPoolExecutor(1) as reader:
        found = reader.submit(fingerprint, path, lambda: written.done() and written.result() is not None)
        try:
            written.set_result(write_file(folder, file))
        except BaseException as error:
            written.set_exception(error)  # the reader meets it and ends
            raise
        fsync(path)
        return written.result(), found.result()


def _settled(path: Path) -> Fingerprint:
    """Wait until a file is on the disk, and return its fingerprint."""
    fsync(path)
    return fingerprint(path)


def _write_content(folder: Path, name: str, content: Content) -> dict[str, Fingerprint]:
    """Write one file, or copy a folder; return the fingerprints of the files by name."""
    path = folder / name
    if isinstance(content, Path) and content.is_dir():
        path.mkdir()
        inner = [_write_content(folder, f"{name}/{found.name}", found) for found in sorted(content.iterdir())]
        return {name: found for files in inner for name, found in files.items()}
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, sort_keys=False).encode())
    return {name: _settled(path)}


def _publish(job: Job, everything: list[Written]) -> None:
    results = [result for written in everything for result in written.results]
    names = write_description(job.folder, job.plan.metadata, results)
    files = {name: found for written in everything for name, found in written.files.items()}
    files |= {name: _settled(job.folder / name) for name in names}
    step_folder.publish(job.folder, job.final, files)
    if job.after is not None:
        job.after()
