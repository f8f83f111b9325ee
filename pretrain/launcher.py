"""What a run tells the command that launched it, and what it can learn about that command."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from looplm.failures import Failure

STATUS_FILE = "LOOPLM_STATUS_FILE"  # environment variable, set by pretrain/slurm/common.sh
_TORCHRUN_SECONDS = 30  # torchrun's own default


def record(status: int) -> None:
    """Write the exit status for the launcher: torchrun turns every status of its ranks into 1.

    The first rank that ends decides: the others may have failed only because it did.
    """
    path = os.environ.get(STATUS_FILE)
    if path and status:
        with suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{status}\n")


@contextmanager
def recorded() -> Iterator[None]:
    """Record the exit status with which the block ends the process, unless it is 0."""
    try:
        yield
    except Failure as error:
        record(error.status)
        raise
    except SystemExit as error:
        record(error.code if isinstance(error.code, int) else 1)
        raise
    except BaseException:
        record(1)
        raise


def seconds_after_signal() -> int | None:
    """Return how long torchrun waits for this process after a signal, before it kills it; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    except OSError:
        words = ""
    given = re.search(r"--shutdown[-_]timeout[= ](\d+)", words)
    names = ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT")
    values = [given[1] if given else "", *(os.environ.get(name, "") for name in names)]
    return next((int(value) for value in values if value.isdecimal()), _TORCHRUN_SECONDS)


def describe_signals(stop_timeout: float) -> Iterator[str]:
    """Yield a line if torchrun would kill this process before ``stop_timeout`` seconds after a signal."""
    waits = seconds_after_signal()
    if waits is not None and waits < stop_timeout:
        fix = f"start it with --shutdown-timeout {stop_timeout + 60:.0f}, or lower health.stop_timeout={stop_timeout:g}"
        yield f"torchrun kills its ranks {waits} s after a signal, saved or not; {fix}"
