"""The Slurm launchers in a real bash, against stand-ins for srun, scontrol and torchrun that record their arguments."""

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from looplm.config import HealthConfig

pytestmark = pytest.mark.slow  # every test here starts a process or trains

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "pretrain/slurm"
LAUNCHERS = ["single_node", "multi_node", "preprocess", "preflight"]
SECONDS = 60
TORCHRUN_OPTIONS = ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]

# Run the task once for each node, as srun does, and end with the status in the file `status`.
SRUN = """#!/bin/bash
[[ $1 == --help ]] && exit
printf '%s\\n' "$@" >"$RECORD/srun"
[[ -s $RECORD/recorded ]] && cat "$RECORD/recorded" >"$LOOPLM_STATUS_FILE"
nodes=1
while [[ $1 == -* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@"; done
exit "$(cat "$RECORD/status")"
"""
TORCHRUN = '#!/bin/bash\nprintf "%s\\n" "$@" >"$RECORD/torchrun${SLURM_NODEID:-}"; env >"$RECORD/environment"\n'
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then [[ $3 == 'n[07-09]' ]] && printf 'n07\\nn08\\nn09\\n'; else echo "$@" >>"$RECORD/scontrol"; fi
"""
# Wait for a signal that asks to save, count how often one arrives, and end with the status in the file `status`.
WAITER = """
import signal, sys, time
from pathlib import Path
record, asked = Path(sys.argv[1]), []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: asked.append(number))
(record / "pid").write_text(str(__import__("os").getpid()))
(record / "ready").touch()
while not asked:
    time.sleep(0.01)
time.sleep(0.3)  # "saving": a second signal would arrive in this time
(record / "asked").write_text(str(len(asked)))
sys.exit(int((record / "status").read_text()))
"""
# What srun does with signals: it passes on SIGUSR1 as it is, and SIGTERM as SIGKILL, unless it is told to ignore it.
SIGNALLED_SRUN = """
import signal, subprocess, sys
from pathlib import Path
record, waiter, knows, *options = sys.argv[1:]
if "--help" in options:
    print("  --ignore-signals=<signals_list>" if knows == "knows" else "", flush=True)
    sys.exit(print("  --another-option\\n" * 10_000))  # into a pipe that nobody may read any more
