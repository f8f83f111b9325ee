"""Submission of a recipe's stages to Slurm: the plan of jobs, its checks, and the sbatch commands."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from data_pipeline.verify import check_prefix
from looplm.bounds import check_bounds, expand_path, path_field, positive
from looplm.checkpoint import CHANGEABLE
from looplm.cli import UserError, parse_config, require
from looplm.config import RunConfig
from pretrain.data import check_corpus, schedule_on

LAUNCHERS = "pretrain/slurm"
GPUS_PER_NODE = 8  # for training, unless a stage says otherwise


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of the recipe, which is one job: training, or a command between two trainings.

    Args:
        name: for --start and --stop.
        config: files on top of those of the earlier stages; {attention} is replaced by the key attention.
        run: command to run instead of training, on one node as one process: the words after "python -m".
        nodes: number of nodes of a training job.
        gpus: on each node; null means 8 for training and no GPU for a command.
    """

    name: str
    config: tuple[str, ...] = path_field(())
    run: str | None = None
    nodes: int = positive(1)
    gpus: int | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "stages[]")
        one = (self.run is None) == bool(self.config)
        require(one, "stages[].config", list(self.config), "a stage has either config, to train, or run")
        require(self.run is None or self.nodes == 1, "stages[].nodes", self.nodes, "a command runs on one node")
        enough = self.gpus is None or self.gpus >= bool(self.config)
        require(enough, "stages[].gpus", self.gpus, "give a number above 0, or null")


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """A recipe and the part of it to submit.

    Args:
        name: of the recipe; jobs are called NAME-STAGE.
        stages: in order.
        attention: which of the recipe's models.
        nodes: of every training stage, in place of its own.
        start: first stage to submit; null means the recipe's first.
        stop: last stage to submit; null means the recipe's last.
        after: number of a job that the first one waits for.
        arguments: for pretrain.train in every stage, on top of its files: "--parallel.tensor 2 --optim.lr 1e-4".
        preflight: submit a pretrain.preflight of the first stage before it; the rest starts only if it passes.
        rehearse: first rehearse every training stage on this machine (tools.rehearse); if one fails, submit nothing.
        dry_run: print what would be submitted.
    """

    name: str
    stages: tuple[StageConfig, ...]
    attention: Literal["mha", "mla"] = "mla"
    nodes: int | None = positive(None)
    start: str | None = None
    stop: str | None = None
    after: int | None = None
    arguments: str = ""
    preflight: bool = True
    rehearse: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "")
        names = [stage.name for stage in self.stages]
        unique = len(set(names)) == len(names) > 0
        require(unique, "stages[].name", names, "give at least one stage, each with a name of its own")
        for key in ("start", "stop"):
            name = getattr(self, key)
            require(name is None or name in names, key, name, f"the stages are {', '.join(names)}")
        ordered = names.index(self.start or names[0]) <= names.index(self.stop or names[-1])
        require(ordered, "stop", self.stop, f"it comes before start={self.start}")


@dataclass(frozen=True)
class Job:
    """A job to submit."""

    name: str  # of its stage
    launcher: str  # file in pretrain/slurm
    arguments: tuple[str, ...]  # of the launcher
    nodes: int
    gpus: int  # on each node
    reads: str | None = None  # directory of the checkpoint that it starts from
    writes: str | None = None  # directory of the checkpoints that it writes
    run: RunConfig | None = None  # the run that it trains; None for a command


def plan(config: SubmitConfig) -> tuple[list[Job], list[str]]:
    """Return the planned jobs, and an error for each stage that could not be planned."""
    names = [stage.name for stage in config.stages]
    wanted = names[names.index(config.start or names[0]) : names.index(config.stop or names[-1]) + 1]
    files: list[str] = []
    jobs, faults = [], []
    for stage in config.stages:
        files += [path.replace("{attention}", config.attention) for path in stage.config]
        if stage.name in wanted:
            try:
                jobs.append(_training(stage, files, config) if stage.run is None else _command(stage, stage.run))
            except UserError as error:
                faults.append(f"{stage.name}: {error}")
    return jobs, faults


def _training(stage: StageConfig, files: list[str], config: SubmitConfig) -> Job:
    arguments = [word for path in files for word in ("--config", path)] + shlex.split(config.arguments)
    run = parse_config(RunConfig, arguments, prog="pretrain.train", description="")
    nodes, gpus = config.nodes or stage.nodes, stage.gpus or GPUS_PER_NODE
    reads, writes = run.checkpoint.initial, run.output_dir
    return Job(stage.name, "multi_node.sbatch", tuple(arguments), nodes, gpus, reads, writes, run)


def _command(stage: StageConfig, run: str) -> Job:
    words = shlex.split(run)
    module = Path(*words[0].split(".")).with_suffix(".py")
    require(module.is_file(), "run", words[0], "it is not a module of this repository")
    options = {option: value for option, value in pairwise(words) if option.startswith("--")}
    paths = {
        option: expand_path(options[option], option) for option in ("--checkpoint", "--output") if option in options
    }
    reads, writes = paths.get("--checkpoint"), paths.get("--output")
    return Job(stage.name, "task.sbatch", tuple(words), 1, stage.gpus or 0, reads, writes)


