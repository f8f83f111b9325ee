"""The Slurm executor with stand-ins for sbatch, srun, squeue and scontrol, which run the job array on this machine."""

import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import SlurmConfig
from data_pipeline.verify import check_prefix
from looplm.cli import UserError

pytestmark = pytest.mark.slow  # every test here starts a process or trains

SBATCH = """#!/bin/bash
for script; do :; done  # the last argument
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_NODELIST=here SLURM_JOB_ID=7
if grep -q merge_stats "$script"; then last=; fi
if [ -n "$last" ]; then for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$script" >>"$0.log" 2>&1; done; fi
echo "Submitted batch job 7"
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmConfig:
    tools = {"sbatch": SBATCH, "srun": SRUN, "squeue": "#!/bin/sh\n", "scontrol": "#!/bin/sh\necho here\n"}
    (tmp_path / "bin").mkdir()
    for name, script in tools.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return SlurmConfig(partition="cpu", poll_seconds=0.01)


def test_slurm_gives_the_same_result_as_this_machine(
    slurm: SlurmConfig, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path
) -> None:
    source = {"a": jsonl("a", corpus.documents(20, 2))}
    local = check_prefix(build(config(source, tasks=1)) / "a_train", deep=True)
    settings = config(source, tasks=1, output_dir=str(tmp_path / "slurm"))
    settings = replace(settings, executor=replace(settings.executor, slurm=slurm))
    assert check_prefix(build(settings) / "a_train", deep=True).fingerprint == local.fingerprint
    assert (tmp_path / "slurm" / "logs" / "tokenize" / "launch_script.slurm").exists()


def test_a_bad_line_on_another_machine_is_named_here(
    slurm: SlurmConfig, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path
) -> None:
    source = {"a": jsonl("a", corpus.documents(3))}
    with source["a"].open("a") as stream:
        stream.write("{}\n")
    settings = config(source, tasks=1)
    with pytest.raises(UserError, match=r"a.jsonl:4: no key 'text'"):
        build(replace(settings, executor=replace(settings.executor, slurm=slurm)))
    assert not (tmp_path / "out.partial").exists()
