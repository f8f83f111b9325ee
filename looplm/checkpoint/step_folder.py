"""Folders that are complete or absent: one step of a run, or imported weights.

A folder is written beside its final place, its files are hashed into ``manifest.json``, everything is fsynced, and then
the folder is renamed. A kill at any moment leaves either the old state or the new one. Names that begin with a point
are folders that are not complete, or no longer:

=============================== ===================================================================================
``.step_00000300.x1y2.partial`` being written, or left behind by a killed run
``.step_00000300.replaced``     the old one, while the same step takes its place; the only one after an ill-timed kill
``.step_00000300.deleted``      being deleted
=============================== ===================================================================================
"""

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Collection, Mapping
from glob import escape
from pathlib import Path

from looplm.checkpoint.verify import MANIFEST as MANIFEST
from looplm.checkpoint.verify import Fingerprint
from looplm.checkpoint.verify import find_fault as find_fault
from looplm.failures import StorageFailure, UserError
from looplm.files import fsync, write_whole, writing
from looplm.megatron import process_groups


def of_run(output_dir: str | Path) -> Path:
    """Return the folder that holds the steps of a run."""
    return Path(output_dir) / "checkpoints"


def create_partial(final: Path) -> Path:
    """Create an empty folder for the files of ``final``, until :func:`publish` renames it.

    Its name is new each time: a process of a killed run may still be writing to an older one.
    """
    discard_partial(final)
    partial = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    with writing(final):
        partial.mkdir(parents=True)
    return partial


def discard_partial(final: Path) -> None:
    """Remove the folders of :func:`create_partial` that were not published."""
    own = re.compile(rf"\.{re.escape(final.name)}\.([0-9a-f]{{8}}\.)?partial")  # not those of a longer name
    for partial in final.parent.glob(f".{escape(final.name)}.*partial"):
        if own.fullmatch(partial.name):
            shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, final: Path, files: Mapping[str, Fingerprint]) -> None:
    """Write the manifest of a folder whose files are on the disk, and rename it to ``final``."""
    for name, (size, _) in files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != size:
            raise StorageFailure(
                f"{final}: {name} was written by another rank and is not seen here; output_dir must be on a file "
                "system that all nodes share"
            )
    write_whole(partial / MANIFEST, json.dumps(dict(sorted(files.items())), indent=1))
    _rename(partial, final)


def move_into_place(partial: Path, final: Path) -> None:
    """Flush a complete folder to the disk and rename it to ``final``."""
    for path in files_in(partial):
        fsync(path)
    _rename(partial, final)


def _rename(partial: Path, final: Path) -> None:
    for path in (*(path for path in partial.rglob("*") if path.is_dir()), partial):
        fsync(path)
    replaced = final.parent / f".{final.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if os.path.lexists(final) and step_number(final) < 0:
        raise UserError(f"{final}: exists by now, and did not when this began; it is left alone; give another path")
    if final.exists():  # the same step again, after a fallback to an older one; deleted once the new one is in place
        os.rename(final, replaced)
    os.rename(partial, final)
    fsync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Restore what a killed run had moved aside, and remove what it had not finished. Only for the folder's owner."""
    for replaced in folder.glob(".*.replaced"):
        final = folder / replaced.name.removeprefix(".").removesuffix(".replaced")
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, final)
    for unfinished in (*folder.glob(".*.partial"), *folder.glob(".*.deleted")):
        if unfinished.is_dir() and not unfinished.is_symlink():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink()


def delete_old(folder: Path, keep: int, keep_every: int, whole: Collection[str], healthy: int | None = None) -> None:
    """Delete every step that is older than the ``keep`` newest whole ones and not divisible by ``keep_every``.

    Args:
        folder: holds the steps.
        keep: number of newest ones to keep.
        keep_every: 0 keeps no others.
        whole: names of the steps that this run has written, verified or found by :func:`whole_up_to`. Others may be
            damaged and do not count, and neither does one whose files have disappeared or changed their size since.
        healthy: the newest whole one up to this step stays too, because later ones may hold the start of a loss spike.
    """
    steps = steps_in(folder)
    sound = [step for step in steps if step.name in whole and find_fault(step, deep=False) is None]
    kept = sound[:keep]
    if len(kept) < keep:
        return
    spared = next((step for step in sound if healthy is not None and step_number(step) <= healthy), None)
    for step in steps:
        permanent = step == spared or (keep_every > 0 and step_number(step) % keep_every == 0)
        if step_number(step) < step_number(kept[-1]) and not permanent and not step.is_symlink():
            _delete(step)


