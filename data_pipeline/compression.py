"""Files opened by what they hold: compressed ones are unpacked, and what is not UTF-8 text is refused.

The first bytes decide, because downloads lose or keep a suffix wrongly. pyarrow cannot read zstd windows above 128 MiB
(``zstd --long=31``), and zstandard's stream reader ends silently at a truncated end, so frames are decoded here.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import zstandard

from looplm.failures import UserError

_HEAD = 512  # bytes that show what a file holds
_INPUT = 1 << 15  # compressed bytes decoded at a time; a few of them may hold many times as much
_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")  # a block, or the end of an empty file, after "BZh" and a digit
_FOREIGN = (
    (b"\xff\xfe\0\0", "UTF-32 text", "convert it to UTF-8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "convert it to UTF-8"),
    (b"\xff\xfe", "UTF-16 text", "convert it to UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it to UTF-8"),
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it"),
    (b"\x04\x22\x4d\x18", "lz4 data", "unpack it"),
    (b"\xff\x06\0\0sNaPpY", "snappy data", "unpack it"),
    (b"\x1f\x9d", "data of Unix compress", "unpack it"),
    (b"PAR1\x15", "a parquet file", "set kind: parquet"),
    (b"ARROW1\0\0", "an Arrow file", "convert it to parquet"),
    (b"%PDF-", "a PDF document", "extract its text"),
    (b"SQLite format 3\0", "an SQLite database", "export it as jsonl"),
)


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if it is compressed; a truncated one raises EOFError when it is read."""
    with path.open("rb") as raw:
        kind, named = _compression(raw.read(_HEAD)), _SUFFIXES.get(path.suffix.lower())
    if kind is None and named is not None:
        raise UserError(f"{path}: its name says {named}, but it holds something else; rename it or write it again")
    return path.open("rb") if kind is None else cast(BinaryIO, io.BufferedReader(_OPENERS[kind](path), 1 << 20))


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise a :class:`UserError` if the first bytes of a file, decompressed, are not those of UTF-8 text."""
    if (kind := _compression(head)) is not None:
        raise UserError(f"{path}: is compressed twice, the second time with {kind}; unpack it")
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            raise UserError(f"{path}: holds {what}, not UTF-8 text; {fix}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: holds a tar archive, not text; unpack it")
    if head.count(0) * 4 > len(head):
        raise UserError(f"{path}: holds UTF-16 or binary data (many zero bytes), not UTF-8 text; convert it to UTF-8")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged or missing file into a :class:`UserError`."""
    try:
        yield
    except EOFError as error:
        raise UserError(f"{path}: is truncated, its compressed data ends early; write the file again") from error
    except (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, truncated or not readable ({reason}); write the file again") from error


def _compression(head: bytes) -> str | None:
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    if head.startswith(b"\x28\xb5\x2f\xfd") or (head[1:4] == b"\x2a\x4d\x18" and 0x50 <= head[0] <= 0x5F):
        return "zstd"  # the second is a frame to skip, with which pzstd and seekable files begin
    if head.startswith(b"BZh") and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return "xz" if head.startswith(b"\xfd7zXZ\0") else None


class _ZstdFrames(io.RawIOBase):
    """Decoder of consecutive zstd frames with windows up to 2 GiB."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._raw = path.open("rb")
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._raw.read(_INPUT)
            if not data:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or self._context.decompressobj()
            self._output, self._input = memoryview(self._frame.decompress(data)), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size

    def close(self) -> None:
        self._raw.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "gzip": gzip.GzipFile,
    "bzip2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _ZstdFrames,
}
