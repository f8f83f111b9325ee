"""Start :mod:`tests.parallel.worker` on several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


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
