"""A training step of one role, executed without its job and recorded."""

import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import looplm.model.head as head
from looplm.config import RunConfig
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE
from pretrain.data import Batch
from pretrain.run import build_trainer
from pretrain.trainer import Trainer
from tools.rehearsal.hollow import HollowExecutor
from tools.rehearsal.memory import Kind, MemoryUse
from tools.rehearsal.recorder import Recorder
from tools.rehearsal.roles import Role
from tools.rehearsal.traffic import Message
from tools.rehearsal.world import fake_job


@dataclass(frozen=True, kw_only=True)
class RoleReport:
    """Record of a role's step.

    Args:
        role: the rank and its places.
        memory: bytes alive in the step.
        start_peak: most bytes alive while the model, its optimizer and a first step were made.
        flops: by operator.
        messages: of the step, in the order in which they were issued.
        order: the messages' numbers, and ``~number`` where the rank waits for one.
        groups: members of all process groups that the rank asked for, in order.
        group_kinds: names of the rank's own groups (tensor, context, data, pipeline), by their members.
        seconds: processor time of the rehearsal.
        host_bytes: the most memory that the process took.
    """

    role: Role
    memory: MemoryUse
    start_peak: int
    flops: Counter[str]
    messages: list[Message]
    order: list[int]
    groups: list[tuple[int, ...]]
    group_kinds: dict[tuple[int, ...], str]
    seconds: float
    host_bytes: int


def rehearse_role(
    config: RunConfig, ranks: int, role: Role, micro_batches: int, as_gpu: bool = True, most_numbers: int | None = None
) -> RoleReport:
    """Build the role's part of the model and train two steps, of which the second is recorded.

    The first makes Adam's moments, and Megatron overlaps messages from the second on.

    Args:
        config: of the run; it is not loaded from a checkpoint, and its data are not read.
        ranks: of the whole job.
        role: the one to play.
        micro_batches: of each step.
        as_gpu: take a GPU's chunks of logits, and free pipeline messages that were sent, as Megatron does with NCCL.
        most_numbers: elements of the largest tensor that is computed; None for the default.
    """
    begin = time.process_time()
    executor = HollowExecutor() if most_numbers is None else HollowExecutor(most_numbers)
    # With a frozen trunk, only the last pipeline rank has parameters to train, and tells the others of them.
    asks_last = config.loss.frozen_trunk and config.parallel.pipeline > 1
    of_last_rank = _gathered_from(config, ranks, ranks - 1) if asks_last else []
    with fake_job(role.rank, ranks, as_gpu, of_last_rank) as job, _sizes_of_a_gpu(as_gpu):
        recorder = Recorder(executor, job.deliver)
        with recorder.recording():
            groups = process_groups.start(config.seed, config.parallel)
            trainer = build_trainer(config, groups, None)
            trainer.model.config.deallocate_pipeline_outputs |= as_gpu and config.parallel.pipeline > 1
            mark_parts(recorder, trainer)
            batches = whole_document_batches(config, micro_batches)
            trainer.train(iter(batches), config.parallel.pipeline)
            mark_parts(recorder, trainer)
            start_peak = recorder.memory.use().peak
            recorder.restart()
            job.traffic = recorder.traffic
            job.restart()
            trainer.train(iter(batches), micro_batches)
        names = {"tensor": groups.tp, "context": groups.cp, "pipeline": groups.pp, "data": groups.dp_cp}
        kinds = {tuple(torch.distributed.get_process_group_ranks(group)): name for name, group in names.items()}
    return RoleReport(
        role=role,
        memory=recorder.memory.use(),
        start_peak=start_peak,
        flops=recorder.flops.by_operator,
        messages=recorder.traffic.messages,
        order=recorder.traffic.order,
        groups=job.groups,
        group_kinds=kinds,
        seconds=time.process_time() - begin,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _gathered_from(config: RunConfig, ranks: int, rank: int) -> list[Any]:
    """Return the objects that a rank gives the others while it builds its part."""
    with fake_job(rank, ranks) as job, Recorder(HollowExecutor(), job.deliver).recording():
        build_trainer(config, process_groups.start(config.seed, config.parallel), None)
        return job.objects


@contextmanager
def _sizes_of_a_gpu(wanted: bool) -> Iterator[None]:
    """Have the head compute as many logits at once as on a GPU, and not in blocks that fit a CPU's cache."""
    if not wanted:
        yield
        return
    with patch.dict(head.LOGIT_BYTES, cpu=head.LOGIT_BYTES["cuda"]), patch.object(head, "BLOCK_BYTES", 1 << 60):
        yield


def mark_parts(recorder: Recorder, trainer: Trainer) -> None:
    """Tell the recorder which storages are weights, gradients, and the rest of the optimizer's state."""
    for kind, tensors in parts_of(trainer).items():
        recorder.memory.mark(tensors, kind)


def parts_of(trainer: Trainer) -> dict[Kind, list[Tensor]]:
    """Return the tensors that a trainer holds between two steps; weights that the optimizer updates in place once."""
    weights = [*trainer.model.parameters(), *trainer.model.buffers()]
    adam: list[Tensor] = []
    for one in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        if getattr(one, "optimizer", None) is None:  # a pipeline rank that has nothing to train
            continue
        adam += [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        adam += [x for state in one.optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    storages = {weight.untyped_storage()._cdata for weight in weights}
    return {
        "weights": weights,
        "gradients": [one.main_grad for one in trainer.model.parameters() if one.requires_grad],
        "optimizer": [x for x in adam if x.untyped_storage()._cdata not in storages],
    }


def whole_document_batches(config: RunConfig, count: int) -> list[Batch]:
    """Return micro-batches whose samples are one document each, the most that attention can have to do."""
    data, length = config.data, config.data.seq_length
    sizes_SB = (length, data.micro_batch_size)
    ids_BS = torch.randint(config.model.vocab_size, (data.micro_batch_size, length + 1), device=DEVICE)
    start_SB = torch.zeros(sizes_SB, dtype=torch.int64) if data.document_masking else None
    one = Batch(ids_BS[:, :-1], ids_BS[:, 1:].t().contiguous(), torch.ones(sizes_SB, device=DEVICE), start_SB)
    return [one] * count


def rehearsed_config(config: RunConfig, ranks: int, micro_batches: int) -> RunConfig:
    """Return the run with a batch of ``micro_batches`` on each replica, which does not grow."""
    samples = micro_batches * config.data.micro_batch_size * config.parallel.replicas(ranks)
    return replace(config, data=replace(config.data, global_batch_size=samples, rampup=None))


def enough_micro_batches(config: RunConfig, available: int) -> int:
    """Return the micro-batches of a step after which a longer one repeats itself: the pipeline is full twice."""
    return min(available, 2 * config.parallel.pipeline)
