"""Faster first checkpoint for tests."""

import multiprocessing

from megatron.core.dist_checkpointing.strategies import filesystem_async


def spare_the_spawn() -> None:
    """Fork the process that holds Megatron's queue of results.

    Megatron would spawn it at the first save, and a spawned process would re-import everything the parent imported.
    """
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
