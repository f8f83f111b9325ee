"""Measurements of a preflight: what each rank runs on, how fast ranks communicate, how fast they write.

:mod:`pretrain.cluster.findings` judges them.
"""

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import checkpoint
from looplm.files import xxh3_of
from looplm.megatron import device
from pretrain.cluster.job_memory import available_bytes

T = TypeVar("T")

clock = time.time  # replaced by tests, on one rank
_REPEATS = 5
_BLOCK = 1 << 24


@dataclass(frozen=True)
class RankInfo:
    """One rank's description of itself."""

    rank: int
    node: str  # host name
    device: device.Description
    versions: str  # of the software, with the code's revision
    clock: float  # seconds since 1970, read by all ranks right after a barrier
    flops: float  # per second, of a matrix product on its device
    ram_bytes: int  # main memory that its job may still take
    shm_bytes: int  # size of /dev/shm


def describe_ranks() -> list[RankInfo]:
    """Return all ranks' descriptions, on every rank; collective."""
    flops = device.matmul_flops(8192, torch.bfloat16) if device.HAS_CUDA else device.matmul_flops(512)
    versions = ", ".join(f"{package} {number}" for package, number in checkpoint.versions().items())
    revision = checkpoint.git_revision()
    shm = Path("/dev/shm")
    dist.barrier()
    now = clock()
    mine = RankInfo(
        rank=dist.get_rank(),
        node=socket.gethostname(),
        device=device.describe(),
        versions=f"{versions}, this code {revision or 'of unknown revision'}",
        clock=now,
        flops=flops,
        ram_bytes=available_bytes(),
        shm_bytes=shutil.disk_usage(shm).total if shm.is_dir() else 0,
    )
    return gather(mine)


def gather(mine: T) -> list[T]:
    """Return every rank's object, in the order of the ranks; collective."""
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def wrong_sums(groups: ProcessGroupCollection) -> list[str]:
    """Return the groups of the layout in which an all-reduce gave some rank a wrong sum; collective."""
    named = {"tensor": groups.tp, "pipeline": groups.pp, "context": groups.cp, "data": groups.dp}
    named = {"all": dist.group.WORLD, **named}
    right = {}
    for name, group in named.items():
        members = dist.get_process_group_ranks(group)
        values = torch.full((1 << 16,), float(dist.get_rank() + 1), device=device.DEVICE)
        dist.all_reduce(values, group=group)
        right[name] = bool((values == sum(members) + len(members)).all())
    return [name for name in named if not all(found[name] for found in gather(right))]


def bandwidth(num_bytes: int) -> float:
    """Return the bytes per second of an all-reduce over all ranks, counted as in nccl-tests; 0 for a single rank.

    Each of n ranks sends and receives 2 (n - 1) / n of the message, so the figure does not depend on n. Collective.
    """
    ranks = dist.get_world_size()
    values = torch.ones(num_bytes // 4, device=device.DEVICE)
    best = float("inf")
    for _ in range(_REPEATS):
        dist.barrier()
        device.synchronize()
        start = time.perf_counter()
        dist.all_reduce(values)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    slowest = torch.tensor([best], device=device.DEVICE)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return num_bytes * 2 * (ranks - 1) / ranks / float(slowest)


@dataclass(frozen=True)
class WriteSpeed:
    """How fast a checkpoint would be written."""

    fault: str = ""  # why it cannot be written
    writers: int = 0  # ranks that write
    writing: float = 0.0  # bytes per second of all writers together, until everything is on the disk
    hashing: float = 0.0  # bytes per second of one rank; every rank hashes its own files while it writes


def write_speed(folder: Path, groups: ProcessGroupCollection, num_bytes: int) -> WriteSpeed:
    """Let the ranks that would write a checkpoint write ``num_bytes`` each into ``folder``; collective.

    These are the ranks of the first replica, one for each part of the model.
    """
    writes = groups.dp.rank() == 0 and groups.cp.rank() == 0
    path = folder / f".preflight.{dist.get_rank()}"
    fault, hashing = "", 0.0
    dist.barrier()
    start = time.perf_counter()
    try:
        if writes:
            _write(path, num_bytes)
    except OSError as error:
        fault = f"{folder} cannot be written ({error.strerror})"
    faults = gather(fault)  # also waits for the slowest
    seconds = time.perf_counter() - start
    if dist.get_rank() == 0 and not fault:
        start = time.perf_counter()
        xxh3_of(path)
        hashing = num_bytes / (time.perf_counter() - start)
    path.unlink(missing_ok=True)
    writers = sum(gather(writes))
    return WriteSpeed(next(filter(None, faults), ""), writers, writers * num_bytes / seconds, gather(hashing)[0])


def _write(path: Path, num_bytes: int) -> None:
    block = os.urandom(min(num_bytes, _BLOCK))  # random, because a file system that compresses would seem too fast
    with path.open("wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
