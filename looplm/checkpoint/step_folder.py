"""Folders that are complete or absent, and verified before they are trusted: one step of a run, or imported weights.

A folder is written beside its final place, its files are hashed into ``manifest.json``, everything is fsynced, and then
the folder is renamed. A kill at any moment leaves either the old state or the new one. No file is opened before its
size and hash are compared with the manifest, and a pickle may contain only the names that torch and Megatron write.
"""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from looplm.cli import UserError
from looplm.files import fsync, sha256_of, write_whole
from looplm.megatron import process_groups

# Every name that torch and Megatron write into state/.metadata.
_PICKLE_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
    "megatron.core.dist_checkpointing.strategies",
)
_PICKLE_NAMES = {
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


def create_partial(final: Path) -> Path:
    """Create an empty folder for the files of ``final``, until :func:`publish` renames it."""
    partial = discard_partial(final)
    partial.mkdir(parents=True)
    return partial


def discard_partial(final: Path) -> Path:
    """Remove the folder of :func:`create_partial` if it was not published; return its path."""
    partial = final.parent / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def publish(partial: Path, final: Path) -> None:
    """Write the manifest of a folder and :func:`move_into_place`."""
    files = {str(path.relative_to(partial)): fingerprint(path) for path in files_in(partial)}
    write_whole(partial / "manifest.json", json.dumps(files, indent=1))
    move_into_place(partial, final)


def move_into_place(partial: Path, final: Path) -> None:
    """Flush a complete folder to the disk and rename it to ``final``."""
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in (*files_in(partial), *folders, partial):
        fsync(path)
    replaced = final.parent / f".{final.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same step again, after a fallback to an older one; deleted once the new one is in place
        os.rename(final, replaced)
    os.rename(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    fsync(final.parent)


def locate(directory: str) -> Path:
    """Return the complete step directory that ``directory`` is or contains.

    Raises:
        UserError: there is no checkpoint, or the one named is damaged.
    """
    path = Path(directory)
    if (path / "manifest.json").exists():
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path}: {fault}; take another step directory")
        return path
    found = newest(path / "checkpoints", lambda message: None)
    if found is None:
        raise UserError(f"{path}: no whole checkpoint here; give a training directory or a step directory of one")
    return found


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest undamaged step directory of ``folder``, if any. Damaged ones are reported to ``say``.

    Collective if torch.distributed is initialized: every rank gets the answer of rank 0.
    """
    found: list[Path | None] = [None]
    if process_groups.is_rank_0():
        for step in steps_in(folder):
            fault = find_fault(step)
            if fault is None:
                found = [step]
                break
            say(f"{step}: {fault}; falling back to the checkpoint before it")
    if dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def find_fault(step: Path) -> str | None:
    """Describe the damage of a step directory; None if every file has the size and hash of the manifest."""
    try:
        manifest = json.loads((step / "manifest.json").read_text())
        for name, (size, sha256) in manifest.items():
            path = step / name
            if not path.exists():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if fingerprint(path)[1] != sha256:
                return f"{name} has changed since it was written"
        return _unsafe_pickle(step / "state" / ".metadata")
    except (OSError, ValueError) as error:
        return f"manifest.json cannot be read ({error})"


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler for ``state/.metadata`` that refuses unexpected names: a pickle can run any code that it names."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module.startswith(_PICKLE_MODULES) or (module, name) in _PICKLE_NAMES):
            return super().find_class(module, name)
        found = None if module != "torch" else getattr(torch, name, None)
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise UserError(f"names {module}.{name}, which no checkpoint needs")


def _unsafe_pickle(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            _RestrictedUnpickler(file).load()
    except UserError as error:
        return f"{path.name} {error}; it may run code and is not opened"
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def steps_in(folder: Path) -> list[Path]:
    """Return the step directories of ``folder``, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def files_in(folder: Path) -> list[Path]:
    """Return every file of a folder except its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def fingerprint(path: Path) -> tuple[int, str]:
    """Return size and sha256 of a file, as in manifest.json."""
    return path.stat().st_size, sha256_of(path)
