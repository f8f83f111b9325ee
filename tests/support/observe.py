"""Functions that report their calls, and sizes of tensors, for tests that watch the product work."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def observed(function: Callable[Parameters, Result], observe: Callable[..., object]) -> Callable[Parameters, Result]:
    """Return a function that calls ``observe`` with its arguments, and then ``function``."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        observe(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class LargestTensor(TorchDispatchMode):
    """Inside the context, :attr:`elements` is the largest number of elements that an operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(x.numel() for x in found if isinstance(x, Tensor))])
        return result
