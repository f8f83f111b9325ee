"""A part of the GPU check that ends as its variant says."""

import os
import signal
import sys
import time

from tools.gpu.parts import Job
from tools.gpu.record import Mismatch, NotRun, Row, Rows


def run(job: Job) -> None:
    """Add a row, and then end in some way."""
    rows = Rows(job.rows)
    rows.add(Row(name="first", values={"device": job.device, "variable": os.environ.get("GPU_PARTS_TEST")}))
    (job.folder / "left behind").touch()
    match job.variant:
        case "raises":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        case "hangs":
            time.sleep(60)
        case "is killed":
            print("about to die")
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exits":
            print("error: no such thing")
            sys.exit(2)
        case "differs":
            rows.measure("second", _differs)
        case "cannot":
            rows.measure("second", _cannot)
        case _:
            print("done")


def _differs() -> dict[str, str | int | float | None]:
    raise Mismatch("2 of 3 tensors differ", {"worst": 0.5})


def _cannot() -> dict[str, str | int | float | None]:
    raise NotRun("too little memory")
