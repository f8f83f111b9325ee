"""One rank of a job whose other ranks do not exist: torch's ``fake`` backend, and what it cannot do.

| replaced | without it |
|---|---|
| ``dist.new_group`` gives every backend's groups the fake backend, and notes their members | gloo looks for peers |
| ``dist.all_gather_object`` returns this rank's object, for the last rank a given one | it unpickles what nobody sent |
| a large message is not executed | the fake backend copies a rank's part, and so writes to hollow tensors |
| ``Work.wait`` of the fake backend notes the wait | nothing says what a rank waits for |

All of it is undone when the job ends.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork
from torch._ops import OpOverload
from torch.testing._internal.distributed.fake_pg import FakeStore

from looplm.megatron import patches, process_groups
from tools.rehearsal.traffic import Traffic

_MOST_COPIED = 1 << 20  # bytes of a message that is executed: numbers that a host may read


class FakeJob:
    """The messages of a rank in a job without other ranks.

    Args:
        as_gpu: keep what is sent until the rank waits for it, as NCCL does, and not as gloo's messages are kept.
        of_last_rank: objects that the last rank gathers, in order; empty if they are equal to this rank's.

    Attributes:
        groups: members of every group that was made, in order; each rank must make the same ones.
        objects: what the rank gave to be gathered, in order.
    """

    def __init__(self, as_gpu: bool, of_last_rank: Sequence[Any]) -> None:
        self.objects: list[Any] = []
        self._of_last_rank = of_last_rank
        self.groups: list[tuple[int, ...]] = []
        self.traffic: Traffic | None = None
        self._works: dict[int, tuple[dist.Work, int, Any]] = {}
        self._as_gpu = as_gpu
        self._sent: deque[Any] = deque(maxlen=patches.SENDS_KEPT)
        self._wait: Any = FakeWork.wait

    def deliver(self, func: OpOverload, args: Any, kwargs: dict[str, Any], number: int) -> Any:
        """Take the place of a message: small ones are executed by the fake backend, large ones arrive as they were."""
        sizes = [one.nbytes for one in _flat(args) if isinstance(one, torch.Tensor)]
        if sum(sizes) <= _MOST_COPIED:
            out = func(*args, **kwargs)
        else:
            names = [argument.name for argument in func._schema.arguments]
            work = torch.ops.c10d.send([torch.zeros(1)], args[names.index("process_group")], 0, 0)
            out = work if len(func._schema.returns) == 1 else (args[0], work)
        boxed = out[-1] if isinstance(out, tuple) else out
        work = FakeWork.unbox(boxed)
        is_sent = func is torch.ops.c10d.send.default
        if is_sent and not self._as_gpu:
            self._sent.append(args)
        kept = args if is_sent and self._as_gpu else None
        self._works[id(work)] = work, number, kept  # torch hands out the same object as long as it is referred to
        return out

    def wait(self, work: dist.Work, *args: Any) -> Any:
        """Take the place of ``FakeWork.wait``."""
        known = self._works.pop(id(work), None)
        if known is not None and self.traffic is not None:
            self.traffic.wait(known[1])
        return self._wait(work, *args)

    def gather(self, objects: list[Any], own: Any, *_: Any, **__: Any) -> None:
        """Take the place of ``dist.all_gather_object``."""
        number = len(self.objects)
        self.objects.append(copy(own))
        last = self._of_last_rank[number] if number < len(self._of_last_rank) else own
        objects[:] = [own] * (len(objects) - 1) + [last]

    def restart(self) -> None:
        """Forget what is in flight."""
        self._works.clear()


@contextmanager
def fake_job(rank: int, ranks: int, as_gpu: bool = True, of_last_rank: Sequence[Any] = ()) -> Iterator[FakeJob]:
    """Be rank ``rank`` of a job of that many; see :class:`FakeJob`."""
    job = FakeJob(as_gpu, of_last_rank)
    new_group = dist.new_group

    def fake_group(ranks: list[int] | None = None, *args: Any, **keys: Any) -> Any:
        members = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
        job.groups.append(members)
        if dist.get_rank() not in members:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(list(members), group_desc=keys.get("group_desc"), backend="fake")

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        with (
            patch.object(dist, "new_group", fake_group),
            patch.object(dist, "all_gather_object", job.gather),
            patch.object(FakeWork, "wait", lambda work, *args: job.wait(work, *args)),
        ):
            yield job
    finally:
        process_groups.stop()


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)
    else:
        yield value
