"""Functions that report their calls, for tests that watch the product work."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def observed(function: Callable[Parameters, Result], observe: Callable[..., object]) -> Callable[Parameters, Result]:
    """Return a function that calls ``observe`` with its arguments, and then ``function``."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        observe(*args, **kwargs)
        return function(*args, **kwargs)

    return call