def find_faults(job: Job, before: list[Job], awaited: bool = False) -> Iterator[str]:
    """Yield why a job could not run after those ``before`` it, each in one line that begins with its name.

    With ``awaited``, the first job waits for a job outside this recipe, which may write what it starts from.
    """
    writers = [other for other in before if job.reads is not None and other.writes == job.reads]
    known = bool(writers) or (awaited and not before)
    if job.reads is not None and not known and not _holds_checkpoint(Path(job.reads)):
        yield f"{job.name}: starts from {job.reads}, which holds no checkpoint and which no earlier stage writes"
    if job.run is None:
        return
    for writer in writers:
        if writer.run is not None:
            have, want = asdict(writer.run.model), asdict(job.run.model)
            for key, value in want.items():
                if value != have[key] and key not in CHANGEABLE:
                    yield f"{job.name}: model.{key} is {value}, in {writer.name} {have[key]}; it shapes the weights"
    ranks = job.nodes * job.gpus
    if fault := _fault_of(schedule_on, job.run, ranks):
        yield f"{job.name} on {ranks} GPUs: {fault}"


def find_missing_data(jobs: list[Job]) -> list[str]:
    """Return the faults of the data that the stages read, each once, with the names of those stages."""
    readers: dict[str, list[str]] = {}
    for job in jobs:
        if job.run is None:
            continue
        data = job.run.data
        faults = [_fault_of(check_prefix, source.prefix, False) for source in (*data.train, *data.valid)]
        faults = faults if any(faults) else [_fault_of(check_corpus, data, job.run.model.vocab_size)]
        for fault in filter(None, faults):
            readers.setdefault(fault, []).append(job.name)
    return [f"{', '.join(names)}: {fault}" for fault, names in readers.items()]


def _fault_of(check: Callable[..., object], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


def _holds_checkpoint(folder: Path) -> bool:
    """Return True if a run or an upcycling has left a checkpoint there; opening it shows whether it is complete."""
    return (folder / "manifest.json").exists() or (folder / "checkpoints" / "latest").exists()


def sbatch(config: SubmitConfig, job: Job, dependency: int | str | None) -> list[str]:
    """Return the words of the job's sbatch command.

    A job that is requeued at its time limit keeps its number and has not ended, so with ``afterok`` the next job waits
    until it has ended with status 0. If it fails, its dependents would wait forever; Slurm is told to drop them.
    """
    words = ["sbatch", "--parsable", f"--job-name={config.name}-{job.name}", f"--nodes={job.nodes}"]
    words += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    words += [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return [*words, f"{LAUNCHERS}/{job.launcher}", *job.arguments]


def script(config: SubmitConfig, jobs: list[Job]) -> Iterator[str]:
    """Yield the lines of a shell script that submits the jobs, with the command that each would run in a comment."""
    dependency: int | str | None = config.after
    for job in jobs:
        words = sbatch(config, job, dependency)
        quoted = (word if word.startswith("--dependency") else shlex.quote(word) for word in words)
        variable = job.name.replace("-", "_")
        yield f"{variable}=$({' '.join(quoted)})"
        yield f"#   {_dry_run(job)}"
        dependency = f"${variable}"


def _dry_run(job: Job) -> str:
    """Return the command that the launcher would run in such a job, as the launcher itself reports it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    size = {"DRY_RUN": "1", "SLURM_NNODES": str(job.nodes), "SLURM_GPUS_PER_NODE": str(job.gpus)}
    command = ["bash", f"{LAUNCHERS}/{job.launcher}", *job.arguments]
    done = subprocess.run(command, env=plain | size, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{job.name}: {done.stderr.strip().removeprefix('error: ')}")
    return done.stdout.strip()


def submit(config: SubmitConfig, jobs: list[Job]) -> None:
    """Submit all jobs or none: if Slurm refuses one, the earlier ones are cancelled."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not on this machine; run this on a login node, or add --dry_run true")
    numbers: list[str] = []
    for job in jobs:
        dependency = numbers[-1] if numbers else config.after
        done = subprocess.run(sbatch(config, job, dependency), capture_output=True, text=True)
        if done.returncode:
            if numbers:
                subprocess.run(["scancel", *numbers], check=False)
            raise UserError(f"{job.name}: sbatch: {' '.join(done.stderr.split())}; nothing stays submitted")
        numbers.append(done.stdout.strip().split(";")[0])  # NUMBER;CLUSTER if there are several clusters
        size = f"{job.nodes} nodes" if job.nodes > 1 else "1 node"
        after = f", after {dependency}" if dependency else ""
        print(f"{numbers[-1]}  {config.name}-{job.name}, {size}{after}", flush=True)
