"""Roles of a rehearsal, and ranks of a real job, watched by the same recorder; some with a seeded fault."""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

import looplm.model.head as head
from looplm.config import RunConfig
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.run import build_trainer
from tools.rehearsal.memory import Kind, MemoryLedger, MemoryUse
from tools.rehearsal.one_role import RoleReport, mark_parts, rehearse_role, whole_document_batches
from tools.rehearsal.recorder import Recorder
from tools.rehearsal.roles import role_of
from tools.rehearsal.traffic import Message, Traffic

Recorded = tuple[MemoryUse, list[Message]]
kept_forever: list[Tensor] = []
GLOO_SECONDS = 0.02


class PatientLedger(MemoryLedger):
    """A ledger that lets gloo's threads drop their messages before it notes a new peak.

    Such a thread holds the tensors of a message a little longer than whoever waits for it; on a busy machine that is
    long enough for the next tensors to be made beside them.
    """

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.waited_for = traffic, 0
        super().__init__()

    def restart(self) -> None:
        super().restart()
        self.waited_for = 0

    def _move(self, key: int, kind: Kind) -> None:
        _, size, old = self._alive[key]
        if old != kind:
            self._wait_before_a_peak(kind, size)
        super()._move(key, kind)

    def _add(self, kind: Kind, size: int) -> None:
        self._wait_before_a_peak(kind, size, more=size)
        super()._add(kind, size)

    def _wait_before_a_peak(self, kind: Kind, size: int, more: int = 0) -> None:
        is_peak = self.bytes[kind] + size > self._most[kind] or self._total + more > self._peak
        if is_peak and len(self.traffic.messages) > self.waited_for:
            self.waited_for = len(self.traffic.messages)
            time.sleep(GLOO_SECONDS)


def record_real_step(config: RunConfig, micro_batches: int, folder: Path) -> None:
    """Record the second step of a real run as one of its ranks, and write memory and messages."""
    recorder = Recorder()
    recorder.memory = PatientLedger(recorder.traffic)
    with recorder.recording():
        groups = process_groups.start(config.seed, config.parallel)
        trainer = build_trainer(config, groups, None)
        mark_parts(recorder, trainer)
        batches = whole_document_batches(config, micro_batches)
        trainer.train(iter(batches), config.parallel.pipeline)
        mark_parts(recorder, trainer)
        recorder.restart()
        trainer.train(iter(batches), micro_batches)
    recorded: Recorded = recorder.memory.use(), recorder.traffic.messages
    (folder / f"real_{dist.get_rank()}").write_bytes(pickle.dumps(recorded))
    process_groups.stop()


def play_roles(config: RunConfig, ranks: int, micro_batches: int, folder: Path, fault: str, at: int) -> None:
    """Rehearse as many ranks as there are processes; the rank ``at`` has the fault."""
    rank = int(os.environ["RANK"])
    with FAULTS[fault]() if rank == at else no_fault():
        role = role_of(rank, config.parallel, ranks)
        report = rehearse_role(config, ranks, role, micro_batches, as_gpu=False, most_numbers=64)
    (folder / f"role_{rank}").write_bytes(pickle.dumps(report))


def read_roles(folder: Path, ranks: int) -> list[RoleReport]:
    return [pickle.loads((folder / f"role_{rank}").read_bytes()) for rank in range(ranks)]


def read_real(folder: Path, ranks: int) -> list[Recorded]:
    return [pickle.loads((folder / f"real_{rank}").read_bytes()) for rank in range(ranks)]


@contextmanager
def no_fault() -> Iterator[None]:
    yield


def skipped_collective() -> Any:
    """Leave out one of the head's collectives over the tensor-parallel ranks."""
    return patch.object(head, "_largest", lambda logits_NV, group: logits_NV.amax(dim=1).float())


def wrong_members() -> Any:
    """Number the ranks in another order, so that the groups have other members."""
    start = parallel_state.initialize_model_parallel
    return patch.object(parallel_state, "initialize_model_parallel", partial(start, order="tp-cp-ep-pp-dp"))


def wrong_shape() -> Any:
    """Send hidden states that lack a position."""
    send = dist.isend

    def shortened(tensor: Tensor, **keys: Any) -> Any:
        return send(tensor[:-1], **keys)

    return patch.object(dist, "isend", shortened)


def kept_tensor() -> Any:
    """Keep each loop's hidden state forever."""
    run_layers = LoopLM.run_layers

    def keeping(model: LoopLM, *args: Any) -> Tensor:
        hidden_SBD = run_layers(model, *args)
        kept_forever.append(hidden_SBD.detach().clone())
        return hidden_SBD

    return patch.object(LoopLM, "run_layers", keeping)


FAULTS: dict[str, Callable[[], Any]] = {
    "none": no_fault,
    "skipped collective": skipped_collective,
    "wrong members": wrong_members,
    "wrong shape": wrong_shape,
    "kept tensor": kept_tensor,
}
