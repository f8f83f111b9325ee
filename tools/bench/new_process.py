"""Measurements in a process of their own, and its resident memory."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_new_process(
    function: Callable[Parameters, Result], *arguments: Parameters.args, **keys: Parameters.kwargs
) -> Result:
    """Call a function of an importable module, which ``__main__.py`` is not, in a new process.

    A server forks it, because a spawned process begins with its parent's peak in getrusage.
    """
    sys.stdout.flush()
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        return pool.submit(function, *arguments, **keys).result()


def resident_peak() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
