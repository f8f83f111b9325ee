"""Main memory that a job may still take: that of its node, or less where its cgroups hold it to less.

Slurm gives a job memory of its own unless the job asks for all of the node's (``--mem=0``), and kills it beyond that.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil


class _Version(NamedTuple):
    """Where a version of cgroups keeps its numbers."""

    folder: str
    limit: str
    usage: str
    cache: str  # in memory.stat: cached files that are given up when memory is wanted


_VERSIONS = {
    "": _Version("", "memory.max", "memory.current", "inactive_file"),
    "memory": _Version("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(cgroups: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes that this process and the others of its job may still take together."""
    return min([psutil.virtual_memory().available, *_free(cgroups, root)])


def _free(cgroups: Path, root: Path) -> Iterator[int]:
    """Yield what is left of each limit that holds this process; a folder that cannot be read has none."""
    lines = cgroups.read_text().splitlines() if cgroups.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for version in (_VERSIONS[name] for name in controllers.split(",") if name in _VERSIONS):
            top = root / version.folder
            folder = top / path.lstrip("/")
            for inside in (folder, *folder.parents):
                if inside.is_relative_to(top) and (inside / version.limit).is_file():
                    yield from _left(inside, version)


def _left(folder: Path, version: _Version) -> Iterator[int]:
    limit = (folder / version.limit).read_text().strip()
    if limit != "max":
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / version.usage).read_text()) - int(stat[version.cache])
        yield max(0, int(limit) - used)
