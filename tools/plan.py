r"""Plan a run on a cluster by arithmetic alone: no model is built and no process is started, but by --rehearse true.

    python -m tools.plan --config configs/ouro-1.4b/mha.yaml --config configs/ouro-1.4b/stage1a.yaml \
        --gpu h100 --gpus 64

tries every layout that the recipe can have on that many GPUs and prints those that fit, fastest first: tensor (TP),
pipeline (PP), context (CP) and data parallelism (DP), micro-batch, recomputation, and sharding of the optimizer's
state. The first is shown in detail, with lines to paste into the recipe. docs/planning.md has the formulas and their
assumptions. The recipe's own keys work as in pretrain.train: --data.seq_length 16384. The keys below may also come from
a YAML file: --config cluster.yaml.

    python -m tools.plan --timeline --help

draws a pipeline's schedule instead.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

from looplm.bounds import check_bounds, path_field, positive, require, require_file_place
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.megatron.settings import FP8_CAPABILITY
from tools import timeline
from tools.planning.estimate import budget_of
from tools.planning.hardware import (
    GPUS,
    NETWORKS,
    SHARED_NETWORK,
    Assumptions,
    Cluster,
    Gpu,
    GpuName,
    NetworkName,
    is_legal_number,
)
from tools.planning.report import describe_search, detail, explain_refusals, table
from tools.planning.search import Ranking, rank_layouts
from tools.rehearsal.rehearsal import plan_rehearsal, rehearse
from tools.rehearsal.report import describe

PROG = "python -m tools.plan"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A cluster, and the contents of the report.

    Args:
        gpu: model of the GPUs.
        gpus: number of GPUs.
        gpus_per_node: GPUs that share fast links.
        network: network between nodes, with one adapter for each GPU (eth-100: one for each node).
        assume: efficiencies that arithmetic cannot predict.
        price_per_gpu_hour: adds a column with the cost, in the same currency.
        top: number of rows, each the fastest layout of one division of the ranks.
        explain: also print why other layouts are not legal.
        json: file to write the printed layouts to.
        rehearse: execute a step of the fastest layout, and of the recipe's own, on this CPU (tools.rehearse), and print
            its memory, FLOPs and bytes beside the planned ones; it takes minutes.
    """

    gpu: GpuName
    gpus: int = positive(at_most=1 << 20)
    gpus_per_node: int = positive(8, at_most=1024)
    network: NetworkName = "ib-400"
    assume: Assumptions = field(default_factory=Assumptions)
    price_per_gpu_hour: float | None = positive(None)
    top: int = positive(10)
    explain: bool = False
    json: str | None = path_field(None)
    rehearse: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require_file_place(self.json, "json")
        nearest = max(1, round(self.gpus / self.gpus_per_node)) * self.gpus_per_node
        fix = f"give whole nodes of gpus_per_node={self.gpus_per_node}, {nearest} for instance"
        require(is_legal_number(self.gpus, self.gpus_per_node), "gpus", self.gpus, fix)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanOptions, RunConfig):
    """A recipe on a cluster."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        PlanOptions.__post_init__(self)
        fix = "a GPU is planned for bf16; give --optim.precision bf16"
        require(self.optim.precision == "bf16", "optim.precision", self.optim.precision, fix)
        if self.engine.real_fp8:
            self._check_fp8(GPUS[self.gpu])

    def _check_fp8(self, gpu: Gpu) -> None:
        """Raise if the GPU has no FP8, or not the scales of ``engine.fp8_recipe``."""
        able = ", ".join(name for name, one in GPUS.items() if one.fp8_tflops)
        require(gpu.fp8_tflops > 0, "engine.fp8", self.engine.fp8, f"{self.gpu} has none; these have: {able}")
        recipe, have = self.engine.fp8_recipe, gpu.capability
        need = FP8_CAPABILITY[recipe]
        able = ", ".join(name for name, one in GPUS.items() if one.capability >= need)
        fix = f"it needs compute capability {need[0]}.{need[1]}, {self.gpu} has {have[0]}.{have[1]}; these have it: "
        require(have >= need, "engine.fp8_recipe", recipe, fix + able)

    @property
    def cluster(self) -> Cluster:
        """The cluster in the formulas' terms, at the FP8 peak if the recipe's layers multiply in FP8."""
        sharing = self.gpus_per_node if self.network == SHARED_NETWORK else 1
        return Cluster(
            gpu=GPUS[self.gpu],
            gpus=self.gpus,
            node=self.gpus_per_node,
            network_gbs=NETWORKS[self.network] / sharing,
            fp8=self.engine.real_fp8,
            assume=self.assume,
        )

    @property
    def recipe(self) -> RunConfig:
        """The recipe without the cluster."""
        return RunConfig(**{key.name: getattr(self, key.name) for key in fields(RunConfig)})


def main(argv: list[str]) -> None:
    """``python -m tools.plan --config RECIPE.yaml --gpu h100 --gpus 64``, or ``python -m tools.plan --timeline``"""
    if "--timeline" in argv:
        timeline.main([flag for flag in argv if flag != "--timeline"])
        return
    if {"--help", "-h"} & set(argv):  # the planner's own keys only: the recipe's take pages, see pretrain.train --help
        parse_config(PlanOptions, ["--help"], prog=PROG, description=str(__doc__))
    config = parse_config(PlanConfig, argv, prog=PROG, description=str(__doc__))
    for line in plan(config):
        print(line, flush=True)


def plan(config: PlanConfig) -> Iterator[str]:
    """Yield the lines of the report, those of a rehearsal as they come, and write ``config.json``.

    Raises:
        UserError: the recipe has no layout on so many GPUs, or none fits.
    """
    recipe, cluster = config.recipe, config.cluster
    ranking, budget = rank_layouts(recipe, cluster), budget_of(recipe)
    lines = describe_search(recipe, cluster, config.gpu, budget, ranking)
    lines += explain_refusals(ranking, cluster) if config.explain else []
    lines += table(recipe, ranking, cluster, budget, config.price_per_gpu_hour, config.top)
    if config.json is not None:
        layouts = [one.as_dict(cluster) for one in ranking.fastest_per_division()[: config.top]]
        report = {"gpu": config.gpu, "gpus": config.gpus, "network": config.network, "tokens": budget.tokens}
        write_whole(Path(config.json), json.dumps(report | {"layouts": layouts}, indent=1) + "\n")
    yield from lines
    yield from detail(ranking.fitting[0], cluster, budget)
    if config.rehearse:
        yield from _rehearsed(config, ranking)


def _rehearsed(config: PlanConfig, ranking: Ranking) -> Iterator[str]:
    """Yield the planned figures beside those of a rehearsal, for the fastest layout and the recipe's own."""
    plans = [plan_rehearsal("fastest", ranking.fitting[0].run.config, config.gpus, "all", None)]
    try:
        plans.append(plan_rehearsal("own", config.recipe, config.gpus, "all", None))
    except UserError as error:
        yield ""
        yield f"own, not rehearsed: {error}"
    for rehearsal in rehearse(plans, jobs=2):
        yield ""
        yield from describe(rehearsal)
        yield from rehearsal.faults


if __name__ == "__main__":
    run_main(main)
