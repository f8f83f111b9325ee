"""Small disks in memory, which fill up or become read-only. Only root may mount them: on GitHub, sudo does."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def run_as_root(*command: str) -> None:
    """Run a command as root, which this process may be or become without a password.

    Raises:
        subprocess.CalledProcessError: it failed, or nobody may.
    """
    sudo = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []
    subprocess.run([*sudo, *command], check=True, capture_output=True, text=True)


@contextmanager
def small_disk(folder: Path, options: str = "size=4m") -> Iterator[Path]:
    """Mount a disk at a new folder. The test is skipped where that is not allowed, except on GitHub, where it is."""
    folder.mkdir()
    try:
        run_as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    except subprocess.CalledProcessError as error:
        if "GITHUB_ACTIONS" in os.environ:
            raise
        pytest.skip(f"no permission to mount a tmpfs: {error.stderr.strip()}")
    yield folder
    run_as_root("umount", "--lazy", str(folder))  # tracebacks still hold its files


def fill(folder: Path, room: int) -> Path:
    """Fill the disk but for ``room`` bytes; return the file that does, which may be there already."""
    path = folder / "filler"
    with path.open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            file.truncate(file.tell() - room)
    return path
