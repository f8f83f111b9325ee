"""One rank's part of a checkpoint, and the work of writing it: files, their flush to the disk, and their hashes.

Large files are written one after the other. While the next is written, other threads flush a file to the disk and hash
it.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import looplm.checkpoint.step_folder as step_folder
from looplm.checkpoint.plan import STATE, Plan, write_description, write_file
from looplm.checkpoint.verify import Fingerprint, fingerprint
from looplm.failures import Failure
from looplm.files import fsync, storage_failure
from looplm.megatron import device

_Pending = tuple[Future[None], Future[Fingerprint]]  # the end of a file's flush, and its hash

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


def write(job: Job) -> Written:
    """Write the files of a job and wait until they are on the disk."""
    small = {**job.plan.common, **job.files}
    names = [written for name, content in small.items() for written in _write_content(job.folder, name, content)]
    results: list[list[object]] = []
    with _without_checksums(), ThreadPoolExecutor() as others:
        pending: dict[str, _Pending] = {}
        for file in job.plan.files:
            results.append(write_file(job.folder, file))
            name = f"{STATE}/{file.name}"
            pending[name] = _flush_and_hash(job.folder / name, others)
        pending |= {name: _flush_and_hash(job.folder / name, others) for name in names}
        for flushed, _ in pending.values():
            flushed.result()
        return Written(results, {name: found.result() for name, (_, found) in pending.items()})


def publish(job: Job, everything: list[Written]) -> None:
    """Complete a checkpoint of which all ranks have written their parts, and rename it to its final name."""
    results = [result for written in everything for result in written.results]
    names = write_description(job.folder, job.plan.metadata, results)
    files = {name: found for written in everything for name, found in written.files.items()}
    files |= {name: _flush_and_hash_now(job.folder / name) for name in names}
    step_folder.publish(job.folder, job.final, files)
    if job.after is not None:
        job.after()


def describe(error: BaseException, final: Path | None) -> str:
    """Return one line about an error that ended the writing of a checkpoint."""
    failure = error if isinstance(error, Failure) else storage_failure(error, final)
    return str(
        failure or f"{final}: could not be written ({type(error).__name__}: {error}); repeat the command to resume"
    )


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out the checksum in torch's files: the manifest's hash covers every byte; it costs a third more."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _flush_and_hash(path: Path, others: Executor) -> _Pending:
    """Let other threads flush a file to the disk and hash it."""
    return others.submit(fsync, path), others.submit(fingerprint, path)


def _flush_and_hash_now(path: Path) -> Fingerprint:
    """Wait until a file is on the disk, and return its fingerprint."""
    fsync(path)
    return fingerprint(path)


def _write_content(folder: Path, name: str, content: Content) -> list[str]:
    """Write one file, or copy a folder; return the names of the files."""
    path = folder / name
    if isinstance(content, Path) and content.is_dir():
        path.mkdir()
        found = sorted(content.iterdir())
        return [inner for file in found for inner in _write_content(folder, f"{name}/{file.name}", file)]
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content, sort_keys=False).encode())
    return [name]
