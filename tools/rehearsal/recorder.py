"""The recorder of a rank: memory, FLOPs and messages of everything that torch executes inside it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from tools.rehearsal.flops import FORMULAS, FlopCounter
from tools.rehearsal.hollow import Executor, execute, inspect
from tools.rehearsal.memory import MemoryLedger
from tools.rehearsal.traffic import Traffic

# Executes a message, and tells whoever waits for it that it is the message of this number.
Messenger = Callable[[OpOverload, Any, dict[str, Any], int], Any]


def send(func: OpOverload, args: Any, kwargs: dict[str, Any], number: int) -> Any:
    """Send a message: the messenger of a real run."""
    return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Records every operation inside the context.

    The same recorder watches real runs and rehearsals; ``run`` and ``message`` execute the operations.
    """

    def __init__(self, run: Executor = execute, message: Messenger = send) -> None:
        super().__init__()
        self.memory, self.flops, self.traffic = MemoryLedger(), FlopCounter(), Traffic()
        self._run, self._message = run, message

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Record operations, and what autograd saves."""
        with self.memory.watching_autograd(), self:
            yield self

    def restart(self) -> None:
        """Forget peaks, FLOPs and messages; what is alive stays."""
        self.memory.restart()
        self.flops.restart()
        self.traffic.restart()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        how = _handling(func)
        if how.is_message:
            return self._message(func, args, kwargs, self.traffic.see(func, args))
        out = self._run(func, args, kwargs)
        if how.allocates:
            if isinstance(out, Tensor):
                self.memory.see(out)
            elif isinstance(out, (tuple, list)):
                for one in out:
                    if isinstance(one, Tensor):
                        self.memory.see(one)
        if how.formula is not None:
            self.flops.see(how.formula, how.name, args, kwargs, out)
        return out


class _Handling(NamedTuple):
    is_message: bool
    allocates: bool
    formula: Callable[..., int] | None
    name: str


@functools.cache
def _handling(func: OpOverload) -> _Handling:
    operation = inspect(func)
    return _Handling(
        is_message=func.namespace == "c10d",
        allocates=not operation.is_view and operation.aliases is None,
        formula=FORMULAS.get(func._overloadpacket),
        name=operation.name,
    )
