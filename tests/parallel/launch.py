"""Jobs on several processes: one torchrun does them all, as starting it costs more than they do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def launch(worker: str, ranks: int, jobs: list[dict[str, Any]], folder: Path, timeout: int = 300) -> None:
    """Run ``worker``, a module, on ``ranks`` processes with the file of the jobs; a rank that fails hangs the others."""
    path = folder / f"jobs_{len(list(folder.glob('jobs_*')))}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", worker, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-4000:]