task = subprocess.Popen([sys.executable, waiter, record])
signal.signal(signal.SIGUSR1, lambda number, frame: task.send_signal(number))
ignores = "--ignore-signals=SIGTERM" in options
signal.signal(signal.SIGTERM, signal.SIG_IGN if ignores else lambda *_: task.kill())
(Path(record) / "srun_pid").write_text(str(__import__("os").getpid()))
status = task.wait()
sys.exit(status if status >= 0 else 128 - status)
"""


class Cluster:
    """Stand-ins on PATH, their records, and the environment of a job."""

    def __init__(self, folder: Path) -> None:
        self.record, self.bin = folder / "record", folder / "bin"
        self.record.mkdir()
        self.bin.mkdir()
        for name, script in {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}.items():
            self.install(name, script)
        self.end_with(0)
        self.config = folder / "a b.yaml"  # with a space, which must not split the argument
        self.config.touch()
        plain = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("SLURM_", "SBATCH_", "DRY_RUN", "CONTAINER", "NCCL_", "TORCH_", "CUDA_", "OMP_"))
        }
        self.outside = plain | {"PATH": f"{self.bin}:{os.environ['PATH']}", "RECORD": str(self.record)}
        self.job = self.outside | {
            "SLURM_JOB_ID": "4711",
            "SLURM_NNODES": "3",
            "SLURM_JOB_NODELIST": "n[07-09]",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_ON_NODE": "96",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }
        self.one_node = self.job | {"SLURM_NNODES": "1"}

    def install(self, name: str, script: str) -> None:
        (self.bin / name).write_text(script)
        (self.bin / name).chmod(stat.S_IRWXU)

    def end_with(self, status: int) -> None:
        (self.record / "status").write_text(str(status))

    def read(self, name: str) -> list[str]:
        path = self.record / name
        return path.read_text().splitlines() if path.exists() else []

    def run(self, launcher: str, *arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = ["bash", f"pretrain/slurm/{launcher}.sbatch", *arguments]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_single_node_runs_torchrun_on_its_gpus(cluster: Cluster) -> None:
    done = cluster.run("single_node", "--config", str(cluster.config), "--parallel.tensor", "2", env=cluster.one_node)
    assert (done.returncode, done.stderr) == (0, "")
    expected = ["--standalone", "--nproc-per-node=4", *TORCHRUN_OPTIONS, "-m", "pretrain.train"]
    assert cluster.read("torchrun0") == [*expected, "--config", str(cluster.config), "--parallel.tensor", "2"]
    assert cluster.read("srun")[:3] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=96"]
    assert "torchrun --standalone --nproc-per-node=4" in done.stdout


def test_every_node_gets_its_rank_and_the_same_address(cluster: Cluster) -> None:
    done = cluster.run("multi_node", f"--config={cluster.config}", env=cluster.job)
    assert (done.returncode, done.stderr) == (0, "")
    for node in range(3):
        assert cluster.read(f"torchrun{node}") == [
            f"--node-rank={node}",
            "--nnodes=3",
            "--nproc-per-node=4",
            "--master-addr=n07",
            "--master-port=14711",
            "--rdzv-id=4711",
            *TORCHRUN_OPTIONS,
            "-m",
            "pretrain.train",
            f"--config={cluster.config}",
        ]


def test_a_dry_run_prints_the_command_that_a_run_executes(cluster: Cluster) -> None:
    arguments = ("--config", str(cluster.config), "--data.train", "[{prefix: data/a}]")
    dry = cluster.run("multi_node", *arguments, env=cluster.job | {"DRY_RUN": "1"})
    assert (dry.returncode, dry.stderr) == (0, "")
    assert not cluster.read("srun")
    assert dry.stdout == (
        "srun --nodes=3 --ntasks=3 --ntasks-per-node=1 --cpus-per-task=96 --kill-on-bad-exit=0 --wait=60 "
        """bash -c 'exec torchrun --node-rank="$SLURM_NODEID" "$@"' torchrun --nnodes=3 --nproc-per-node=4 """
        f"--master-addr=n07 --master-port=14711 --rdzv-id=4711 {' '.join(TORCHRUN_OPTIONS)} -m pretrain.train "
        f"--config '{cluster.config}' --data.train '[{{prefix: data/a}}]'\n"
    )
    assert cluster.run("multi_node", *arguments, env=cluster.job).stdout == dry.stdout
    show_arguments = "printf '%s\\n' " + dry.stdout.removeprefix("srun ")
    typed = subprocess.run(["bash", "-c", show_arguments], capture_output=True, text=True)
    assert typed.stdout.splitlines() == cluster.read("srun")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dry_run_outside_slurm_takes_its_size_from_the_header(cluster: Cluster, launcher: str) -> None:
    done = cluster.run(launcher, "--config", str(cluster.config), env=cluster.outside | {"DRY_RUN": "1"})
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    expected = {
        "single_node": "srun --nodes=1 --ntasks=1 torchrun --standalone --nproc-per-node=8 ",
        "multi_node": "--nnodes=2 --nproc-per-node=8 --master-addr=first-node --master-port=10000 --rdzv-id=0 ",
        "preprocess": "python -m data_pipeline.tokenize --config ",
        "preflight": "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 ",
    }
    assert expected[launcher] in done.stdout


def test_a_dry_run_outside_slurm_takes_its_size_from_the_environment(cluster: Cluster) -> None:
    size = {"DRY_RUN": "1", "SLURM_NNODES": "64", "SLURM_GPUS_PER_NODE": "4"}
    done = cluster.run("multi_node", "--config", str(cluster.config), env=cluster.outside | size)
    assert "torchrun --nnodes=64 --nproc-per-node=4 " in done.stdout


def test_a_preflight_runs_on_every_node(cluster: Cluster) -> None:
    done = cluster.run("preflight", "--config", str(cluster.config), env=cluster.job)
    assert (done.returncode, done.stderr) == (0, "")
    for node in range(3):
        assert cluster.read(f"torchrun{node}")[-4:] == ["-m", "pretrain.preflight", "--config", str(cluster.config)]


def test_a_task_is_one_process_of_any_command(cluster: Cluster) -> None:
    cluster.install("python", '#!/bin/bash\nprintf "%s\\n" "$@" "$OMP_NUM_THREADS" >"$RECORD/python"\n')
    done = cluster.run("task", "tools.upcycle", "depth", "--layers", "48", env=cluster.one_node)
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.read("python") == ["-m", "tools.upcycle", "depth", "--layers", "48", "96"]
    package = cluster.run("task", "tools.bench", env=cluster.one_node)
    assert (package.returncode, cluster.read("python")[1]) == (0, "tools.bench"), package.stderr
    for arguments, told in (((), "module: ''"), (("tools.up",), "module: 'tools.up' is not one of this repository's")):
        wrong = cluster.run("task", *arguments, env=cluster.one_node)
        assert (wrong.returncode, wrong.stderr.count("\n"), wrong.stderr.startswith(f"error: {told}")) == (2, 1, True)


DEFAULTS = {
    "NCCL_DEBUG": "WARN",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "540",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",
}


@pytest.mark.parametrize("launcher", ["single_node", "multi_node", "preflight"])
def test_the_trainers_environment_keeps_variables_that_are_set(cluster: Cluster, launcher: str) -> None:
    def environment(own: dict[str, str]) -> dict[str, str]:
        cluster.run(launcher, "--config", str(cluster.config), env=cluster.one_node | own)
        told = dict(line.split("=", 1) for line in cluster.read("environment") if "=" in line)
        return {name: told[name] for name in DEFAULTS}

    assert environment({}) == DEFAULTS
    own = dict.fromkeys(DEFAULTS, "0")
    assert environment(own) == own


@pytest.mark.parametrize("launcher", ["single_node", "multi_node", "preflight", "task"])
def test_a_container_runs_the_command_inside_srun(cluster: Cluster, launcher: str) -> None:
    arguments = ["tools.upcycle"] if launcher == "task" else ["--config", str(cluster.config)]
    dry = cluster.one_node | {"DRY_RUN": "1", "CONTAINER_MOUNTS": "/data:/data"}
    program = {"single_node": "torchrun --standalone", "task": "python -m"}.get(launcher, "bash -c ")
    pyxis = cluster.run(launcher, *arguments, env=dry | {"CONTAINER": "/images/looplm.sqsh"}).stdout
    mounts = f"{ROOT}:{ROOT},/data:/data"
    options = f"--container-image=/images/looplm.sqsh --container-mounts={mounts} --container-workdir={ROOT}"
    assert pyxis.startswith("srun --nodes=1 ") and f" {options} {program}" in pyxis
    apptainer = cluster.run(launcher, *arguments, env=dry | {"CONTAINER": "/images/looplm.sif"}).stdout
    assert f" apptainer exec --nv --bind {mounts} --pwd {ROOT} /images/looplm.sif {program}" in apptainer


def test_a_container_brings_its_own_packages(cluster: Cluster, tmp_path: Path) -> None:
    """No torchrun is needed outside the container."""
    (cluster.bin / "torchrun").unlink()
    lonely = cluster.one_node | {"PATH": f"{cluster.bin}:/usr/bin:/bin", "CONTAINER": "image"}
    for name in ("single_node.sbatch", "common.sh"):
        (tmp_path / "pretrain/slurm").mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / name, tmp_path / "pretrain/slurm")
    command = ["bash", "pretrain/slurm/single_node.sbatch", "--config", str(cluster.config)]
    inside = subprocess.run(command, cwd=tmp_path, env=lonely, capture_output=True, text=True)
    assert "torchrun: neither on PATH" not in inside.stderr and cluster.read("srun")
    outside = subprocess.run(command, cwd=tmp_path, env=lonely | {"CONTAINER": ""}, capture_output=True, text=True)
    assert (outside.returncode, outside.stderr.count("\n")) == (2, 1)
    assert outside.stderr.startswith("error: torchrun: neither on PATH nor in .venv")


@pytest.mark.parametrize(
    "given", [{"SLURM_GPUS_PER_NODE": "h100:6"}, {"SLURM_GPUS_PER_NODE": "6"}, {"SLURM_GPUS_ON_NODE": "6"}]
)
def test_gpus_per_node_in_every_spelling(cluster: Cluster, given: dict[str, str]) -> None:
    del cluster.one_node["SLURM_GPUS_ON_NODE"]
    cluster.run("single_node", "--config", str(cluster.config), env=cluster.one_node | given)
    assert "--nproc-per-node=6" in cluster.read("torchrun0")


@pytest.mark.promise(
    text="A job is requeued if its run was stopped with its state saved (143) or hung (4), and not after any other end",
    expected="the launcher ends with the run's own status, although torchrun ends with 1; requeued on 143 and 4 only",
)
@pytest.mark.parametrize(
    ("recorded", "status", "requeued"),
    [(143, 143, True), (4, 4, True), (1, 1, False), (2, 2, False), (3, 3, False), (5, 5, False), ("", 1, False)],
)
def test_only_an_interrupted_run_is_requeued(cluster, recorded, status, requeued, record_property) -> None:
    cluster.end_with(1)
    (cluster.record / "recorded").write_text(str(recorded))
    done = cluster.run("multi_node", "--config", str(cluster.config), env=cluster.job)
    assert (done.returncode, cluster.read("scontrol")) == (status, ["requeue 4711"] if requeued else [])
    assert not list(ROOT.glob(".looplm-job-*")), "the record is removed"
    record_property("seen", f"run {recorded or 'killed'}: launcher {status}, {'' if requeued else 'not '}requeued")


def test_a_finished_run_is_not_requeued(cluster: Cluster) -> None:
    cluster.end_with(0)
    done = cluster.run("multi_node", "--config", str(cluster.config), env=cluster.job)
    assert (done.returncode, cluster.read("scontrol")) == (0, [])


def start_waiting(cluster: Cluster, launcher: str, status: int, knows: bool) -> subprocess.Popen[bytes]:
    """Start the launcher with a trainer that waits for a signal. A real torchrun would end with 1 instead of 143."""
    for name, script in {"waiter.py": WAITER, "srun.py": SIGNALLED_SRUN}.items():
        (cluster.bin / name).write_text(script)
    words = [
        sys.executable,
        cluster.bin / "srun.py",
        cluster.record,
        cluster.bin / "waiter.py",
        "knows" if knows else "-",
    ]
    cluster.install("srun", f'#!/bin/bash\nexec {shlex.join(map(str, words))} "$@"\n')
    cluster.end_with(status)
    command = ["bash", f"pretrain/slurm/{launcher}.sbatch", "--config", str(cluster.config)]
    environment = cluster.job if launcher == "multi_node" else cluster.one_node
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: (cluster.record / "ready").exists() and (cluster.record / "srun_pid").exists())
    return running


@pytest.mark.parametrize("launcher", ["single_node", "multi_node"])
@pytest.mark.parametrize(("status", "requeued"), [(143, ["requeue 4711"]), (0, [])])
def test_slurms_warning_reaches_the_trainer_once(cluster: Cluster, launcher, status: int, requeued: list[str]) -> None:
    running = start_waiting(cluster, launcher, status, knows=False)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(SECONDS) == status
    assert cluster.read("asked") == ["1"]
    assert cluster.read("scontrol") == requeued


@pytest.mark.parametrize("launcher", ["single_node", "multi_node"])
@pytest.mark.parametrize(("knows", "status"), [(True, 143), (False, 137)])
def test_a_cancelled_job_saves_where_srun_lets_it_and_is_not_requeued(
    cluster: Cluster, launcher: str, knows: bool, status: int
) -> None:
    """scancel signals script, srun and trainer. If the script passed it on, the trainer would end without saving."""
    running = start_waiting(cluster, launcher, 143, knows)
    running.send_signal(signal.SIGTERM)
    for name in ("srun_pid", "pid"):
        with suppress(ProcessLookupError):  # srun may have killed it
            os.kill(int(cluster.read(name)[0]), signal.SIGTERM)
    assert running.wait(SECONDS) == status
    assert cluster.read("asked") == (["1"] if knows else [])
    assert cluster.read("scontrol") == []


def test_slurm_runs_a_copy_of_the_launcher(cluster: Cluster, tmp_path: Path) -> None:
    copy = Path(shutil.copy(FOLDER / "single_node.sbatch", tmp_path / "slurm_script"))
    command = ["bash", str(copy), "--config", str(cluster.config)]
    done = subprocess.run(command, cwd=ROOT, env=cluster.one_node, capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.read("torchrun0")[0] == "--standalone"
    lost = subprocess.run(command, env=cluster.one_node | {"SLURM_SUBMIT_DIR": "/"}, capture_output=True, text=True)
    assert (lost.returncode, lost.stderr.count("\n")) == (2, 1)
    assert "run sbatch from the repository's root" in lost.stderr


def test_preprocessing_hides_its_own_size_from_its_arrays(cluster: Cluster) -> None:
    cluster.install("python", '#!/bin/bash\nprintf "%s\\n" "$@" "${!SLURM_@}" "${!SBATCH_@}" >"$RECORD/python"\n')
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    overriding = {"SBATCH_PARTITION": "gpu", "SBATCH_TIMELIMIT": "24:00:00", "SBATCH_QOS": "high"}
    done = cluster.run("preprocess", "--config", str(cluster.config), env=cluster.job | kept | overriding)
    assert (done.returncode, done.stderr) == (0, "")
    assert cluster.read("python") == ["-m", "data_pipeline.tokenize", "--config", str(cluster.config), *kept]


def test_preprocessing_in_a_container_is_refused(cluster: Cluster) -> None:
    done = cluster.run("preprocess", "--config", str(cluster.config), env=cluster.job | {"CONTAINER": "looplm.sif"})
    told = f"executor.slurm, sbatch pretrain/slurm/task.sbatch data_pipeline.tokenize --config {cluster.config}"
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: CONTAINER: 'looplm.sif' is not used here; unset it ") and told in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config: required and not given; sbatch pretrain/slurm/"),
        (["--model.num_loops", "3"], "--config: required and not given"),
        (["--config"], "--config: no path after it"),
        (["--config", "no.yaml"], "--config: no.yaml cannot be read"),
        (["--config=no.yaml"], "--config: no.yaml cannot be read"),
        (["--config", "docs"], "--config: docs cannot be read"),
        (["--config", "setup.py", "--config", "no.yaml"], "--config: no.yaml cannot be read"),
        (["--config", "setup.py"], "SLURM_JOB_ID: not inside a Slurm job; start with sbatch pretrain/slurm/"),
    ],
)
def test_bad_input_is_a_one_line_error(cluster: Cluster, launcher: str, arguments: list[str], message: str) -> None:
    done = cluster.run(launcher, *arguments, env=cluster.outside)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("launcher", "changed", "message"),
    [
        ("multi_node", {"SLURM_GPUS_ON_NODE": ""}, "SLURM_GPUS_ON_NODE: '' is not a number of GPUs"),
        ("multi_node", {"SLURM_JOB_NODELIST": "x"}, "SLURM_JOB_NODELIST: scontrol cannot expand 'x'"),
        ("single_node", {}, "SLURM_NNODES: 3 nodes; sbatch pretrain/slurm/multi_node.sbatch uses them all"),
    ],
)
def test_an_unusable_allocation_is_a_one_line_error(
    cluster: Cluster, launcher: str, changed: dict[str, str], message: str
) -> None:
    done = cluster.run(launcher, "--config", str(cluster.config), env=cluster.job | changed)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {message}")
    assert not cluster.read("srun")


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_headers(launcher: str) -> None:
    text = (FOLDER / f"{launcher}.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, flags=re.MULTILINE))
    if launcher in ("preprocess", "preflight"):  # its arrays may still run; a preflight has nothing to resume
        assert "no-requeue" in options
        return
    (waits,) = map(int, re.findall(r"^shutdown_timeout=(\d+)$", (FOLDER / "common.sh").read_text(), re.MULTILINE))
    signalled = re.fullmatch(r"B:USR1@(\d+)", options["signal"])
    assert signalled and int(signalled[1]) > waits, "torchrun would still wait when Slurm kills the job"
    assert waits > HealthConfig().stop_timeout, "torchrun would kill ranks that still save"
    assert "requeue" in options and options["open-mode"] == "append" and options["ntasks-per-node"] == "1"
