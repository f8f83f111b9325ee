"""Execution of a step in processes of this machine, none of which outlives the command or is waited for in vain.

datatrove's executor gives its tasks to a pool, which waits forever for the task of a worker that was killed, and whose
workers keep writing after the command itself was killed.
"""

import fcntl
import os
import signal
import threading
import traceback
from copy import deepcopy
from multiprocessing.connection import Connection
from typing import Any

import multiprocess
import multiprocess.connection
import multiprocess.process
from datatrove.executor import LocalPipelineExecutor

from looplm.failures import Failure

TASKS = ".tasks"  # file of the work folder that every task's process holds locked
FINISHED = "finished"  # file in the log folder of a step whose tasks are all done


class StepFailed(Failure):
    """A failure outside the data. Finished tasks stay on disk, and the next run continues from them."""


class LocalExecutor(LocalPipelineExecutor):
    """datatrove's executor, with one process per task; with one worker the tasks run in this process.

    Args:
        work: the work folder.
    """

    pipeline: list[Any]

    def __init__(self, *args: Any, work: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.work = work

    def run(self) -> None:
        """Run the tasks that are not yet marked as completed.

        Raises:
            StepFailed: a task's process was killed.
            Exception: the exception of the first task that raised one.
        """
        waiting = self.get_incomplete_ranks()
        if self.workers > 1 and len(waiting) > 1:
            self._run_in_processes(waiting)
            return
        pipeline = self.pipeline
        for rank in waiting:
            self.pipeline = deepcopy(pipeline)
            self._run_for_rank(rank)

    def _run_in_processes(self, ranks: list[int]) -> None:
        context = multiprocess.get_context("forkserver")
        waiting, running = list(ranks), dict[Connection, tuple[int, Any]]()
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    rank = waiting.pop(0)
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_run_task, args=(self, rank, sender))
                    process.start()
                    sender.close()
                    running[receiver] = rank, process
                for receiver in multiprocess.connection.wait(list(running)):
                    rank, process = running.pop(receiver)
                    _finish(receiver, rank, process, self.logging_dir.path)
        finally:
            for _, process in running.values():
                process.kill()
                process.join()


def _finish(receiver: Connection, rank: int, process: Any, logs: str) -> None:
    """Wait for the end of a task, and raise what it raised."""
    try:
        error = receiver.recv()
    except EOFError:
        process.join()
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit status {process.exitcode}"
        fix = "run the same command again, with fewer executor.workers if memory was short"
        raise StepFailed(f"{logs}: the process of task {rank} was ended by {how}; {fix}") from None
    process.join()
    if error is not None:
        raise error


def _run_task(executor: LocalExecutor, rank: int, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its tasks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        with open(os.path.join(executor.work, TASKS), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
            executor._run_for_rank(rank)
    except Exception as error:
        if not isinstance(error, (Failure, OSError)):
            error.add_note(traceback.format_exc())  # a traceback does not travel between processes
        sender.send(error)
    else:
        sender.send(None)


def _end_with_parent() -> None:
    """End this process when the command has ended, so that a repeated command is alone with its files."""
    parent = multiprocess.process.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
