"""The property that all fuzz targets share: a right result, or one line that names the file or key."""

import re
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

from looplm.failures import Failure

Result = TypeVar("Result")

LIMIT = 60.0  # seconds for one example, also on a loaded machine; a hang is a fault
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "ctypes.dlopen",
    "socket.connect",
)
_state = {"guarded": False}
count = {"examples": 0}


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _state["guarded"] and event in _FORBIDDEN:
        raise AssertionError(f"input from outside has caused {event}{arguments!r}")


sys.addaudithook(_audit)


@contextmanager
def _guarded() -> Any:
    def too_long(*_: object) -> None:
        raise AssertionError(f"an input that takes more than {LIMIT:.0f} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    _state["guarded"] = True
    try:
        yield
    finally:
        _state["guarded"] = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Result], names: Iterable[object]) -> Result | None:
    """Return the result of ``call``, or None if it was refused in one line that has one of ``names`` in it."""
    count["examples"] += 1
    try:
        with _guarded():
            return call()
    except Failure as failure:
        message = str(failure)
    assert message.strip(), "a failure without a message"
    assert len(message.splitlines()) == 1, f"a message of several lines: {message!r}"
    assert len(message) < 20_000, f"a message of {len(message)} characters"
    assert not re.search(r"[\x00-\x1f\x7f-\x9f]", message), f"control characters: {message!r}"
    assert any(str(name) in message for name in names), f"a message that names neither file nor key: {message!r}"
    message.encode()  # a terminal prints it
    return None
