"""Files that are whole or absent, and what is in them."""

import hashlib
import os
from pathlib import Path

_BLOCK = 1 << 24  # bytes read at a time


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` aside, fsync it, and move it to ``path``: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    os.replace(aside, path)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