def whole_up_to(folder: Path, verified: int, keep: int, healthy: int) -> list[str]:
    """Return the names of the newest whole steps up to ``verified``, as many as :func:`delete_old` needs to know.

    These are ``keep`` of them, and more until one is not after ``healthy``. Only the sizes of their files are compared,
    because to read so many takes minutes. Later ones than ``verified`` are damaged: the run did not resume from them.
    """
    found = list[str]()
    for step in steps_in(folder):
        if step_number(step) <= verified and find_fault(step, deep=False) is None:
            found.append(step.name)
            if len(found) >= keep and step_number(step) <= healthy:
                break
    return found


def _delete(step: Path) -> None:
    deleted = step.with_name(f".{step.name}.deleted")
    os.rename(step, deleted)  # half a deleted step is no step
    shutil.rmtree(deleted, ignore_errors=True)


def note_latest(step: Path) -> None:
    """Write the name of a step to ``latest`` beside it, for people and scripts; this code looks at the folders."""
    write_whole(step.parent / "latest", step.name + "\n")


def delete_after(final: Path) -> None:
    """Delete every later step than ``final``, and point ``latest`` at it."""
    note_latest(final)
    for step in steps_in(final.parent):
        if step_number(step) > step_number(final):
            _delete(step)


def locate(directory: str) -> Path:
    """Return the complete step directory that ``directory`` is or contains. Collective, as :func:`newest` is.

    A newer one that is damaged is named on standard error.

    Raises:
        UserError: there is no checkpoint, or the one named is damaged.
    """
    return process_groups.on_rank_0(lambda: _locate(Path(directory)))


def _locate(path: Path) -> Path:
    if (path / MANIFEST).exists():
        fault = find_fault(path.resolve())  # a link that the user names is the user's
        if fault:
            raise UserError(f"{path}: {fault}; take another step directory")
        return path
    faults: list[str] = []
    found = _newest(of_run(path), faults.append)
    if found is None:
        reason = f" ({'; '.join(faults)})" if faults else ""
        raise UserError(
            f"{path}: no whole checkpoint here{reason}; give a training directory or a step directory of one"
        )
    for fault in faults:
        print(f"note: {fault}", file=sys.stderr)
    return found


def glance(directory: str | Path) -> Path | None:
    """Return the step directory that ``directory`` is, or the newest that it contains, without a look at its files."""
    path = Path(directory)
    steps = [path] if (path / MANIFEST).is_file() else steps_in(of_run(path))
    return next(iter(steps), None)


def newest(folder: Path, say: Callable[[str], None], up_to: int | None = None) -> Path | None:
    """Return the newest undamaged step directory of ``folder``, if any. Damaged ones are reported to ``say``.

    Steps after ``up_to`` are not looked at. Collective if torch.distributed is initialized: every rank gets the answer
    of rank 0.
    """
    return process_groups.on_rank_0(lambda: _newest(folder, say, up_to))


def _newest(folder: Path, say: Callable[[str], None], up_to: int | None = None) -> Path | None:
    for step in steps_in(folder):
        if up_to is not None and step_number(step) > up_to:
            continue
        fault = find_fault(step)
        if fault is None:
            return step
        say(f"{step}: {fault}; falling back to the checkpoint before it")
    return None


def step_name(step: int) -> str:
    """Return the name of a step's directory."""
    return f"step_{step:08d}"


def steps_in(folder: Path) -> list[Path]:
    """Return the step directories of ``folder``, newest first."""
    steps = (path for path in folder.glob("step_*") if step_number(path) >= 0 and path.is_dir())
    return sorted(steps, key=step_number, reverse=True)


def files_in(folder: Path) -> list[Path]:
    """Return every file of a folder except its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def step_number(step: Path) -> int:
    """Return the number of a step's directory; -1 if it has not the name of one."""
    digits = step.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 16 else -1
