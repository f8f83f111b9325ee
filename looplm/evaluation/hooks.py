"""Functions that look at a module's inputs while a model runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def inputs_watched(modules: Iterable[nn.Module], look: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``look(module, inputs)`` before each forward pass of these modules, until the context is left."""
    handles = [module.register_forward_pre_hook(look) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
