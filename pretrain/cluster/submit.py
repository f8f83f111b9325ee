"""Submission of a recipe's stages to Slurm: the plan of jobs, its checks, and the sbatch commands."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from data_pipeline.verify import check_prefix
from looplm.bounds import check_bounds, expand_path, path_field, positive, require
from looplm.checkpoint import ModelDescription, check_fit, find_difference, read_about, step_folder
from looplm.cli import parse_config
from looplm.config import RunConfig
from looplm.failures import UserError
from pretrain.batch_schedule import schedule_on
from pretrain.cluster.commands import check_command
from pretrain.data import check_corpus

LAUNCHERS = "pretrain/slurm"
GPUS_PER_NODE = 8  # for training, unless a stage says otherwise
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")  # the dry run makes a shell variable of it


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of the recipe, which is one job: training, or a command between two trainings.

    Args:
        name: for --start and --stop; letters first, then also digits, "_" and "-".
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
        fix = 'give letters, then also digits, "_" and "-"'
        require(_NAME.fullmatch(self.name) is not None, "stages[].name", self.name, fix)
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
    after: int | None = positive(None)
    arguments: str = ""
    preflight: bool = True
    rehearse: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "")
        names = [stage.name for stage in self.stages]
        unique = len({_variable(name) for name in names}) == len(names) > 0
        fix = 'give at least one stage, each with a name of its own ("-" and "_" count as the same)'
        require(unique, "stages[].name", names, fix)
        for key in ("start", "stop"):
            name = getattr(self, key)
            require(name is None or name in names, key, name, f"the stages are {', '.join(names)}")
        _split(self.arguments, "arguments")
        ordered = names.index(self.start or names[0]) <= names.index(self.stop or names[-1])
        require(ordered, "stop", self.stop, f"it comes before start={self.start}")
        trains = any(stage.run is None for stage in self.stages)
        for key in ("nodes", "arguments", "rehearse"):
            value = getattr(self, key)
            require(trains or not value, key, value, "it is for training, and no stage here trains; leave it out")


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

    @property
    def step(self) -> Path | None:
        """The step directory that it starts from; None if it is not there yet."""
        return None if self.reads is None else step_folder.glance(self.reads)


def plan(config: SubmitConfig) -> tuple[list[Job], list[str]]:
    """Return the planned jobs, and an error for each stage that could not be planned or writes where another does."""
    names = [stage.name for stage in config.stages]
    wanted = names[names.index(config.start or names[0]) : names.index(config.stop or names[-1]) + 1]
    files: list[str] = []
    jobs, faults = [], []
    owners: dict[Path, str] = {}  # name of the stage that writes to a directory
    for stage in config.stages:  # also those before --start, whose directories later ones must not write to
        files += [path.replace("{attention}", config.attention) for path in stage.config]
        given = config if stage.name in wanted else replace(config, arguments="")  # which are for those that run
        try:
            job = _training(stage, files, given) if stage.run is None else _command(stage, stage.run)
        except UserError as error:
            faults += [f"{stage.name}: {error}"] if stage.name in wanted else []
            continue
        owner = stage.name if job.writes is None else owners.setdefault(_place(job.writes), stage.name)
        if stage.name not in wanted:
            continue
        jobs.append(job)
        if owner != stage.name:
            fix = "give each stage an output directory of its own"
            faults.append(f"{stage.name}: writes to {job.writes}, as {owner} does; {fix}")
    return jobs, faults


def _training(stage: StageConfig, files: list[str], config: SubmitConfig) -> Job:
    arguments = [word for path in files for word in ("--config", path)] + _split(config.arguments, "arguments")
    run = parse_config(RunConfig, arguments, prog="pretrain.train", description="")
    nodes, gpus = config.nodes or stage.nodes, stage.gpus or GPUS_PER_NODE
    reads, writes = run.checkpoint.initial, run.output_dir
    return Job(stage.name, "multi_node.sbatch", tuple(arguments), nodes, gpus, reads, writes, run)


def _command(stage: StageConfig, run: str) -> Job:
    words = _split(run, "run")
    require(bool(words), "run", run, 'give the words after "python -m"')
    module = Path(*words[0].split("."))
    named = re.fullmatch(r"\w+(\.\w+)*", words[0]) is not None
    if named and (module / "__main__.py").is_file():
        words[0], module = f"{words[0]}.__main__", module / "__main__"  # the launcher looks for a file
    found = named and module.with_suffix(".py").is_file()
    require(found, "run", words[0], "it is not a module of this repository")
    split = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    options = {option: value for option, value in pairwise(split) if option.startswith("--")}
    paths = {
        option: expand_path(options[option], option) for option in ("--checkpoint", "--output") if option in options
    }
    reads, writes = paths.get("--checkpoint"), paths.get("--output")
    return Job(stage.name, "task.sbatch", tuple(words), 1, stage.gpus or 0, reads, writes)


def _split(text: str, key: str) -> list[str]:
    """Split a text into words as a shell does."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{key}: {text!r} is not allowed; quote it as in a shell ({error})") from error


