"""Exclusive use of a run's output_dir, and a bound on starts that lead nowhere. Both are agreed on by all ranks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from looplm.checkpoint import step_folder
from looplm.failures import Failure, Hang, UserError
from looplm.files import write_whole, writing
from looplm.lock import FolderLock
from looplm.megatron import process_groups

STARTS = ".starts.json"

_counted = set[Path]()  # where starts of this process are counted


@contextmanager
def hold(folder: Path, max_starts: int) -> Iterator[None]:
    """Let no other run write ``folder`` while the block runs. Collective: if a rank raises here, all do.

    A start counts until the run has ended by itself: a crash, a hang and a kill leave it counted. A newer checkpoint
    than at the start before sets the count back. A folder that is empty at the end is removed.

    Args:
        folder: the run's output_dir.
        max_starts: starts in a row without a new checkpoint; 0 is without limit.

    Raises:
        UserError: another run holds the folder, or the starts are used up.
    """
    lock = FolderLock(folder, str(folder), print)
    process_groups.on_rank_0(lambda: _begin(lock, folder, max_starts))
    ended_by_itself = False
    try:
        yield
        ended_by_itself = True
    except Failure as error:
        ended_by_itself = not isinstance(error, Hang)
        raise
    finally:
        if process_groups.is_rank_0():
            if ended_by_itself:
                take_back()
            _counted.clear()
            lock.release()
            with suppress(OSError):  # they hold what the run wrote
                step_folder.of_run(folder).rmdir()
            with suppress(OSError):
                folder.rmdir()


def take_back() -> None:
    """Set back the count of this process's starts, also for an end that skips the rest of :func:`hold`."""
    for path in _counted:
        path.unlink(missing_ok=True)


def _begin(lock: FolderLock, folder: Path, max_starts: int) -> None:
    with writing(folder):
        lock.acquire()
    steps = step_folder.steps_in(step_folder.of_run(folder))
    newest = step_folder.step_number(steps[0]) if steps else 0
    starts = _starts_since(folder / STARTS, newest)
    if 0 < max_starts <= starts:
        lock.release()
        raise UserError(
            f"output_dir: {folder} was started {starts} times without a checkpoint after step {newest}, and crashed, "
            "hung or was killed each time; find the cause in its log, then add --health.max_starts 0 once"
        )
    _counted.add(folder / STARTS)
    write_whole(folder / STARTS, json.dumps({"step": newest, "starts": starts + 1}) + "\n")


def _starts_since(path: Path, newest: int) -> int:
    """Return how many starts are counted since the newest checkpoint; 0 if there is a newer one or no count."""
    try:
        counted = json.loads(path.read_text(encoding="utf-8"))
        return int(counted["starts"]) if counted["step"] >= newest else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
