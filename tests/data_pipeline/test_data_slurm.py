"""The Slurm executor with stand-ins for sbatch, srun, squeue and scontrol, which run the job array on this machine."""

import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import slurm as slurm_jobs
from data_pipeline.config import ExecutorConfig, SlurmConfig
from data_pipeline.executor import StepRunner
from data_pipeline.folders import Folder
from data_pipeline.local_executor import StepFailed
from data_pipeline.readers import JsonLinesReader
from data_pipeline.verify import check_prefix
from looplm.failures import UserError

pytestmark = pytest.mark.slow  # every test here starts a process or trains

SBATCH = """#!/bin/bash
echo "$@" >>"$0.calls"
export RUN_OFFSET=${1##*=}
for script; do :; done  # the last argument
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
export SLURM_NODELIST=here SLURM_JOB_ID=7
for i in $(seq 0 "$last"); do SLURM_ARRAY_TASK_ID=$i bash "$script" >>"$0.log" 2>&1; done
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
    monkeypatch.setattr(slurm_jobs, "_PATIENCE", 2.0)
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


@pytest.fixture
def read(slurm: SlurmConfig, jsonl: Callable, tmp_path: Path) -> Callable[..., list[str]]:
    """Return ``read(squeue, sbatch)``, which runs a reading step with these scripts and returns the calls of sbatch."""
    folder = jsonl("a", ["x"]).parent

    def run(squeue: str, sbatch: str, **options: Any) -> list[str]:
        for name, script in (("squeue", squeue), ("sbatch", sbatch)):
            (tmp_path / "bin" / name).write_text(f"#!/bin/bash\necho call >>$0.calls\n{script}\n")
        config = ExecutorConfig(tasks=1, slurm=replace(slurm, **options))
        reader = JsonLinesReader(Folder(str(folder), ("a.jsonl",)))
        StepRunner(config, tmp_path / "work/final/logs").run("read-a", [reader])
        return (tmp_path / "bin/sbatch.calls").read_text().splitlines()

    return run


DONE = "mkdir -p {logs}/completions {logs}/stats; touch {logs}/completions/00000"
LATE = f"[ $(wc -l <$0.calls) -lt 3 ] || {{{{ {DONE}; }}}}; "
TIMED_OUT = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"
SUBMITTED = "echo Submitted batch job 7"


@pytest.mark.parametrize("answer", [TIMED_OUT, "echo 7"])
def test_a_queue_that_does_not_answer_is_asked_again(answer: str, read: Callable, tmp_path: Path) -> None:
    """Neither this command nor a repeated one submits a second array before the queue says that the first has gone."""
    logs = tmp_path / "work/final/logs/read-a"
    assert read((LATE + answer).format(logs=logs), SUBMITTED) == ["call"]
    assert len((tmp_path / "bin/squeue.calls").read_text().splitlines()) == 3
    (logs / "completions/00000").unlink()
    (tmp_path / "bin/squeue.calls").unlink()
    assert read((LATE + answer).format(logs=logs), SUBMITTED) == ["call"]


GONE = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"


@pytest.mark.parametrize("answer", [GONE, ""])
def test_a_job_that_has_gone_is_waited_for_a_while(answer: str, read: Callable, tmp_path: Path) -> None:
    logs = tmp_path / "work/final/logs/read-a"
    assert read((LATE + answer).format(logs=logs), SUBMITTED) == ["call"]
    (logs / "completions/00000").unlink()
    line = f"step read-a: its Slurm job ended before all tasks were done; see {logs} and run again"
    with pytest.raises(StepFailed, match=f"^{re.escape(line)}$"):
        read(answer, SUBMITTED)
    assert (tmp_path / "bin/sbatch.calls").read_text() == "call\n" * 2


def test_without_squeue_a_job_may_still_run(slurm: SlurmConfig, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "job_id").write_text("7")
    assert slurm_jobs.unfinished_job(tmp_path) is None, "squeue lists nothing"
    monkeypatch.setenv("PATH", "")
    assert slurm_jobs.unfinished_job(tmp_path) == "7"


def test_a_submission_that_fails(read: Callable) -> None:
    fault = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination"
    line = f"step read-a: {fault}; correct executor.slurm, or run the same command again"
    with pytest.raises(StepFailed, match=f"^{re.escape(line)}$"):
        read("", f"echo '{fault}' >&2; exit 1")


def test_what_is_submitted(slurm: SlurmConfig, jsonl: Callable, tmp_path: Path) -> None:
    """Three tasks in arrays of two, of which five may run at the same time."""
    jsonl("a", ["x"])
    settings = replace(slurm, cpus_per_task=3, mem_per_cpu_gb=5, max_array_size=2, qos="high")
    config = ExecutorConfig(tasks=3, workers=5, slurm=settings)
    logs = tmp_path / "work/final/logs"
    counts = StepRunner(config, logs).run("read-a", [JsonLinesReader(Folder(str(tmp_path), ("a.jsonl",)))])
    assert counts[0]["input_files"] == 1 and len(list((logs / "read-a/completions").iterdir())) == 3
    script = logs / "read-a/launch_script.slurm"
    calls = [f"--export=ALL,RUN_OFFSET={n} {'--dependency=afterany:7 ' if n else ''}{script}" for n in range(2)]
    assert (tmp_path / "bin/sbatch.calls").read_text().splitlines() == calls
    options = {line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if "#SBATCH" in line}
    given = {"array=0-1%5", "cpus-per-task=3", "mem-per-cpu=5G", "partition=cpu", "time=08:00:00", "qos=high"}
    assert given | {"job-name=looplm-read-a", "nodes=1", "requeue"} <= options


def test_a_path_that_job_scripts_cannot_carry(
    slurm: SlurmConfig, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path
) -> None:
    settings = config({"a": jsonl("a", corpus.documents(3))}, output_dir=str(tmp_path / "exp[1] $x" / "out"))
    with pytest.raises(UserError, match=r"executor.slurm: .* holds ' \$\[\]', which job scripts cannot carry; choose"):
        build(replace(settings, executor=replace(settings.executor, slurm=slurm)))
