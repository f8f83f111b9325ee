"""Process groups. Only this module uses Megatron's global state; others receive a ``ProcessGroupCollection``."""

import gc
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as megatron_random

from looplm.config import ParallelConfig
from looplm.failures import Failure, Hang
from looplm.files import raise_file_limit
from looplm.megatron import device, patches

TIMEOUT = timedelta(minutes=30)
_OTHER_FILES = 300  # small groups, libraries, devices, NCCL's connections, logs, data

Result = TypeVar("Result")


def start(seed: int, layout: ParallelConfig | None = None, timeout: timedelta = TIMEOUT) -> ProcessGroupCollection:
    """Join the job that torchrun started, or start a job of one process; seed every random number generator.

    Args:
        seed: seed of weights and sampling; the same on every rank.
        layout: the parallel layout; None makes every rank a replica.
        timeout: how long a rank waits for the others, when it joins and in a collective.

    Raises:
        UserError: the layout does not fit the number of ranks.
    """
    layout = layout or ParallelConfig()
    patches.install()
    raise_file_limit()
    if not dist.is_initialized():
        if "RANK" in os.environ:
            device.bind_local_rank(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group(device.BACKEND, timeout=timeout)
        else:  # without a port, so that two runs on a laptop never collide
            dist.init_process_group(device.BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    layout.replicas(dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            context_parallel_size=layout.context,
            distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
        )
    torch.manual_seed(seed)
    megatron_random.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ProcessGroupCollection.use_mpu_process_groups()


def files_needed(ranks: int, layout: ParallelConfig) -> int:
    """Return the number of files that a rank has open at most.

    A group of W ranks opens W + 3 on a rank, because each has a gloo half: those of some 90 ranks exceed 1,024.
    Of Megatron's groups, two have all ranks, two those of a pipeline rank, and six those that also share their part of
    the matrices. The others are small.
    """
    parts = 2 + 2 / layout.pipeline + 6 / (layout.pipeline * layout.tensor)
    return round(parts * ranks) + _OTHER_FILES


def expected_ranks() -> int:
    """Return the number of ranks that torchrun announces; 1 without it. No other rank is asked."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def lost_peer(error: RuntimeError) -> Hang | None:
    """Return the failure of a connection to another rank that caused ``error``; None if something else did."""
    if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
        return None
    reason = re.sub(r"^\[\S*\] ", "", str(error)).partition("\n")[0].partition(". ")[0]
    return Hang(f"lost the connection to another rank ({reason}), whose own last lines say why; the run can be resumed")


@contextmanager
def seeded(part: str) -> Iterator[None]:
    """Make random numbers depend only on the job's seed and ``part``, so that weights do not depend on the layout.

    This applies to the CPU's generator. Modules that draw on a GPU take a tensor-parallel rank's own generator, or that
    which all of them share if each holds the whole weight. Both are seeded here too: the numbers of the former differ
    between tensor-parallel layouts, but no two parts of a model are alike.
    """
    seed = (torch.initial_seed() + zlib.crc32(part.encode())) % 2**63
    tracker = megatron_random.get_cuda_rng_tracker()
    states = tracker.get_states()
    own = {
        megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME: 1 + parallel_state.get_tensor_model_parallel_rank(),
        megatron_random._DATA_PARALLEL_RNG_TRACKER_NAME: -1,
    }
    made = {name: device.rng_state_of((seed + number) % 2**63) for name, number in own.items() if name in states}
    tracker.set_states({**states, **made})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        tracker.set_states(states)


def reset() -> None:
    """Destroy the groups but stay in the job, so that another layout can be started. Call it on every rank.

    Megatron drops its groups without closing them. Each gloo group has threads that wake up all the time while anything
    refers to it. Models and optimizers do, in reference cycles that only the garbage collector finds.
    """
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()


def stop() -> None:
    """Leave the job."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_0(action: Callable[[], Result]) -> Result:
    """Return the result of ``action`` on rank 0, or raise its failure, on every rank. Collective."""
    outcome: list[Any] = [None, None]
    if is_rank_0():
        try:
            outcome[0] = action()
        except Failure as error:
            error.is_shared = True
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome
    if failure is not None:
        raise failure
    return cast(Result, result)


def share_failure(failure: Failure | None) -> None:
    """Raise the first failure of any rank on every rank. Collective."""
    flag = torch.tensor([float(failure is not None)], device=device.DEVICE)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag.item() == 0.0:
        return
    failures: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next(filter(None, failures))
    first.is_shared = True
    raise first


def is_rank_0() -> bool:
    """Return True on rank 0, or outside of a job."""
    return not dist.is_initialized() or dist.get_rank() == 0
