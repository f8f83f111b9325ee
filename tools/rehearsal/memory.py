"""Bytes alive by kind, from storages as operations return them and as the last reference to them goes."""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["weights", "gradients", "optimizer", "activations", "buffers"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Bytes by kind.

    ``activations`` are storages that autograd saved, until they are freed; ``buffers`` are all others: results on their
    way to the next operation, gradients on their way back, messages.
    """

    at_peak: dict[Kind, int] = field(default_factory=dict)  # when most bytes were alive
    most: dict[Kind, int] = field(default_factory=dict)  # of each kind, at different times
    kept: dict[int, int] = field(default_factory=dict)  # storages more at the end than at the start, by their bytes

    @property
    def peak(self) -> int:
        """The most bytes that were alive at once."""
        return sum(self.at_peak.values())


class _Reference(weakref.ref):
    """A reference to a storage, with its key in the ledger."""

    __slots__ = ("key",)
    key: int


class MemoryLedger:
    """All storages alive, with their kinds. A storage counts once, no matter how many tensors are views of it."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[_Reference, int, Kind]] = {}
        self.bytes: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._total = 0
        self.restart()

    def restart(self) -> None:
        """Forget the peaks; what is alive stays."""
        self._peak, self._sizes = self._total, self._count_sizes()
        self._at_peak, self._most = dict(self.bytes), dict(self.bytes)

    def see(self, tensor: Tensor, kind: Kind = "buffers") -> None:
        """Count the tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        reference = _Reference(storage, self._free)
        reference.key = key
        self._alive[key] = reference, size, kind
        self._add(kind, size)

    def mark(self, tensors: Iterable[Tensor], kind: Kind) -> None:
        """Give the tensors' storages a kind that does not change later."""
        for tensor in tensors:
            self.see(tensor)
            self._move(tensor.untyped_storage()._cdata, kind)

    def save(self, tensor: Tensor) -> Tensor:
        """Note that autograd saves the tensor; return what it shall keep."""
        key = tensor.untyped_storage()._cdata
        entry = self._alive.get(key)
        if entry is not None and entry[2] == "buffers":
            self._move(key, "activations")
        return tensor.detach()  # an operation's own output would refer to its graph

    @contextmanager
    def watching_autograd(self) -> Iterator[None]:
        """Tell activations from buffers inside the context."""
        with torch.autograd.graph.saved_tensors_hooks(self.save, lambda saved: saved):
            yield

    def use(self) -> MemoryUse:
        """Return the bytes and their peaks since :meth:`restart`."""
        kept = dict(self._count_sizes() - self._sizes)
        return MemoryUse(at_peak=dict(self._at_peak), most=dict(self._most), kept=kept)

    def _count_sizes(self) -> Counter[int]:
        return Counter(size for _, size, _ in self._alive.values())

    def _move(self, key: int, kind: Kind) -> None:
        reference, size, old = self._alive[key]
        if old != kind:
            self._alive[key] = reference, size, kind
            self.bytes[old] -= size
            self.bytes[kind] += size
            self._most[kind] = max(self._most[kind], self.bytes[kind])
            if self._total == self._peak:  # autograd saves a result just after it was made
                self._at_peak = dict(self.bytes)

    def _add(self, kind: Kind, size: int) -> None:
        self.bytes[kind] += size
        self._most[kind] = max(self._most[kind], self.bytes[kind])
        self._total += size
        if self._total > self._peak:
            self._peak, self._at_peak = self._total, dict(self.bytes)

    def _free(self, reference: "_Reference") -> None:
        _, size, kind = self._alive.pop(reference.key)
        self.bytes[kind] -= size
        self._total -= size
