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
from looplm.failures import UserError

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
    assert not (tmp_path / "out").exists()


def test_the_array_of_a_killed_command_is_waited_for(
    slurm: SlurmConfig, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """The first command dies after it has submitted the reading step; that job is in the queue for two looks more."""
    settings = config({"a": jsonl("a", corpus.documents(20, 2))}, tasks=1)
    settings = replace(settings, executor=replace(settings.executor, slurm=slurm))
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.documents.find_duplicates", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(settings)
    step = tmp_path / "out.partial/final/logs/read-a"
    assert (step / "job_id").read_text() == "7"
    next(step.glob("completions/*")).unlink()
    (tmp_path / "bin" / "sbatch.log").unlink()
    queue, looks = tmp_path / "bin" / "squeue", tmp_path / "looks"
    queue.write_text(f"#!/bin/sh\necho look >>{looks}\n[ $(wc -l <{looks}) -gt 2 ] || echo 7\ntest ! -e {step}/again\n")
    build(settings)
    assert len(looks.read_text().splitlines()) == 3


def test_a_path_that_job_scripts_cannot_carry(
    slurm: SlurmConfig, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path
) -> None:
    settings = config({"a": jsonl("a", corpus.documents(3))}, output_dir=str(tmp_path / "exp[1] $x" / "out"))
    with pytest.raises(UserError, match=r"executor.slurm: .* holds ' \$\[\]', which job scripts cannot carry; choose"):
        build(replace(settings, executor=replace(settings.executor, slurm=slurm)))
