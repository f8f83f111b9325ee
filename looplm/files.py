"""Files that are either complete or absent, their checksums, and one line for a disk that cannot be written."""

import errno
import hashlib
import os
import resource
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import xxhash

from looplm.failures import StorageFailure, printable

_BLOCK_BYTES = 1 << 18  # stays in the cache between the disk and the hash
_LONGEST_NAME = 255  # bytes
_DENIED = (errno.EACCES, errno.EPERM)
_DISK_FAULTS = {  # errno → what is wrong, what to do
    errno.ENOSPC: ("the disk is full", "free space or choose another disk, then repeat the command"),
    errno.EDQUOT: ("the disk quota is used up", "free space or ask for more, then repeat the command"),
    errno.EROFS: ("the disk is read-only", "have it mounted for writing, or choose another disk"),
    **dict.fromkeys(_DENIED, ("may not be written", "change its permissions, or choose another folder")),
    errno.EIO: ("the disk reports an error", "have it checked, or choose another disk"),
    errno.ESTALE: ("the network disk was unmounted or restarted", "mount it again, then repeat the command"),
}


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file, fsync it and rename it to ``path``, so that no reader sees a part of it.

    Raises:
        StorageFailure: the disk is full or cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            fsync(partial)
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def is_unicode(text: str) -> bool:
    """Return False if a text from outside holds bytes that are not UTF-8, which Python keeps as half surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def is_file_name(name: object) -> bool:
    """Return True for the name of a file or folder: no path, no control characters, and not too long for a disk."""
    is_text = isinstance(name, str) and name not in ("", ".", "..") and "/" not in name and printable(name) == name
    return is_text and len(str(name).encode()) <= _LONGEST_NAME


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a disk into a :class:`StorageFailure` that names ``path`` and the free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        failure = storage_failure(error, path)
        if failure is None:
            raise
        raise failure from error


def storage_failure(error: BaseException, path: Path | None = None) -> StorageFailure | None:
    """Return the failure of a disk that caused ``error``; None if something else did.

    Without the ``path`` that was to be written, a denied permission may be one to read, and is not the disk's.
    torch raises a RuntimeError ("unexpected pos") over the error of a full disk, so the causes are searched too.
    """
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "errno", None) not in _DISK_FAULTS:
        cause = cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError) or (path is None and cause.errno in _DENIED):
        return None
    if path is None and cause.filename is not None:
        path = Path(os.fsdecode(cause.filename))
    fault, fix = _DISK_FAULTS[cause.errno or 0]
    free = "" if path is None else f" ({free_bytes(path) / 1e6:,.1f} MB free)"
    return StorageFailure(f"{path or 'output'}: {fault}{free}; {fix}")


def free_bytes(path: Path) -> int:
    """Return the free bytes of the disk that ``path`` is or will be on; 0 if it cannot be asked."""
    with suppress(OSError):
        return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free
    return 0


def raise_file_limit() -> int:
    """Raise the number of files that this process may have open as far as the system allows, and return it.

    Login shells often have 1,024, and Slurm passes that on to its jobs.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(ValueError, OSError):  # containers may refuse even that
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def fsync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


def sha256_of(path: Path) -> str:
    """Return the hex digest of a file's content, by which it is known everywhere."""
    return _digest(path, hashlib.sha256())


def xxh3_of(path: Path) -> str:
    """Return the hex digest (128 bits) that tells whether a file has changed, at ten times the speed of sha256.

    It is no proof against someone who makes another file of the same digest.
    """
    return _digest(path, xxhash.xxh3_128())


def _digest(path: Path, content: _Hash) -> str:
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            content.update(buffer[:size])
    return content.hexdigest()