def _place(path: str) -> Path:
    """Return one form of a path that may be written in several."""
    return Path(path).resolve()


def find_faults(job: Job, before: list[Job], awaited: bool = False) -> Iterator[str]:
    """Yield why a job could not run after those ``before`` it, each in one line that begins with its name.

    With ``awaited``, the first job waits for a job outside this recipe, which may write what it starts from.
    """
    writer = _writer_for(job, before)
    known = writer is not None or (awaited and not before)
    resumes = job.run is not None and job.run.checkpoint.resume and step_folder.glance(job.run.output_dir) is not None
    if job.reads is not None and not known and not resumes and job.step is None:
        yield f"{job.name}: starts from {job.reads}, which holds no checkpoint and which no earlier stage writes"
    if job.run is None:
        made = [*(other.writes for other in before), job.reads if awaited and not before else None]
        if fault := _fault_of(check_command, job.arguments, [path for path in made if path]):
            yield f"{job.name}: {fault}"
        return
    wanted, step = ModelDescription(job.run.model, job.run.gate), job.step
    if writer is not None and writer.run is not None:
        different = find_difference(ModelDescription(writer.run.model, writer.run.gate), wanted)
        if different is not None:
            key, have, want = different
            yield f"{job.name}: {key} is {want}, in {writer.name} {have}; it shapes the weights"
    elif writer is None and step is not None and (fault := _fault_of(check_fit, step, *wanted)):
        yield f"{job.name}: {fault}"
    ranks = job.nodes * job.gpus
    if fault := _fault_of(schedule_on, job.run, ranks):
        yield f"{job.name} on {ranks} GPUs: {fault}"


def find_data_faults(jobs: list[Job]) -> list[str]:
    """Return the faults of the data that the stages read, each once, with the names of those stages."""
    readers: dict[str, list[str]] = {}
    tokenizers: dict[str, str | None] = {}  # hash of the tokenizer of each stage's weights, by its name
    others = []
    for index, job in enumerate(jobs):
        origin, theirs = _origin(job, jobs[:index], tokenizers)
        tokenizers[job.name] = theirs
        if job.run is None:
            continue
        data = job.run.data
        faults = [_fault_of(check_prefix, source.prefix, False) for source in (*data.train, *data.valid)]
        if not any(faults):
            try:
                own = check_corpus(data, job.run.model.vocab_size).tokenizer.sha256
                tokenizers[job.name] = own
                if theirs not in (None, own):
                    fault = f"its data are made with another tokenizer ({own[:12]}) than the weights of {origin}"
                    fix = "tokenize the data of all stages with the same one"
                    others.append(f"{job.name}: {fault} ({str(theirs)[:12]}); {fix}")
            except UserError as error:
                faults = [str(error)]
        for fault in filter(None, faults):
            readers.setdefault(fault, []).append(job.name)
    return [f"{', '.join(names)}: {fault}" for fault, names in readers.items()] + others


def _origin(job: Job, before: list[Job], tokenizers: dict[str, str | None]) -> tuple[str, str | None]:
    """Return a name of the weights that a job starts from, and the hash of their tokenizer; None if it is not known."""
    writer, step = _writer_for(job, before), job.step
    if writer is not None:
        return writer.name, tokenizers[writer.name]
    try:
        return str(step), read_about(step).tokenizer_sha256 if step else None
    except UserError:  # find_faults reports it
        return str(step), None


def _writer_for(job: Job, before: list[Job]) -> Job | None:
    """Return the last job that writes the checkpoint from which a later one starts; None if there is no such job."""
    if job.reads is None:
        return None
    place = _place(job.reads)
    return next((other for other in reversed(before) if other.writes and _place(other.writes) == place), None)


def _fault_of(check: Callable[..., object], *arguments: object) -> str | None:
    try:
        check(*arguments)
    except UserError as error:
        return str(error)
    return None


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
        variable = _variable(job.name)
        yield f"{variable}=$({' '.join(quoted)})"
        yield f"#   {_dry_run(job)}"
        dependency = f"${variable}"


def _variable(name: str) -> str:
    """Return the name of the shell variable for a stage's job."""
    return name.replace("-", "_")


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
