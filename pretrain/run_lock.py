"""Exclusive use of a run's output_dir, agreed on by all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from looplm.cli import UserError
from looplm.lock import FolderLock
from looplm.megatron import process_groups


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Let no other run write ``folder`` while the block runs. Collective: rank 0 locks, and every rank raises alike.

    A folder that is still empty at the end is removed.

    Raises:
        UserError: another run holds it.
    """
    lock, refusal = FolderLock(folder, str(folder), print), [""]
    if process_groups.is_rank_0():
        try:
            lock.acquire()
        except UserError as error:
            refusal = [str(error)]
        except OSError as error:
            refusal = [f"output_dir: {folder} cannot be written ({error.strerror}); choose another folder"]
    dist.broadcast_object_list(refusal, src=0)
    if refusal[0]:
        raise UserError(refusal[0])
    try:
        yield
    finally:
        if process_groups.is_rank_0():
            lock.release()
            with suppress(OSError):  # it holds what the run wrote
                folder.rmdir()
