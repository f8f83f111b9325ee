r"""Rehearse a cluster run on a CPU: execute a training step of every rank that differs, without its job.

    python -m tools.rehearse --config configs/ouro-1.4b/mla.yaml --config configs/ouro-1.4b/stage1a.yaml --gpus 512

Each role (pipeline rank x first and last tensor-, context- and data-parallel member) builds its part of the model and
runs the product's own training step in a process of its own. Tensors have shapes but no numbers, and messages go
nowhere. The report shows each role's memory, FLOPs and messages, and the planner's figures beside them. The roles'
messages are compared with each other: a job whose ranks disagree, or whose schedule can deadlock, ends with exit status
2. The recipe's own keys work as in pretrain.train: --parallel.tensor 8.

    python -m tools.rehearse --chain --config configs/ouro-1.4b/chain.yaml --attention mha --gpus 512

rehearses every training stage of a recipe.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from looplm.bounds import check_bounds, path_field, positive, require, require_file_place
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.files import write_whole
from pretrain.cluster.submit import SubmitConfig
from pretrain.cluster.submit import plan as plan_chain
from tools.rehearsal.rehearsal import Plan, plan_rehearsal, rehearse
from tools.rehearsal.report import as_dict, describe

PROG = "python -m tools.rehearse"


@dataclass(frozen=True, kw_only=True)
class RehearseOptions:
    """The extent of a rehearsal.

    Args:
        gpus: number of GPUs; null takes a chain's nodes x GPUs.
        rank: all (the distinct roles), or ranks separated by commas.
        micro_batches: of the rehearsed step; null takes as many as fill the pipeline twice.
        jobs: processes at a time, each of which takes a core.
        compare: print the planner's figures for the first and the last role.
        json: file to write all figures to.
    """

    gpus: int | None = positive(None)
    rank: str = "all"
    micro_batches: int | None = positive(None)
    jobs: int = positive(2)
    compare: bool = True
    json: str | None = path_field(None)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require_file_place(self.json, "json")


@dataclass(frozen=True, kw_only=True)
class RehearseConfig(RehearseOptions, RunConfig):
    """A recipe and the extent of its rehearsal."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        RehearseOptions.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class ChainConfig(RehearseOptions, SubmitConfig):
    """A chain of stages and the extent of its rehearsal."""

    def __post_init__(self) -> None:
        SubmitConfig.__post_init__(self)
        RehearseOptions.__post_init__(self)


def main(argv: list[str]) -> None:
    """``python -m tools.rehearse --config RECIPE.yaml --gpus 512``, or ``... --chain --config CHAIN.yaml``"""
    if {"--help", "-h"} & set(argv):  # its own keys only: the recipe's take pages, see pretrain.train --help
        parse_config(RehearseOptions, ["--help"], prog=PROG, description=str(__doc__))
    options: RehearseOptions
    if "--chain" in argv:
        words = [word for word in argv if word != "--chain"]
        options = parse_config(ChainConfig, words, prog=f"{PROG} --chain", description=str(__doc__))
        plans = _chain_plans(options)
    else:
        options = parse_config(RehearseConfig, argv, prog=PROG, description=str(__doc__))
        plans = [_plan("", _recipe(options), options.gpus, options)]
    found, faults = rehearse(plans, options.jobs), []
    for rehearsal in found:
        print("\n".join(describe(rehearsal, options.compare)), flush=True)
        prefix = f"{rehearsal.plan.name}: " if rehearsal.plan.name else ""
        faults += [prefix + fault for fault in rehearsal.faults]
    if options.json is not None:
        write_whole(Path(options.json), json.dumps([as_dict(rehearsal) for rehearsal in found], indent=1) + "\n")
    if faults:
        raise UserError(*faults)


def _recipe(config: RehearseConfig) -> RunConfig:
    return RunConfig(**{key.name: getattr(config, key.name) for key in fields(RunConfig)})


def _chain_plans(config: ChainConfig) -> list[Plan]:
    chain, faults = plan_chain(config)
    if faults:
        raise UserError(*faults)
    stages = [job for job in chain if job.run is not None]
    fix = "none of them trains, so there is nothing to rehearse; choose others with start and stop"
    require(bool(stages), "stages", [job.name for job in chain], fix)
    return [_plan(job.name, job.run, config.gpus or job.nodes * job.gpus, config) for job in stages if job.run]


def _plan(name: str, recipe: RunConfig, gpus: int | None, options: RehearseOptions) -> Plan:
    if gpus is None:
        raise UserError("gpus: missing; give the number of GPUs of the job: --gpus 512")
    return plan_rehearsal(name, recipe, gpus, options.rank, options.micro_batches)


if __name__ == "__main__":
    run_main(main)
