"""A folder that is whole or absent, and is checked before it is trusted: one step of a run, or weights from elsewhere.

It is written aside, its files are hashed into ``manifest.json``, everything is fsynced, and it is renamed. A kill at any
moment leaves either the old state or the new one. Nothing in it is opened before its size and hash were compared, and
of a pickle only what torch itself writes is read.
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

# All that torch and Megatron name in .metadata.
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
    """An empty folder to write ``final`` into, until :func:`publish` renames it."""
    discard_partial(final)
    partial = _partial(final)
    partial.mkdir(parents=True)
    return partial


def discard_partial(final: Path) -> None:
    """Remove what was written aside for ``final`` and not published."""
    shutil.rmtree(_partial(final), ignore_errors=True)


def _partial(final: Path) -> Path:
    return final.parent / f".{final.name}.partial"


def publish(partial: Path, final: Path) -> None:
    """Write the manifest of what :func:`create_partial` gave, and :func:`move_into_place` it."""
    files = {str(path.relative_to(partial)): fingerprint(path) for path in files_in(partial)}
    write_whole(partial / "manifest.json", json.dumps(files, indent=1))
    move_into_place(partial, final)


def move_into_place(partial: Path, final: Path) -> None:
    """Wait for the disk, and rename a whole folder to where it belongs."""
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for path in (*files_in(partial), *folders, partial):
        fsync(path)
    replaced = final.parent / f".{final.name}.replaced"
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():  # the same step again, after falling back from it: gone only once the new one is there
        os.rename(final, replaced)
    os.rename(partial, final)
    shutil.rmtree(replaced, ignore_errors=True)
    fsync(final.parent)


def locate(directory: str) -> Path:
    """The whole checkpoint that ``directory`` is or holds.

    Raises:
        UserError: there is none, or it is damaged.
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
    """The newest checkpoint of ``folder`` that is whole; broken ones are named through ``say`` and passed over."""
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
    """What is wrong with a step directory, in words; None if every file has the size and hash it was written with."""
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


class _NoCode(pickle.Unpickler):
    """Reads what torch writes into ``.metadata`` and refuses every other name: a pickle can run any code it names."""

    def find_class(self, module: str, name: str) -> Any:
        if "." not in name and (module.startswith(_PICKLE_MODULES) or (module, name) in _PICKLE_NAMES):
            return super().find_class(module, name)
        found = None if module != "torch" else getattr(torch, name, None)
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise UserError(f"names {module}.{name}, which a checkpoint has no need of")


def _unsafe_pickle(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            _NoCode(file).load()
    except UserError as error:
        return f"{path.name} {error}; it may run code and is not opened"
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return None


def steps_in(folder: Path) -> list[Path]:
    """Step directories, newest first."""
    return sorted((path for path in folder.glob("step_*") if path.is_dir()), reverse=True)


def files_in(folder: Path) -> list[Path]:
    """Every file of a folder but its manifest."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")


def fingerprint(path: Path) -> tuple[int, str]:
    """Size and hash, as manifest.json holds them."""
    return path.stat().st_size, sha256_of(path)
