"""Faster first checkpoint for tests."""

import multiprocessing
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


def spare_the_spawn() -> None:
    """Fork the process that holds Megatron's queue of results, at the first save.

    Megatron would spawn it, and a spawned process would re-import everything the parent imported.
    """
    for name in ("_get_write_results_queue", "get_write_results_queue"):  # before and since Megatron-core 0.17
        if hasattr(filesystem_async, name):
            setattr(filesystem_async, name, _forked_queue)


def _forked_queue(*_: Any) -> Any:
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
    return filesystem_async._results_queue
