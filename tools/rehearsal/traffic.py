"""Messages of a rank, in the order in which they are issued: collectives and point-to-point messages.

Torch passes all of them through its dispatcher as operations of the namespace ``c10d``, whatever the backend, so the
same code records a rehearsal and a real run. What a rank waits for is recorded in a rehearsal only
(:meth:`Traffic.wait`), and decides whether a schedule can deadlock.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import megatron.core
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

SEND, RECEIVE = "send", "recv"
_MEGATRON = os.path.dirname(os.path.dirname(megatron.core.__file__)) + os.sep
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_PATCHES = os.path.join("looplm", "megatron", "patches.py")
_OURS = tuple(_ROOT + package + os.sep for package in ("looplm", "pretrain"))


class Message(NamedTuple):
    """One message as a rank issues it."""

    kind: str  # all_reduce, all_gather, reduce_scatter, broadcast, send, recv, ...
    group: tuple[int, ...]  # global ranks
    sizes: tuple[int, ...]  # bytes of the largest tensors; a coalesced collective has several
    dtype: str
    peer: int | None  # global rank, of a point-to-point message and of a broadcast's source
    site: str  # the line that issues it

    @property
    def bytes(self) -> int:
        """Bytes of the whole message."""
        return sum(self.sizes)

    @property
    def is_point_to_point(self) -> bool:
        """True for a message between two ranks."""
        return self.kind in (SEND, RECEIVE)

    def compared(self) -> tuple[Any, ...]:
        """Return what must be equal on all members of a group."""
        return (self.kind, self.group, self.sizes, self.dtype, self.peer)

    def __str__(self) -> str:
        toward = {SEND: " to", RECEIVE: " from"}.get(self.kind, " root")
        peer = "" if self.peer is None else f"{toward} rank {self.peer}"
        return f"{self.kind} of {self.bytes:,} bytes ({self.dtype}){peer} at {self.site}"


@dataclass
class Traffic:
    """Messages of a rank.

    ``order`` interleaves them with waits: n >= 0 issues message n, and ~n waits for it.
    """

    messages: list[Message] = field(default_factory=list)
    order: list[int] = field(default_factory=list)

    def restart(self) -> None:
        """Forget all messages."""
        self.messages, self.order = [], []

    def see(self, func: OpOverload, args: Any) -> int:
        """Record one message; return its number."""
        self.messages.append(_message_of(func, args))
        self.order.append(len(self.messages) - 1)
        return len(self.messages) - 1

    def wait(self, number: int) -> None:
        """Record that the rank waits for a message."""
        self.order.append(~number)


def _message_of(func: OpOverload, args: Any) -> Message:
    name = func._schema.name.removeprefix("c10d::")
    values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    group = dist.ProcessGroup.unbox(values["process_group"])
    members = tuple(dist.get_process_group_ranks(group))
    peer = next((int(values[key]) for key in ("dst", "src", "root_rank") if key in values), None)
    largest = max((_tensors_of(value) for value in args), key=lambda tensors: sum(x.nbytes for x in tensors))
    return Message(
        kind=_kind(name),
        group=members,
        sizes=tuple(x.nbytes for x in largest),
        dtype="" if not largest else str(largest[0].dtype).removeprefix("torch."),
        peer=None if peer is None else members[peer],
        site=call_site(),
    )


def _kind(name: str) -> str:
    for part, kind in (("allgather", "all_gather"), ("reduce_scatter", "reduce_scatter"), ("allreduce", "all_reduce")):
        if part in name:
            return kind
    return name.rstrip("_")


def _tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in _tensors_of(one)]
    return []


def call_site() -> str:
    """Return the innermost line of Megatron-core or ours, and behind ``<`` the innermost line of ours."""
    inner = ""
    for frame in _frames(sys._getframe(1)):
        path = frame.f_code.co_filename
        is_ours = path.startswith(_OURS) and not path.endswith(_PATCHES)
        if is_ours or path.startswith(_MEGATRON):
            line = _line(path, frame)
            if is_ours:
                return f"{inner} < {line}" if inner else line
            inner = inner or line
    return inner


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line(path: str, frame: FrameType) -> str:
    short = path.removeprefix(_ROOT).rpartition("site-packages" + os.sep)[2]
    return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
