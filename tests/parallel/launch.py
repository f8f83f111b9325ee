"""Start :mod:`tests.parallel.worker` on several processes."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

ROOT = Path(__file__).parent.parent.parent
# Four processes on two cores spend most of their time waiting for each other: `make test` takes a sample of what they do,
# `make test-layouts` all of it.
EVERYTHING = os.environ.get("LAYOUTS") == "all"


def spare_the_spawn() -> None:
    """Megatron's first save starts a process that holds a queue, and that imports all that this one has. A fork is it."""
    filesystem_async._results_queue = multiprocessing.get_context("fork").Manager().Queue()


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path, timeout: int = 600) -> None:
    """Run the jobs on ``ranks`` processes: starting those costs more than a job does.

    What a failing rank printed becomes the message. A rank that fails hangs the others, hence the time limit in seconds.
    """
    number = len(list(folder.glob("jobs_*.json")))
    path, log = folder / f"jobs_{number}.json", folder / f"log_{number}.txt"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += ["-m", "tests.parallel.worker", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, timeout=timeout
        )
    assert done.returncode == 0, log.read_text()[-6000:]
