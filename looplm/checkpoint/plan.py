"""One rank's part of a checkpoint, as Megatron-core plans it: which tensors it writes, and to which files.

Only the plan is Megatron's, and the function that writes one file. Its own processes that write in the background are
not used. They are only asked whether they are alive, so a killed one counts as finished; and with Megatron-core 0.16
each starts more processes and waits forever for one that was killed.
"""

import inspect
import io
import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8

from looplm.megatron import process_groups

STATE = "state"  # folder of Megatron's files

_HAS_STRATEGIES = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
# Megatron-core 0.19 would otherwise ask for nvidia-resiliency-ext.
_OPTIONS = {"async_strategy": "mcore"} if _HAS_STRATEGIES else {}


class PlannedFile(NamedTuple):
    """A file of this rank: Megatron's items with their content."""

    name: str
    objects: list[tuple[Any, io.BytesIO]]
    items: list[Any]
    tensors: Sequence[Any]  # one for each item


class Plan(NamedTuple):
    """This rank's part of a sharded state.

    Args:
        files: Megatron's, in ``state/``.
        metadata: description of all ranks' tensors; None except on rank 0.
        common: content of common.pt, on rank 0 of a version of Megatron-core that has this file.
    """

    files: list[PlannedFile]
    metadata: Any
    common: dict[str, bytes]

    def tensors(self) -> list[Any]:
        """Return every tensor, on the device where it is, or its place."""
        return [tensor for file in self.files for tensor in file.tensors]

    def with_tensors(self, tensors: Sequence[Any]) -> "Plan":
        """Return this plan with other tensors, or places of tensors, in the order of :meth:`tensors`."""
        rest = iter(tensors)
        return self._replace(files=[file._replace(tensors=[next(rest) for _ in file.items]) for file in self.files])


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy for torch_dist, which keeps the plan instead of making a function that carries it out."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> AsyncRequest:
        self.buckets, self.metadata = writer.write_buckets or [], planned[1]
        return AsyncRequest(None, (), [])


def make_plan(state: dict[str, Any], folder: Path, validate: bool) -> Plan:
    """Plan to write a sharded state to ``folder/state``. Collective; nothing is written.

    Args:
        state: from ``sharded_state_dict`` and the like.
        folder: directory in which the files are collected.
        validate: let the ranks compare whether each part of each tensor is written once.
    """
    force_all_tensors_to_non_fp8(state)  # engine.fp8_params
    strategy, place = _PlanOnly("torch_dist", 1), str(folder / STATE)
    with _kept_common_state() as kept:
        options = {"sharded_strategy": strategy, "validate_access_integrity": validate, "async_sharded_save": True}
        dist_checkpointing.save(state, place, **options, **_OPTIONS)
    files = [
        PlannedFile(name, objects, [item for item, _ in tensors], [tensor for _, tensor in tensors])
        for _, name, (objects, tensors) in strategy.buckets
    ]
    return Plan(files, strategy.metadata, kept)


def write_file(folder: Path, file: PlannedFile) -> list[Any]:
    """Write a planned file to ``folder/state``, without fsync; return Megatron's results."""
    outcomes, running = queue.SimpleQueue[Any](), queue.Queue[int]()
    running.put(0)
    content = (file.objects, list(zip(file.items, file.tensors, strict=True)))
    bucket = (str(folder / STATE / file.name), file.name, content)
    writer = _writer(folder)
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    FileSystemWriterAsync.write_preloaded_data(transforms, 0, bucket, outcomes, running, use_fsync=False)
    _, outcome = outcomes.get()
    if isinstance(outcome, Exception):
        raise outcome
    results: list[Any] = outcome
    return results


def write_description(folder: Path, metadata: Any, results: list[list[Any]]) -> list[str]:
    """Write Megatron's description of all ranks' files; return the names of its files."""
    _writer(folder).finish(metadata, results)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder / STATE))
    return [f"{STATE}/.metadata", f"{STATE}/metadata.json"]


def _writer(folder: Path) -> FileSystemWriterAsync:
    return FileSystemWriterAsync(str(folder / STATE))


@contextmanager
def _kept_common_state() -> Iterator[dict[str, bytes]]:
    """Let Megatron-core 0.16 hand over the content of common.pt instead of writing it.

    It writes on rank 0 before the ranks agree on the plan. If the disk is full, the other ranks would wait there.
    """
    files: dict[str, bytes] = {}
    strategy: Any = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:  # since Megatron-core 0.17, that state is planned too
        yield files
        return

    def keep(_: Any, state: Any, __: Any) -> None:
        if process_groups.is_rank_0():
            stream = io.BytesIO()
            torch.save(state, stream)
            files[f"{STATE}/{common.COMMON_STATE_FNAME}"] = stream.getvalue()

    original, strategy.save_common = strategy.save_common, keep
    try:
        yield files
    finally:
        strategy.save_common = original
