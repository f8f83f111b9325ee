"""Start :mod:`tests.parallel.worker` on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path, timeout: int = 300) -> None:
    """Run the jobs on ``ranks`` processes; what a failing rank printed becomes the message. One that hangs is ended."""
    path = folder / f"jobs{ranks}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = folder / f"log{ranks}.txt"
    with log.open("w") as output:
        done = subprocess.run(
            [*command, "-m", "tests.parallel.worker", str(path)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
