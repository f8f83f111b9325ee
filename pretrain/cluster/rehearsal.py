"""Rehearsals before a run is submitted or started: ``tools.rehearse`` in a process of its own, which sees no GPU."""

import os
import subprocess
import sys
from collections.abc import Sequence

from pretrain.cluster.findings import Finding

_OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rehearse(arguments: Sequence[str]) -> bool:
    """Run ``python -m tools.rehearse`` with these arguments and its own output; return True if it found no fault."""
    plain = {name: value for name, value in os.environ.items() if name not in _OF_THE_JOB}
    command = [sys.executable, "-m", "tools.rehearse", *arguments]
    return subprocess.run(command, env=plain | {"CUDA_VISIBLE_DEVICES": ""}).returncode == 0


def rehearse_stage(arguments: Sequence[str], ranks: int) -> Finding:
    """Rehearse a training stage on that many ranks.

    Args:
        arguments: its configuration, as for pretrain.train.
        ranks: of the job.
    """
    if rehearse([*arguments, "--gpus", str(ranks)]):
        return Finding("ok", "rehearsal", f"every rank that differs, of {ranks}, ran a step; see above")
    return Finding("FAIL", "rehearsal", "a step of some rank fails, see above; python -m tools.rehearse repeats it")
