"""Megatron's cached sample indices, checked before they are used.

Megatron writes them in place and loads what it finds. A truncated file would be a ValueError on every rank, a changed
byte another order of the data without a word, and an array of objects a program (``numpy.load(allow_pickle=True)``).
"""

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from looplm.failures import StorageFailure
from looplm.files import sha256_of, storage_failure, write_whole

_SUMS = "checksums.json"
_LOCK = ".lock"


@contextmanager
def checked_cache(folder: Path) -> Iterator[None]:
    """Remove damaged arrays from ``folder`` before the block, which builds what is missing, and record them after it.

    Rank 0 does so. The other ranks may enter at once, because Megatron lets them wait until rank 0 has built.
    """
    if dist.is_initialized() and dist.get_rank() != 0:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK).open("a") as lock:
            _wait_for(lock.fileno(), folder)
            sums = _read_sums(folder / _SUMS)
            for path in _arrays(folder):
                if path.name not in sums or sums[path.name] != sha256_of(path):
                    fault = "its content is not what was written" if path.name in sums else "it has no checksum"
                    print(f"{path}: {fault}; computing it again")
                    path.unlink()
            yield
            known = {path.name: sums.get(path.name) or sha256_of(path) for path in _arrays(folder)}
            if known != sums:
                write_whole(folder / _SUMS, json.dumps(known, indent=2) + "\n")
    except Exception as error:
        if (failure := _failure(error, folder)) is None:
            raise
        raise failure from error


def _arrays(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".npy", ".npz"))


def _read_sums(path: Path) -> dict[str, str]:
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sums if isinstance(sums, dict) else {}


def _wait_for(lock: int, folder: Path) -> None:
    """Take the lock on the folder, unless its file system has none."""
    said = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not said:
                print(f"{folder}: waiting for another run that builds sample indices in it", flush=True)
            said = True
            time.sleep(0.5)
        except OSError:
            return


def _failure(error: BaseException, folder: Path) -> StorageFailure | None:
    """Return the disk's failure behind an error: Megatron's plain Exception, or numpy's OSError without errno."""
    if (failure := storage_failure(error, folder)) is not None:
        return failure
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is None:
            return StorageFailure(f"{folder}: an index was not written whole ({cause}); free space and run again")
        cause = cause.__cause__
    return None
