"""Failures that end a command in one line, each with a documented exit status.

====== ================================= ===================================================================
status exception                         what a launcher does
====== ================================= ===================================================================
0                                        nothing: the command has finished
1      any other                         repeat it once: a task of a data build was killed, or there is a bug
2      :class:`UserError`                nothing: a repetition fails the same way
3      :class:`NumericalFailure`         nothing: someone must look at the batch (``python -m tools.replay``)
4      :class:`Hang`                     requeue: a rank, its network or its GPU no longer answered
5      :class:`StorageFailure`           nothing: free or repair the disk first
130    (``pretrain.stopping.ABANDONED``) nothing: a second signal ended a run at once, or Ctrl-C another command
141    ``BrokenPipeError``               nothing: whoever read the output has closed it, as ``head`` does
143    (``pretrain.stopping.STOPPED``)   requeue: a signal ended the run, and its state is saved
====== ================================= ===================================================================
"""

import re
from typing import ClassVar

# A name in a message may come from anyone's file, so nothing that controls a terminal or looks like another message is
# printed.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(message: str) -> str:
    """Return a message with its control characters escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), message)


class Failure(Exception):
    """Base of the failures whose message is one line: the place, what is wrong, the value and the fix.

    Args:
        messages: usually one; each is a line.
    """

    status: ClassVar[int] = 1
    is_shared = False  # True if every rank raises it, so that rank 0 alone prints it

    def __init__(self, *messages: str) -> None:
        super().__init__(*map(printable, messages))

    def __str__(self) -> str:
        return "\nerror: ".join(self.args)


class UserError(Failure):
    """A mistake of the person at the terminal. Every rank finds it; only rank 0 prints it."""

    status = 2
    is_shared = True


class NumericalFailure(Failure):
    """Losses or gradients that are not finite, or keep rising, for longer than the configuration allows."""

    status = 3
    is_shared = True


class Hang(Failure):
    """A step or a start-up that has passed its deadline, or a machine that has failed: a repetition may succeed."""

    status = 4


class StorageFailure(Failure):
    """A disk that is full, read-only, over quota or broken."""

    status = 5
