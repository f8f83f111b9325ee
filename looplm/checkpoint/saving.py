"""One checkpoint that all ranks write together, beside training."""

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

import looplm.checkpoint.step_folder as step_folder
from looplm.checkpoint.about import About
from looplm.checkpoint.job import Content, Job, Written, describe, publish, write
from looplm.checkpoint.plan import STATE, make_plan
from looplm.checkpoint.writer import Writer
from looplm.failures import StorageFailure
from looplm.files import writing
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE

COMPANION_FOLDER = "companions"
_SHORTEST, _LONGEST = 0.0005, 0.01  # seconds between two looks of a rank that waits


class Saving:
    """A checkpoint in the making. Every method is collective, except :meth:`abort`.

    The constructor returns at once. The state must not change before :meth:`settle`, and :meth:`advance` must be called
    now and then.

    Args:
        final: the directory to be made.
        state: a sharded state.
        config: the content of config.yaml.
        about: the content of about.json.
        tokenizer: a tokenizer.json to copy, or its content.
        companions: a folder to copy, if it exists.
        after: called in the process that has published the checkpoint.
        writer: takes the job, and others later; None writes in this process, in :meth:`advance`.
        owns_folder: all that is beside ``final`` is this run's, and what a failure leaves half done there is repaired.
    """

    def __init__(
        self,
        final: Path,
        state: dict[str, Any],
        config: dict[str, Any],
        about: About,
        tokenizer: Path | bytes,
        companions: Path | None = None,
        after: Callable[[], None] | None = None,
        writer: Writer | None = None,
        owns_folder: bool = False,
    ) -> None:
        self.final, self._owns_folder = final, owns_folder
        folder = process_groups.on_rank_0(lambda: _create(final))
        files: dict[str, Content] = {}
        if process_groups.is_rank_0():
            files["config.yaml"] = config
            files["about.json"] = json.dumps(dataclasses.asdict(about), indent=1).encode()
            files["tokenizer.json"] = tokenizer
            if companions is not None and companions.is_dir():
                files[COMPANION_FOLDER] = companions
        self._written: Written | None = None  # this rank's result
        self._is_publishing = False  # all ranks have written
        self._is_published = False  # on rank 0
        self._failure = ""
        plan = make_plan(state, folder, validate=writer is None or writer.is_new)  # a run's state keeps its form
        job = Job(final, folder, plan, files, after)
        self._writer: Writer | _WriterHere | None
        if writer is None:
            self._writer = _WriterHere(job.in_host_memory())
        else:
            writer.start(job)
            self._writer = writer

    def settle(self) -> None:
        """Return once this rank's state is copied; then it may change."""
        if self._writer is not None:
            self._writer.settle()

    def advance(self) -> bool:
        """Do what can be done without waiting for the disk; return True once the checkpoint is published.

        Raises:
            StorageFailure: a rank's process has failed or was killed. Every rank raises it, and nothing is published.
        """
        is_done = self._look()
        state = torch.tensor([float(not is_done), float(bool(self._failure))], device=DEVICE)
        dist.all_reduce(state, op=dist.ReduceOp.MAX)
        is_busy, is_failed = state.tolist()
        if is_failed:
            self._fail()
        if is_busy:
            return False
        if self._is_publishing:
            return True
        everything: list[Any] | None = [None] * dist.get_world_size() if process_groups.is_rank_0() else None
        dist.gather_object(self._written, everything, dst=0)
        if everything is not None and self._writer is not None:
            self._writer.publish(everything)
        self._is_publishing = True
        return False

    def _look(self) -> bool:
        """Return True if this rank's process has done what it can do now; note its failure."""
        if self._writer is not None and (process_groups.is_rank_0() or self._written is None):
            try:
                message = self._writer.receive()
            except ChildProcessError as error:
                self._failure = str(error)
                return True
            if isinstance(message, Written):
                self._written = message
            self._is_published = message is True
        if not self._is_publishing:
            return self._written is not None
        return self._is_published or not process_groups.is_rank_0()

    def _fail(self) -> NoReturn:
        """Stop every rank's process, remove what they wrote, and raise the first failure on every rank."""
        self._end_writer()
        try:
            process_groups.share_failure(StorageFailure(self._failure) if self._failure else None)
        finally:
            self.abort()  # again on rank 0, now that no rank's process writes any more
        raise AssertionError("no rank has failed")

    def wait(self) -> None:
        """Return once the checkpoint is published; raise as :meth:`advance` does."""
        pause = _SHORTEST
        while not self.advance():
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)  # the same on all ranks, which advance together

    def abort(self) -> None:
        """End this rank's process. On rank 0, remove the files; what other ranks still write, the next run removes."""
        self._end_writer()
        if process_groups.is_rank_0():
            with suppress(OSError):
                step_folder.discard_partial(self.final)
                if self._owns_folder:
                    step_folder.recover(self.final.parent)

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.end()
            self._writer = None


def _create(final: Path) -> Path:
    folder = step_folder.create_partial(final)
    with writing(final):
        (folder / STATE).mkdir()
    return folder


class _WriterHere:
    """One job, done in this process; the methods are those of :class:`looplm.checkpoint.writer.Writer`."""

    def __init__(self, job: Job) -> None:
        self._job, self._is_written = job, False
        self._everything: list[Written] | None = None

    def settle(self) -> None:
        """Do nothing: the state must not change before the end."""

    def receive(self) -> Written | bool:
        """Write this rank's part, or publish the checkpoint if :meth:`publish` has been called."""
        try:
            if self._everything is not None:
                publish(self._job, self._everything)
                return True
            if self._is_written:
                return False
            self._is_written = True
            return write(self._job)
        except Exception as error:
            raise ChildProcessError(describe(error, self._job.final)) from error

    def publish(self, written: list[Written]) -> None:
        """Have the next :meth:`receive` publish the checkpoint with the results of all ranks."""
        self._everything = written

    def end(self) -> None:
        """Do nothing: no process is left."""
