"""Execution of a step as Slurm job arrays, which outlive the command and the answers of Slurm's own commands.

The id of the newest array is in the step's log folder, so that a repeated command waits for it instead of submitting a
second one that writes the same files.
"""

import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor
from multiprocess.reduction import ForkingPickler

from data_pipeline.config import SlurmConfig
from data_pipeline.folders import Folder
from data_pipeline.local_executor import StepFailed
from looplm.failures import Failure, UserError
from looplm.files import write_whole

JOB = "job_id"  # file in a step's log folder
_PATIENCE = 60.0  # seconds until NFS shows what tasks on other machines have written, at its default settings
_GONE = re.compile("invalid job id|unknown job", re.IGNORECASE)  # what squeue says of a job that ended minutes ago


def run_on_slurm(
    config: SlurmConfig, name: str, pipeline: list[Callable], tasks: int, workers: int, folder: Path
) -> None:
    """Run ``pipeline`` in the tasks that are not yet marked as completed, and wait for them.

    Args:
        workers: tasks that run at the same time.
        folder: the step's logs.

    Raises:
        UserError: the data is at fault.
        StepFailed: Slurm took no job, or the job ended without finishing.
    """
    root = Path(__file__).resolve().parents[1]  # jobs must find this package and this interpreter's scripts
    env_command = f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{root}:$PYTHONPATH"'
    options: dict[str, Any] = {key: value for key, value in asdict(config).items() if key != "poll_seconds"}
    options |= {"workers": workers, "job_name": f"looplm-{name}", "logging_dir": Folder(str(folder))}
    executor = _Executor(pipeline, tasks=tasks, env_command=env_command, **options)
    while executor.get_incomplete_ranks() and unfinished_job(folder) is not None:  # of a command that was killed
        time.sleep(config.poll_seconds)
    if executor.get_incomplete_ranks():
        executor.launch_job()
    gone_since = None
    while waiting := executor.get_incomplete_ranks():
        if unfinished_job(folder) is not None:
            gone_since = None
            time.sleep(config.poll_seconds)
            continue
        gone_since = gone_since or time.monotonic()
        if time.monotonic() - gone_since > _PATIENCE:
            raise _failure(name, folder, waiting)
        time.sleep(min(config.poll_seconds, _PATIENCE / 4))


def unfinished_job(folder: Path) -> str | None:
    """Return the id of a step's newest job array unless it has surely left the queue; squeue may fail to answer."""
    if not (folder / JOB).exists():
        return None
    job = (folder / JOB).read_text()
    if shutil.which("squeue") is None:  # this machine is not the cluster's
        return job
    queue = subprocess.run(["squeue", "-h", "-j", job], capture_output=True, text=True)
    if queue.returncode:
        return None if _GONE.search(queue.stderr) else job
    return job if queue.stdout.strip() else None


class _Executor(SlurmPipelineExecutor):
    """datatrove's executor without the job that sums the counters, which are read from the tasks' own files."""

    def launch_job(self) -> None:
        """Submit the incomplete tasks as job arrays, each of which starts after the one before it.

        Raises:
            StepFailed: sbatch failed.
        """
        ranks, folder = self.get_incomplete_ranks(), Path(self.logging_dir.path)
        (folder / "executor.pik").write_bytes(ForkingPickler.dumps(deepcopy(self)))  # dill's, as in datatrove
        (folder / "ranks_to_run.json").write_text(json.dumps(ranks))
        size = min(len(ranks), self.max_array_size)
        command = f"srun -l -n 1 launch_pickled_pipeline {folder / 'executor.pik'}"
        script = folder / "launch_script.slurm"
        script.write_text(self.get_launch_file_contents(self.get_sbatch_args(size), command))
        job = ""
        for offset in range(math.ceil(len(ranks) / size)):
            after = [f"--dependency=afterany:{job}"] if job else []
            options = [f"--export=ALL,RUN_OFFSET={offset}", *after]
            made = subprocess.run(["sbatch", *options, str(script)], capture_output=True, text=True)
            if made.returncode:
                fix = "correct executor.slurm, or run the same command again"
                raise StepFailed(f"step {folder.name}: {' '.join(made.stderr.split())}; {fix}")
            job = made.stdout.split()[-1]
            write_whole(folder / JOB, job)


def _failure(name: str, folder: Path, ranks: list[int]) -> Failure:
    """Return the mistake in the data that one of the tasks logged on another machine, or else a pointer to the logs."""
    for rank in ranks:
        log = folder / "logs" / f"task_{rank:05d}.log"
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
            if "UserError: " in line:
                return UserError(line.split("UserError: ", 1)[1])
    return StepFailed(f"step {name}: its Slurm job ended before all tasks were done; see {folder} and run again")
