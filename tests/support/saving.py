"""What a checkpoint costs a test besides its bytes."""

import multiprocessing

from megatron.core.dist_checkpointing.strategies import filesystem_async


def spare_the_spawn() -> None:
    """Megatron's first save starts a process that holds a queue, and that imports all that this one has. A fork is it."""
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()
