"""Start several processes as torchrun would, but fork them from a server that has imported everything once.

On two cores, importing torch and Megatron-core takes longer than most jobs.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import worker

# Four processes on two cores mostly wait for each other: `make test` runs a sample of their cases, `make test-layouts`
# runs all.
EVERYTHING = os.environ.get("LAYOUTS") == "all"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([worker.__name__])


def launch(ranks: int, jobs: Sequence[Callable[[], None]], folder: Path, timeout: int = 600) -> None:
    """Run jobs of tests.support.worker on ``ranks`` processes."""
    number = len(list(folder.glob("log_*.txt")))
    run_ranks(ranks, worker.run, (jobs,), folder / f"log_{number}.txt", timeout)


def run_ranks(ranks: int, main: Callable[..., None], arguments: tuple[Any, ...], log: Path, timeout: int = 600) -> None:
    """Run ``main(*arguments)`` on ``ranks`` processes, which all write to ``log``; ``main`` is a module-level function.

    If a rank fails, the others would wait for it forever: they are killed, and the end of the log becomes the message.
    All ranks are killed after ``timeout`` seconds.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        SERVER.Process(target=_rank, args=(rank, ranks, store.port, main, arguments, log)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    end, running = time.monotonic() + timeout, processes
    while running and not any(process.exitcode for process in processes) and (left := end - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        running = [process for process in running if process.exitcode is None]
    failed = any(process.exitcode for process in processes)
    for process in running:
        process.kill()
        process.join()
    reason = "a rank failed" if failed else f"ranks still ran after {timeout} s"
    assert not failed and not running, f"{reason}\n{log.read_text()[-6000:]}"


def _rank(rank: int, ranks: int, port: int, main: Callable[..., None], arguments: tuple[Any, ...], log: Path) -> None:
    """Run ``main`` with torchrun's environment variables and with its output appended to ``log``."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    variables["LOCAL_WORLD_SIZE"] = ranks
    os.environ |= {name: str(value) for name, value in variables.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(1)  # independent of the tests' own setting
    main(*arguments)
