"""Roles side by side, each in a process of its own: torch has one process group and one set of patches in a process."""

import multiprocessing
import os
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from looplm.config import RunConfig
from tools.rehearsal.one_role import RoleReport, rehearse_role
from tools.rehearsal.roles import Role

# Every process is forked from one that has imported everything once: that takes longer than many a role.
_SERVER = multiprocessing.get_context("forkserver")


class Assignment(NamedTuple):
    """A role to rehearse, with the arguments of :func:`tools.rehearsal.one_role.rehearse_role`."""

    config: RunConfig
    ranks: int
    role: Role
    micro_batches: int


class Failed(NamedTuple):
    """A role that could not be rehearsed: the run would fail there."""

    role: Role
    error: str
    where: str


def rehearse_all(work: Sequence[Assignment], jobs: int) -> Iterator[tuple[int, RoleReport | Failed]]:
    """Rehearse roles in up to ``jobs`` processes; yield each one's number and report as it ends."""
    _SERVER.set_forkserver_preload([__name__])
    waiting, running = list(enumerate(work)), dict[Connection, tuple[int, Any]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, assignment = waiting.pop(0)
                here, there = _SERVER.Pipe(duplex=False)
                process = _SERVER.Process(target=_play, args=(assignment, there), daemon=True)
                with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):  # of the server: a GPU would give real memory
                    process.start()
                there.close()
                running[here] = number, process
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                number, process = running.pop(connection)
                try:
                    report = connection.recv()
                except EOFError:
                    process.join()
                    report = Failed(work[number].role, f"its process ended with status {process.exitcode}", "")
                process.join()
                yield number, report
    finally:
        for _, process in running.values():
            process.kill()


def _play(assignment: Assignment, to: Connection) -> None:
    torch.set_num_threads(1)
    try:
        to.send(rehearse_role(*assignment))
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [
            frame for frame in frames if "/tools/rehearsal/" not in frame.filename and "/torch/" not in frame.filename
        ]
        last = (own or list(frames))[-1]
        text = " ".join(str(error).split()) or type(error).__name__
        kind = type(error).__name__
        to.send(Failed(assignment.role, f"{kind}: {text}", f"{last.filename}:{last.lineno} {last.name}"))
    finally:
        to.close()
