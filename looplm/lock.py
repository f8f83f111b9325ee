"""A lock on an output folder, so that a second command that would write there is refused and told who is first.

The lock is a POSIX record lock (``fcntl.lockf``) on the file ``.lock``. The kernel drops it with its process, even
after kill -9, and forked children do not keep it. NFS, Lustre and GPFS share it between hosts, unless they are mounted
with locks for one host only. Therefore the holder also touches the file every few seconds.
"""

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from looplm.failures import UserError
from looplm.files import writing

FILE = ".lock"
BEAT = 5.0  # seconds between two signs of life
PATIENCE = 20.0  # seconds without one after which a holder on another host counts as dead; NFS shows them late
LOST = 2  # exit status of a process whose lock another host has taken over

_held = set[Path]()  # a POSIX lock does not exclude its own process


class FolderLock:
    """Exclusive right to write a folder, held from :meth:`acquire` to :meth:`release` or to the end of the process.

    Args:
        folder: created if it does not exist.
        name: of the folder for error messages.
        say: prints a line.
        wait: seconds to wait for a holder that needs the folder for a moment only.
        key: the configuration key that names the folder, for error messages.
    """

    def __init__(
        self, folder: Path, name: str, say: Callable[[str], None], wait: float = 0.0, key: str = "output_dir"
    ) -> None:
        self._path, self._name, self._say, self._wait = folder.absolute() / FILE, name, say, wait
        self._key = key
        self._descriptor = -1
        self._ended = threading.Event()
        self._me = json.dumps(_describe_process())

    def __enter__(self) -> "FolderLock":
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another process holds it; the message names it.
            StorageFailure: the folder cannot be made.
        """
        with writing(self._path.parent):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + self._wait
        while True:
            try:
                return self._acquire()
            except UserError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.1)

    def _acquire(self) -> None:
        if self._path in _held:
            raise self._refusal(_describe_process())
        descriptor, is_locked = self._open()
        try:
            before = _read(descriptor)
            if before is not None:
                self._take_over(before, is_locked)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._me.encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self._path)
        threading.Thread(target=self._beat, daemon=True, name="lock").start()

    def release(self) -> None:
        """Remove the lock. Nothing happens if it is not held."""
        if self._descriptor < 0:
            return
        self._ended.set()
        if _is_at(self._descriptor, self._path):
            self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1
        _held.discard(self._path)

    def _open(self) -> tuple[int, bool]:
        """Return a descriptor of the file, and True if it is locked; False on a file system without locks."""
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                holder = _read(descriptor)
                os.close(descriptor)
                raise self._refusal(holder) from None
            except OSError:
                return descriptor, False
            if _is_at(descriptor, self._path):
                return descriptor, True
            os.close(descriptor)  # the holder removed the file between our open and our lock

    def _take_over(self, holder: dict[str, Any], is_locked: bool) -> None:
        """Return if the holder is dead, or raise."""
        me, who = _describe_process(), _name_of(holder)
        if holder.get("boot") == me["boot"]:  # the same kernel, whose lock tells the truth
            if not is_locked and holder.get("started") == _start_time(holder.get("pid", 0)) != "":
                raise self._refusal(holder)
        elif not me["job"] or holder.get("job") != me["job"]:  # Slurm requeues a job only after it has ended
            self._say(f"{self._name}: locked by {who}; waiting {PATIENCE:.0f} s for a sign of life")
            if self._is_touched(PATIENCE):
                raise self._refusal(holder)
        self._say(f"{self._name}: {who} has ended without removing its lock; taking it over")

    def _is_touched(self, seconds: float) -> bool:
        before, end = self._path.stat().st_mtime_ns, time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(1.0, seconds / 4))
            if self._path.stat().st_mtime_ns != before:
                return True
        return False

    def _refusal(self, holder: dict[str, Any] | None) -> UserError:
        fix = "wait for it, stop it, or choose another folder"
        return UserError(f"{self._key}: another run is writing {self._name} ({_name_of(holder)}); {fix}")

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                os.utime(self._descriptor)
                same = _is_at(self._descriptor, self._path)
                if same and os.pread(self._descriptor, 4096, 0) == self._me.encode():
                    continue
                if not self._path.exists() or self._ended.is_set():
                    continue
            except OSError:  # a file server that does not answer just now, or release() in the main thread
                continue
            print(f"error: {self._key}: another run has taken {self._name} over; this one ends", file=sys.stderr)
            sys.stderr.flush()
            os._exit(LOST)


def _describe_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid": os.getpid(),
        "started": _start_time(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
    }


def _name_of(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "it has not written its name"
    job = f", job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('since')}"


def _start_time(pid: int) -> str:
    """Return when a process started, in the kernel's ticks: a pid may be used again. Empty if there is no process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_at(descriptor: int, path: Path) -> bool:
    """Return True if the open file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _read(descriptor: int) -> dict[str, Any] | None:
    """Return what the holder wrote about itself; None if the file is empty or not a whole record."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None
