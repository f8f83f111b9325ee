"""Memory that a rank shares with the process that writes its checkpoints.

A thread copies the state there during the next step's forward and backward, which do not change it. A process that is
forked for each checkpoint would need no copy, but then the kernel copies every page that training writes first: 1.2 ms
per MB in the next step, against 0.1 ms for this copy.
"""

import mmap
import os
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.megatron import device

_ALIGNMENT = 64  # bytes


class Slot(NamedTuple):
    """Place of a tensor."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class SharedMemory:
    """Memory of this process and of those that it forks later. It grows to the largest state and is then used again."""

    def __init__(self) -> None:
        self._file = os.fdopen(os.memfd_create("checkpoint"), "rb+", buffering=0)
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def store(self, tensors: Sequence[Tensor], stream: device.Stream | None) -> list[Slot]:
        """Copy tensors of any device into the memory, over what was there.

        Args:
            tensors: they must not change meanwhile.
            stream: from :func:`looplm.megatron.device.stream_from_now`.
        """
        slots, end = list[Slot](), 0
        for tensor in tensors:
            slots.append(Slot(end, tensor.shape, tensor.dtype))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with device.on_stream(stream):
            if end > len(self._buffer):
                device.unpin(self._buffer)
                self._file.truncate(end)
                self._buffer = self._map(end)
                device.pin(self._buffer)
            for slot, tensor in zip(slots, tensors, strict=True):
                _view(self._buffer, slot).copy_(tensor, non_blocking=True)
        return slots

    def load(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Return the tensors that another process has stored, without a copy."""
        size = os.fstat(self._file.fileno()).st_size
        buffer = self._map(size) if size else self._buffer
        return [_view(buffer, slot) for slot in slots]

    def _map(self, size: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(self._file.fileno(), size), dtype=torch.uint8)


def _view(buffer: Tensor, slot: Slot) -> Tensor:
    size = prod(slot.shape) * slot.dtype.itemsize
    return own_storage(buffer[slot.offset : slot.offset + size].view(slot.dtype).view(slot.shape))


def own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory whose storage ends where it does; on a GPU, the tensor itself.

    torch saves the whole storage of a view, so Megatron-core copies views on the CPU before it saves them.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    return torch.from_numpy(tensor.detach().view(torch.uint8).numpy()).view(tensor.dtype)
