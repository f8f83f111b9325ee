"""Megatron's token files: the index in a .idx, and the loss marks on the ids in a .bin.

Layout of a .idx, little-endian: magic (9 bytes), version (uint64, 1), dtype code (uint8), sequences N (uint64),
document bounds M (uint64), lengths (N x int32, in tokens), pointers (N x int64, in bytes), bounds (M x int64).
Source: megatron/core/datasets/indexed_dataset.py, ``_IndexWriter``.

A .bin of conversations holds int32 ids. An id that bears no loss has the bit :data:`NO_LOSS` set, so the mark travels
with its token through merging, blending and resuming. Needs only struct and numpy, because training imports it.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looplm.failures import UserError

MAX_DOCUMENTS = 2**31 - 1  # of a prefix: Megatron numbers documents in int32, and further ones wrap below 0
NO_LOSS = 1 << 30  # above every id (config.MAX_VOCAB_SIZE), below the sign
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # the two that datatrove writes
_BLOCK = 1 << 24  # tokens read at a time


@dataclass(frozen=True)
class IndexFile:
    """Header of a .idx, and the size in bytes that its .bin must have."""

    path: Path
    dtype: np.dtype
    documents: int
    bin_bytes: int

    @property
    def tokens(self) -> int:
        return self.bin_bytes // self.dtype.itemsize

    def lengths(self) -> np.ndarray:
        """Return the tokens of each document, int32 [documents]."""
        return np.fromfile(self.path, np.int32, self.documents, offset=_HEADER.size)


def read_index(path: Path) -> IndexFile:
    """Read the header and the last entry, in constant time.

    Raises:
        UserError: missing, not an index, truncated, or not one sequence per document.
    """
    fix = "build the data again"
    try:
        with path.open("rb") as stream:
            head, size = stream.read(_HEADER.size), path.stat().st_size
            if len(head) < _HEADER.size:
                raise UserError(f"{path}: {size} bytes are too few for an index; {fix}")
            magic, version, code, count, bounds = _HEADER.unpack(head)
            if magic != _MAGIC or version != 1 or code not in _DTYPES:
                raise UserError(f"{path}: not an index of uint16 or int32 tokens; {fix}")
            if size != _HEADER.size + 12 * count + 8 * bounds:
                raise UserError(f"{path}: truncated ({size} bytes do not fit {count} sequences); {fix}")
            if bounds != count + 1:
                raise UserError(f"{path}: {count} sequences for {bounds - 1} documents; {fix}")
            end = 0
            if count:
                (length,) = np.fromfile(path, np.int32, 1, offset=_HEADER.size + 4 * (count - 1))
                (pointer,) = np.fromfile(path, np.int64, 1, offset=_HEADER.size + 4 * count + 8 * (count - 1))
                if pointer < 0 or length < 0:
                    raise UserError(f"{path}: damaged (a document of {length} tokens at byte {pointer}); {fix}")
                end = int(pointer) + int(length) * _DTYPES[code].itemsize
            return IndexFile(path, _DTYPES[code], count, end)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error


def write_index(path: Path, lengths_N: np.ndarray, dtype: np.dtype) -> None:
    """Write the index of documents with ``lengths_N`` tokens (int32) that lie one after the other in the .bin."""
    code = next(code for code, known in _DTYPES.items() if known == dtype)
    pointers_N = np.zeros(lengths_N.size, np.int64)
    np.cumsum(lengths_N[:-1], out=pointers_N[1:])
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, lengths_N.size, lengths_N.size + 1))
        for part in (lengths_N, pointers_N * dtype.itemsize, np.arange(lengths_N.size + 1, dtype=np.int64)):
            stream.write(part.tobytes())  # tofile's error on a full disk does not say what it is


def read_blocks(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Yield the tokens of a .bin in blocks, so that its size does not matter."""
    with path.open("rb") as stream:
        while (tokens_N := np.fromfile(stream, dtype, _BLOCK)).size:
            yield tokens_N


def mark(ids: Sequence[int], has_loss: Sequence[bool]) -> list[int]:
    """Return ``ids`` with :data:`NO_LOSS` set on those that bear no loss."""
    return [token if counts else token | NO_LOSS for token, counts in zip(ids, has_loss, strict=True)]


def unmark(tokens_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids, and a bool array that is True if an id bears loss: the inverse of :func:`mark`."""
    return tokens_N & (NO_LOSS - 1), tokens_N & NO_LOSS == 0
