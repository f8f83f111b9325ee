"""A folder that a command makes: whole or not at all, by one process, and never over what is there."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from looplm.bounds import require_absent
from looplm.checkpoint import step_folder
from looplm.failures import UserError
from looplm.lock import FolderLock
from looplm.megatron import process_groups


@contextmanager
def making(output: Path) -> Iterator[None]:
    """Hold the right to make the folder ``output`` while the block runs; what is not whole at its end is removed.

    Raises:
        UserError: it exists, its place cannot be written, another process is making it, or this command has ranks.
    """
    require_absent(output, "output")
    if process_groups.expected_ranks() > 1:
        raise UserError("this command runs in one process; start it without torchrun")
    folder = output.absolute().with_name(f".{output.name}.making")
    try:
        with FolderLock(folder, str(output), print, key="output"):
            try:
                yield
            finally:
                step_folder.discard_partial(output)
    finally:
        with suppress(OSError):  # another process waits for the lock in it
            folder.rmdir()
