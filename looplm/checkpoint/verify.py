"""Verification of a step directory before anything in it is trusted.

No file is opened before its size and hash are compared with ``manifest.json``, and none that the manifest does not
list. A pickle may contain only the names that torch and Megatron-core write: it can run any code that it names.
"""

import json
import pickle
import stat
from pathlib import Path
from typing import Any

import torch

from looplm.failures import printable
from looplm.files import is_file_name, sha256_of, xxh3_of

MANIFEST = "manifest.json"
Fingerprint = tuple[int, str]  # size and xxh3

_LARGEST_MANIFEST = 1 << 26  # bytes; a run on 4,096 ranks has one of 2 MB
_HASHES = {32: xxh3_of, 64: sha256_of}  # by the digits of a digest; sha256 until November 2026
# Files that a reader opens by name, and folders of which it opens every file.
_REQUIRED = ("about.json", "config.yaml", "tokenizer.json", "state/.metadata", "state/metadata.json")
_CLOSED_FOLDERS = ("state", "companions")
_BACKENDS = {"sharded_backend": "torch_dist", "common_backend": "torch"}

# Every name that torch and Megatron-core 0.14 to 0.19 write into state/.metadata.
_CHECKPOINT = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_PICKLE_NAMES = {
    *((f"{_CHECKPOINT}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_CHECKPOINT}.metadata", f"{kind}StorageMetadata") for kind in ("Tensor", "Bytes", "Chunk")),
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType")),
    *((f"{_CHECKPOINT}.planner", name) for name in ("TensorWriteData", "BytesIOWriteData")),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    (_MEGATRON, "MCoreMetadata"),
    (_MEGATRON, "MCoreSavePlan"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


class Damage(Exception):
    """A fault of a step directory, in words that follow its name."""


def find_fault(step: Path, deep: bool = True) -> str | None:
    """Describe the damage of a step directory; None if it is exactly what its manifest says and safe to read.

    Args:
        step: the directory.
        deep: read the files to compare their hashes, and look into those that could do harm. Otherwise only their
            sizes are compared.
    """
    try:
        if step.is_symlink():
            raise Damage("a link to another folder; copy that folder here, or name it itself")
        manifest = _read_manifest(step / MANIFEST)
        for name, (size, digest) in manifest.items():
            path = step / name
            found = _regular_file(step, name)
            if found is None:
                raise Damage(f"{name} is missing")
            if found.st_size != size:
                raise Damage(f"{name} has {found.st_size} bytes instead of {size}")
            if deep and _HASHES[len(digest)](path) != digest:
                raise Damage(f"{name} has changed since it was written")
        _refuse_others(step, manifest)
        if deep:
            _check_metadata(step, manifest)
            _check_backend(step / "state" / "metadata.json")
            _check_common(step / "state" / "common.pt")
    except Damage as damage:
        return printable(str(damage))
    except OSError as error:
        return f"{error.filename or MANIFEST} cannot be read ({error.strerror})"
    return None


def fingerprint(path: Path) -> Fingerprint:
    """Return size and hash of a file, as in manifest.json."""
    return path.stat().st_size, xxh3_of(path)


def _read_manifest(path: Path) -> dict[str, Fingerprint]:
    """Return the fingerprints by name, each name a plain path inside the folder."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise Damage(f"{MANIFEST} is not a file")
        if path.stat().st_size > _LARGEST_MANIFEST:
            raise Damage(f"{MANIFEST} has {path.stat().st_size} bytes, more than any manifest")
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damage(f"{MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or not manifest:
        raise Damage(f"{MANIFEST} lists no files")
    for name, value in manifest.items():
        if not all(map(is_file_name, name.split("/"))):
            raise Damage(f"{MANIFEST} names {name!r}, which is not inside this folder")
        if not isinstance(value, list) or [type(item) for item in value] != [int, str] or len(value[1]) not in _HASHES:
            raise Damage(f"{MANIFEST} has no size and hash of {name!r}")
    missing = [name for name in _REQUIRED if name not in manifest]
    if missing:
        raise Damage(f"{missing[0]} is not in {MANIFEST}")
    return {name: (size, digest) for name, (size, digest) in manifest.items()}


def _regular_file(step: Path, name: str) -> Any:
    """Return the status of a file inside the folder, None if it is absent; raise if a part of its path is a link."""
    path = step
    for part in name.split("/"):
        path = path / part
        try:
            found = path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Damage(f"{name} cannot be read ({error.strerror})") from error
        if stat.S_ISLNK(found.st_mode):
            raise Damage(f"{path.relative_to(step)} is a link; a checkpoint holds its own files")
    if not stat.S_ISREG(found.st_mode):
        raise Damage(f"{name} is not a file")
    return found


def _refuse_others(step: Path, manifest: dict[str, Fingerprint]) -> None:
    """Raise if a folder whose files are opened by listing has a file that the manifest does not."""
    for folder in _CLOSED_FOLDERS:
        for path in (step / folder).rglob("*"):
            name = path.relative_to(step).as_posix()
            if name not in manifest and (path.is_symlink() or not path.is_dir()):
                raise Damage(f"{name} is not in {MANIFEST}; remove it")


class _RestrictedUnpickler(pickle.Unpickler):
    """Unpickler for ``state/.metadata`` that refuses every name but the expected ones."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PICKLE_NAMES:
            return super().find_class(module, name)
        found = None if module != "torch" else getattr(torch, name, None)
        if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
            return found
        raise Damage(f"names {module}.{name}, which no checkpoint needs")


def _check_metadata(step: Path, manifest: dict[str, Fingerprint]) -> None:
    """Raise if ``.metadata`` may run code, or points to files that have not been verified."""
    name = "state/.metadata"
    try:
        with (step / name).open("rb") as file:
            metadata = _RestrictedUnpickler(file).load()
        files = {info.relative_path for info in metadata.storage_data.values()}
        wrong = sorted(str(file) for file in files if not isinstance(file, str) or f"state/{file}" not in manifest)
    except Damage as damage:
        raise Damage(f"{name} {damage}; it may run code and is not opened") from None
    except Exception as error:  # a damaged pickle raises any kind
        raise Damage(f"{name} cannot be read ({type(error).__name__}: {error})") from error
    if wrong:
        raise Damage(f"{name} points to {wrong[0]!r}, which is not in {MANIFEST}")


def _check_backend(path: Path) -> None:
    """Raise if the format is another than ours: Megatron-core would look for code that reads it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = [key for key, value in _BACKENDS.items() if found.get(key, value) != value]
    except (ValueError, RecursionError, AttributeError) as error:
        raise Damage(f"state/{path.name} cannot be read ({error})") from error
    if wrong:
        raise Damage(f"state/{path.name} asks for {wrong[0]}={found[wrong[0]]!r}, not {_BACKENDS[wrong[0]]!r}")


def _check_common(path: Path) -> None:
    """Raise if common.pt, which Megatron-core 0.16 writes, is not plain data."""
    try:
        if path.exists():
            torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises any kind
        reason = str(error).strip().partition("\n")[0]
        raise Damage(f"state/{path.name} is not plain data and is not opened ({reason})") from error
