"""The .idx half of Megatron's indexed data set, read with nothing but struct and numpy.

Layout, little-endian: magic (9 bytes), version (uint64, 1), dtype code (uint8), sequences N (uint64), document bounds M
(uint64), lengths (N x int32, in tokens), pointers (N x int64, in bytes), bounds (M x int64).
Source: megatron/core/datasets/indexed_dataset.py, ``_IndexWriter``.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from looplm.cli import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # the two that datatrove writes


@dataclass(frozen=True)
class IndexFile:
    """What an .idx says of its .bin: the header, and where the last sequence ends."""

    path: Path
    dtype: np.dtype
    documents: int
    bin_bytes: int

    @property
    def tokens(self) -> int:
        return self.bin_bytes // self.dtype.itemsize

    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents]."""
        return np.fromfile(self.path, np.int32, self.documents, offset=_HEADER.size)


def read_index(path: Path) -> IndexFile:
    """Read the header and the last entry: constant time, whatever the size.

    Raises:
        UserError: missing, not an index, truncated, or not one sequence per document.
    """
    try:
        with path.open("rb") as stream:
            head, size = stream.read(_HEADER.size), path.stat().st_size
            if len(head) < _HEADER.size:
                raise UserError(f"{path}: {size} bytes are too few for an index; build the data again")
            magic, version, code, count, bounds = _HEADER.unpack(head)
            if magic != _MAGIC or version != 1 or code not in _DTYPES:
                raise UserError(f"{path}: not an index of uint16 or int32 tokens; build the data again")
            if size != _HEADER.size + 12 * count + 8 * bounds:
                raise UserError(
                    f"{path}: {size} bytes do not fit its {count} sequences; truncated: build the data again"
                )
            if bounds != count + 1:
                raise UserError(f"{path}: {count} sequences for {bounds - 1} documents; build the data again")
            end = 0
            if count:
                stream.seek(_HEADER.size + 4 * (count - 1))
                (length,) = struct.unpack("<i", stream.read(4))
                stream.seek(_HEADER.size + 4 * count + 8 * (count - 1))
                end = struct.unpack("<q", stream.read(8))[0] + length * _DTYPES[code].itemsize
            return IndexFile(path, _DTYPES[code], count, end)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); build the data again") from error
