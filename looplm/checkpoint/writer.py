"""One rank's part of a checkpoint: planned by Megatron-core, then written by a process beside training.

Megatron-core plans which rank writes which tensor, copies tensors from the GPU and has the code that writes them. Its
own background processes are not used. They are only asked whether they are alive, so a killed one counts as finished;
and with Megatron-core 0.16 each starts more processes and waits forever for one that was killed.

The process is forked, so it sees memory as it was at that moment: before training overwrites a page, the kernel copies
it. The process writes, fsyncs and hashes this rank's files. On rank 0 it then waits for the fingerprints of all ranks
and publishes the checkpoint, so that training never waits for the disk. It dies with the rank that started it.
"""

import ctypes
import gc
import inspect
import io
import os
import queue
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from looplm.checkpoint.verify import Fingerprint, fingerprint
from looplm.failures import Failure
from looplm.files import fsync, storage_failure
from looplm.megatron import process_groups

STATE = "state"  # folder of Megatron's files
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_PR_SET_PDEATHSIG = 1
# Megatron-core 0.19 would otherwise ask for nvidia-resiliency-ext.
_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
_OPTIONS = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}

Content = bytes | Path  # bytes, or a file or folder to copy


class Plan(NamedTuple):
    """This rank's part of a sharded state.

    Args:
        writer: Megatron's; it knows where each tensor goes and writes ``.metadata``.
        buckets: the tensors by file, in host memory.
        metadata: description of all ranks' tensors; None except on rank 0.
        common: files with the state that is not sharded, if this version of Megatron-core stores it apart.
    """

    writer: FileSystemWriterAsync
    buckets: list[Any]
    metadata: Any
    common: dict[str, Content]


class Written(NamedTuple):
    """One rank's share of a checkpoint on the disk: Megatron's results, and fingerprints by relative name."""

    results: list[Any]
    files: dict[str, Fingerprint]


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy for torch_dist, which keeps the plan instead of making a function that carries it out."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, planned[1]
        return AsyncRequest(None, (), [])


def make_plan(state: dict[str, Any], folder: Path) -> Plan:
    """Plan to write a sharded state to ``folder/state``, and copy this rank's tensors to host memory. Collective."""
    force_all_tensors_to_non_fp8(state)  # engine.fp8_params
    strategy = _PlanOnly("torch_dist", 1)
    with _kept_common_state() as files:
        dist_checkpointing.save(
            state, str(folder / STATE), sharded_strategy=strategy, async_sharded_save=True, **_OPTIONS
        )
    buckets = FileSystemWriterAsync.preload_tensors(strategy.writer.write_buckets or [], True)
    return Plan(strategy.writer, buckets, strategy.metadata, files)


@contextmanager
def _kept_common_state() -> Iterator[dict[str, Content]]:
    """Let Megatron-core 0.16 hand over the content of common.pt instead of writing it.

    It writes on rank 0 before the ranks agree on the plan. If the disk is full, the other ranks would wait there.
    """
    files: dict[str, Content] = {}
    strategy: Any = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:  # since Megatron-core 0.17, that state is planned too
        yield files
        return

    def keep(_: Any, state: Any, __: Any) -> None:
        if process_groups.is_rank_0():
            stream = io.BytesIO()
            torch.save(state, stream)
            files[f"{STATE}/{common.COMMON_STATE_FNAME}"] = stream.getvalue()

    original, strategy.save_common = strategy.save_common, keep
    try:
        yield files
    finally:
        strategy.save_common = original


