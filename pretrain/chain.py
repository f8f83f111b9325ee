"""Submit the stages of a recipe to Slurm, each waiting for the one before it.

First everything that can be known is checked, for all stages: configurations, layouts, data, what each starts from. With
--dry_run true nothing is submitted: the commands are printed, as a script that could be pasted, and below each what its job
would run. What sbatch takes from its environment (SBATCH_PARTITION, SBATCH_ACCOUNT, SBATCH_TIMELIMIT) it takes here too.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_pipeline.verify import check_prefix
from looplm.checkpoint import CHANGEABLE
from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import RunConfig
from pretrain.data import check_corpus, schedule_on

LAUNCHERS = "pretrain/slurm"
GPUS = 8  # on a node, for training


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A job. It trains, unless ``run`` says otherwise.

    Args:
        name: as --start and --stop have it.
        config: files on top of those of the stages before; {attention} stands for the key attention.
        run: a command of this repository to run instead, on one node as one process: what follows "python -m".
        nodes: of a training job.
        gpus: on each of its nodes; null means 8 for training and none for a command.
    """

    name: str
    config: tuple[str, ...] = ()
    run: str | None = None
    nodes: int = 1
    gpus: int | None = None

    def __post_init__(self) -> None:
        one = (self.run is None) == bool(self.config)
        require(one, "stages[].config", list(self.config), "a stage has either config, to train, or run")
        require(self.nodes > 0, "stages[].nodes", self.nodes, "give a number above 0")
        require(self.run is None or self.nodes == 1, "stages[].nodes", self.nodes, "a command runs on one node")
        require(self.gpus is None or self.gpus >= bool(self.config), "stages[].gpus", self.gpus, "give a number above 0, or null")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ChainConfig:
    """What is submitted.

    Args:
        name: of the recipe; jobs are called NAME-STAGE.
        stages: in order.
        attention: which of the recipe's models.
        nodes: of every training stage, in place of its own.
        start: the first stage to submit; null starts at the first of all.
        stop: the last stage to submit; null goes to the last of all.
        after: number of a job that the first one waits for.
        arguments: for pretrain.train in every stage, on top of its files: "--parallel.tensor 2 --optim.lr 1e-4".
        preflight: submit a pretrain.preflight of the first stage in front, and start only if it says go.
        dry_run: print what would be submitted.
    """

    name: str
    stages: tuple[StageConfig, ...]
    attention: Literal["mha", "mla"] = "mla"
    nodes: int | None = None
    start: str | None = None
    stop: str | None = None
    after: int | None = None
    arguments: str = ""
    preflight: bool = True
    dry_run: bool = False

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        require(len(set(names)) == len(names) > 0, "stages[].name", names, "give at least one stage, each with a name of its own")  # fmt: skip
        require(self.nodes is None or self.nodes > 0, "nodes", self.nodes, "give a number above 0")
        for key in ("start", "stop"):
            name = getattr(self, key)
            require(name is None or name in names, key, name, f"the stages are {', '.join(names)}")
        require(names.index(self.start or names[0]) <= names.index(self.stop or names[-1]), "stop", self.stop, f"it comes before start={self.start}")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What Slurm is asked for, and what is known of it beforehand.

    Args:
        name: of its stage.
        launcher: file in pretrain/slurm.
        arguments: of the launcher.
        nodes: how many.
        gpus: on each.
        reads: directory of the checkpoint that it starts from.
        writes: directory of those that it makes.
        recipe: what it trains.
    """

    name: str
    launcher: str
    arguments: tuple[str, ...]
    nodes: int
    gpus: int
    reads: str | None = None
    writes: str | None = None
    recipe: RunConfig | None = None


def main(argv: list[str]) -> None:
    """``python -m pretrain.chain --config configs/ouro-1.4b/chain.yaml [--attention mha] [--start stage2] [--dry_run true]``"""
    chain = parse_config(ChainConfig, argv, prog="python -m pretrain.chain", description=str(__doc__))
    jobs, faults = plan(chain)
    if not faults:  # what hangs on a stage that is none would be called wrong too
        for index, job in enumerate(jobs):
            faults += find_faults(job, jobs[:index], awaited=chain.after is not None)
        faults += find_missing_data(jobs)
    if chain.preflight and jobs and jobs[0].recipe is not None:
        jobs.insert(0, dataclasses.replace(jobs[0], name="preflight", launcher="preflight.sbatch"))
    if chain.dry_run:
        print("\n".join(script(chain, jobs)), flush=True)
    if faults:
        raise UserError("\nerror: ".join(faults))
    if not chain.dry_run:
        submit(chain, jobs)


def plan(chain: ChainConfig) -> tuple[list[Job], list[str]]:
    """The jobs from ``start`` to ``stop``, and why others of these are none."""
    names = [stage.name for stage in chain.stages]
    wanted = names[names.index(chain.start or names[0]) : names.index(chain.stop or names[-1]) + 1]
    files: list[str] = []
    jobs, faults = [], []
    for stage in chain.stages:
        files += [path.replace("{attention}", chain.attention) for path in stage.config]
        if stage.name in wanted:
            try:
                jobs.append(_training(stage, files, chain) if stage.run is None else _command(stage, stage.run))
            except UserError as error:
                faults.append(f"{stage.name}: {error}")
    return jobs, faults


def _training(stage: StageConfig, files: list[str], chain: ChainConfig) -> Job:
    arguments = [word for path in files for word in ("--config", path)] + shlex.split(chain.arguments)
    recipe = parse_config(RunConfig, arguments, prog="pretrain.train", description="")
    nodes, gpus = chain.nodes or stage.nodes, stage.gpus or GPUS
    reads, writes = recipe.checkpoint.initial, recipe.output_dir
    return Job(stage.name, "multi_node.sbatch", tuple(arguments), nodes, gpus, reads, writes, recipe)


def _command(stage: StageConfig, run: str) -> Job:
    words = shlex.split(run)
    module = Path(*words[0].split(".")).with_suffix(".py")
    require(module.is_file(), "run", words[0], "it is not a module of this repository")

    def named(option: str) -> str | None:
        return words[words.index(option) + 1] if option in words[:-1] else None

    return Job(
        stage.name,
        "task.sbatch",
        tuple(words),
        1,
        stage.gpus or 0,
        reads=named("--checkpoint"),
        writes=named("--output"),
    )


def find_faults(job: Job, before: list[Job], awaited: bool = False) -> Iterator[str]:
    """Why a job could not run after those ``before`` it, each in one line that begins with its name.

    Args:
        awaited: the first one waits for a job that is not of this chain, and that may make what it starts from.
    """
    makers = [other for other in before if job.reads is not None and other.writes == job.reads]
    known = bool(makers) or (awaited and not before)
    if job.reads is not None and not known and not _holds_checkpoint(Path(job.reads)):
        yield f"{job.name}: starts from {job.reads}, which holds no checkpoint and which no stage before it makes"
    if job.recipe is None:
        return
    for maker in makers:
        if maker.recipe is not None:
            have, want = (dataclasses.asdict(recipe.model) for recipe in (maker.recipe, job.recipe))
            changed = [key for key in have if have[key] != want[key] and key not in CHANGEABLE]
            yield from (f"{job.name}: model.{key} is {want[key]}, in {maker.name} {have[key]}; it shapes the weights" for key in changed)  # fmt: skip
    ranks = job.nodes * job.gpus
    if fault := _fault_of(schedule_on, job.recipe, ranks):
        yield f"{job.name} on {ranks} GPUs: {fault}"


def find_missing_data(jobs: list[Job]) -> list[str]:
    """Prefixes that are not what a stage needs, each once, with the stages that read it."""
    readers: dict[str, list[str]] = {}
    for job in jobs:
        if job.recipe is None:
            continue
        prefixes = [source.prefix for source in (*job.recipe.data.train, *job.recipe.data.valid)]
        faults = [_fault_of(check_prefix, prefix, False) for prefix in prefixes]
        faults = faults if any(faults) else [_fault_of(check_corpus, job.recipe.data, job.recipe.model.vocab_size)]
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
    """Whether a run or an upcycling has left one there; whether it is whole is seen when it is opened."""
    return (folder / "manifest.json").exists() or (folder / "checkpoints" / "latest").exists()


def sbatch(chain: ChainConfig, job: Job, dependency: str | None) -> list[str]:
    """The words of its submission.

    afterok: a job that is requeued at its time limit keeps its number and is not over, so the next waits until it has ended
    with status 0. Where it fails, those that wait for it would do so for ever; Slurm is told to drop them.
    """
    words = ["sbatch", "--parsable", f"--job-name={chain.name}-{job.name}", f"--nodes={job.nodes}"]
    words += [f"--gpus-per-node={job.gpus}"] if job.gpus else []
    words += [f"--dependency=afterok:{dependency}", "--kill-on-invalid-dep=yes"] if dependency else []
    return [*words, f"{LAUNCHERS}/{job.launcher}", *job.arguments]


def script(chain: ChainConfig, jobs: list[Job]) -> Iterator[str]:
    """What would be submitted, as a shell script, with what each job would run in comments."""
    dependency = _first_dependency(chain)
    for job in jobs:
        variable = job.name.replace("-", "_")
        words = [
            word if word.startswith("--dependency") else shlex.quote(word) for word in sbatch(chain, job, dependency)
        ]
        yield f"{variable}=$({' '.join(words)})"
        yield f"#   {_job_runs(job)}"
        dependency = f"${variable}"


def _first_dependency(chain: ChainConfig) -> str | None:
    return None if chain.after is None else str(chain.after)


def _job_runs(job: Job) -> str:
    """What the launcher itself says it would run in such a job."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    size = {"DRY_RUN": "1", "SLURM_NNODES": str(job.nodes), "SLURM_GPUS_PER_NODE": str(job.gpus)}
    command = ["bash", f"{LAUNCHERS}/{job.launcher}", *job.arguments]
    done = subprocess.run(command, env=plain | size, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{job.name}: {done.stderr.strip().removeprefix('error: ')}")
    return done.stdout.strip()


def submit(chain: ChainConfig, jobs: list[Job]) -> None:
    """All of them or none: where Slurm refuses one, those before it are cancelled."""
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not on this machine; run this on a login node, or add --dry_run true")
    numbers: list[str] = []
    for job in jobs:
        dependency = numbers[-1] if numbers else _first_dependency(chain)
        done = subprocess.run(sbatch(chain, job, dependency), capture_output=True, text=True)
        if done.returncode:
            if numbers:
                subprocess.run(["scancel", *numbers], check=False)
            raise UserError(f"{job.name}: sbatch: {' '.join(done.stderr.split())}; nothing stays submitted")
        numbers.append(done.stdout.strip().split(";")[0])  # on several clusters: NUMBER;CLUSTER
        size = f"{job.nodes} nodes" if job.nodes > 1 else "1 node"
        print(f"{numbers[-1]}  {chain.name}-{job.name}, {size}{f', after {dependency}' if dependency else ''}")
        sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