class WriterProcess:
    """The process that writes one rank's part.

    Args:
        plan: from :func:`make_plan`.
        final: directory that the files are for, named in error messages.
        folder: directory that they are written to.
        files: further files of this rank by relative name.
        publish: called on rank 0 with the fingerprints of all ranks' files; None on other ranks.
    """

    def __init__(
        self,
        plan: Plan,
        final: Path,
        folder: Path,
        files: Mapping[str, Content],
        publish: Callable[[dict[str, Fingerprint]], None] | None,
    ) -> None:
        self._final = final
        self._plan = plan  # pinned memory would be reused as soon as nothing here refers to it
        self._channel, theirs = Pipe()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: the process has threads; see _run
            self.pid = os.fork()
        if self.pid == 0:
            self._channel.close()
            _run(theirs, parent, plan, final, folder, files, publish)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def receive(self) -> Written | bool:
        """Return this rank's result once it is there, True once the checkpoint is published, and False until then.

        Raises:
            ChildProcessError: the process has failed or was killed; the message says why.
        """
        try:
            message = self._channel.recv() if self._channel.poll() else False
        except (EOFError, ConnectionError):
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            self.pid = 0
            how = f"was killed (signal {-status})" if status < 0 else f"ended with status {status}"
            message = f"{self._final}: the process that wrote this checkpoint {how}; repeat the command to resume"
            raise ChildProcessError(message) from None
        if isinstance(message, str):
            raise ChildProcessError(message)
        return message

    def send_all(self, written: list[Written]) -> None:
        """Hand all ranks' results to rank 0's process, which then publishes the checkpoint."""
        with suppress(ConnectionError):  # it was killed; the next receive() says so
            self._channel.send(written)

    def end(self) -> None:
        """Kill the process if it still runs."""
        if self.pid:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0
        self._channel.close()


def _run(
    channel: Connection,
    parent: int,
    plan: Plan,
    final: Path,
    folder: Path,
    files: Mapping[str, Content],
    publish: Callable[[dict[str, Fingerprint]], None] | None,
) -> NoReturn:
    """Do the work of the forked process and end it.

    Only the forking thread exists here, and locks that others held stay locked. Nothing below takes one: no logging, no
    OpenMP, no CUDA. Garbage collection is off, because it would free CUDA tensors of the parent.
    """
    try:
        gc.disable()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
        for number in _SIGNALS:  # they ask the parent to stop, which waits for this process
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        channel.send(_write(plan, folder, {**plan.common, **files}))
        if publish is not None:
            everything: list[Written] = channel.recv()
            publish(_finish(plan, folder, everything))
            channel.send(True)
        os._exit(0)
    except BaseException as error:
        with suppress(BaseException):
            channel.send(_describe(error, final))
        os._exit(1)


def _describe(error: BaseException, final: Path) -> str:
    failure = error if isinstance(error, Failure) else storage_failure(error, final)
    if failure is not None:
        return str(failure)
    return f"{final}: could not be written ({type(error).__name__}: {error}); repeat the command to resume"


def _write(plan: Plan, folder: Path, files: Mapping[str, Content]) -> Written:
    results = list[Any]()
    transforms = [plan.writer.transforms] if hasattr(plan.writer, "transforms") else []
    for number, bucket in enumerate(plan.buckets):
        outcomes, running = queue.SimpleQueue[Any](), queue.Queue[int]()
        running.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, outcomes, running, use_fsync=True)
        _, outcome = outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        results += outcome
    names = [f"{STATE}/{name}" for _, name, _ in plan.buckets]
    for name, content in files.items():
        names += _write_file(folder, name, content)
    return Written(results, {name: fingerprint(folder / name) for name in names})


def _write_file(folder: Path, name: str, content: Content) -> list[str]:
    """Write one file, or copy a folder; return the names of the files."""
    path = folder / name
    if isinstance(content, Path) and content.is_dir():
        path.mkdir()
        return [
            made for inner in sorted(content.iterdir()) for made in _write_file(folder, f"{name}/{inner.name}", inner)
        ]
    path.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, path)
    fsync(path)
    return [name]


def _finish(plan: Plan, folder: Path, everything: list[Written]) -> dict[str, Fingerprint]:
    """Write Megatron's description of all ranks' files; return the fingerprints of all files."""
    plan.writer.finish(plan.metadata, [written.results for written in everything])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder / STATE))
    names = (f"{STATE}/.metadata", f"{STATE}/metadata.json")
    for name in names:
        fsync(folder / name)
    files = {name: found for written in everything for name, found in written.files.items()}
    return files | {name: fingerprint(folder / name) for name in names}
