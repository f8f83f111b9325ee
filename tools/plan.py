"""Plan a run on a cluster from arithmetic alone: nothing is built and no process is started.

    python -m tools.plan --config configs/ouro-1.4b/mha.yaml --config configs/ouro-1.4b/stage1a.yaml --gpu h100 --gpus 64

tries every layout that the recipe may have on that many GPUs and prints those that fit, the fastest first: tensor (TP),
pipeline (PP), context (CP) and data parallelism (DP), micro-batch, recomputation, and whether the replicas share the
optimizer's state. The first is shown in detail, with lines to paste into the recipe. Formulas and what they assume:
docs/planning.md. The recipe's own keys are taken too, as pretrain.train takes them: --data.seq_length 16384. The keys below
may stand in a YAML file of their own: --config cluster.yaml.

    python -m tools.plan --timeline --help

draws a pipeline's schedule instead.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from looplm.cli import parse_config, require, run_main
from looplm.config import RunConfig
from looplm.files import write_whole
from tools import timeline
from tools.planning.budget import budget_of
from tools.planning.hardware import GPUS, NETWORKS, Assumptions, Cluster, GpuName, NetworkName
from tools.planning.report import describe_search, detail, explain_refusals, table
from tools.planning.search import rank_layouts

PROG = "python -m tools.plan"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """A cluster, and what is printed.

    Args:
        gpu: the device; all are equal.
        gpus: how many in all.
        gpus_per_node: that share fast links.
        network: between nodes, with one adapter for each GPU (eth-100: one for a node).
        assume: what arithmetic cannot know.
        price_per_gpu_hour: adds a column with the cost, in the same currency.
        top: rows to print, each the fastest layout of one division of the ranks.
        explain: also say why others are not legal.
        json: file to write the printed layouts to.
    """

    gpu: GpuName
    gpus: int
    gpus_per_node: int = 8
    network: NetworkName = "ib-400"
    assume: Assumptions = field(default_factory=Assumptions)
    price_per_gpu_hour: float | None = None
    top: int = 10
    explain: bool = False
    json: str | None = None

    def __post_init__(self) -> None:
        for key in ("gpus", "gpus_per_node", "top"):
            require(getattr(self, key) > 0, key, getattr(self, key), "give a number above 0")
        whole = self.gpus <= self.gpus_per_node or self.gpus % self.gpus_per_node == 0
        nearest = max(1, round(self.gpus / self.gpus_per_node)) * self.gpus_per_node
        require(whole, "gpus", self.gpus, f"give whole nodes of gpus_per_node={self.gpus_per_node}, {nearest} for instance")  # fmt: skip
        price = self.price_per_gpu_hour
        require(price is None or price > 0, "price_per_gpu_hour", price, "give a number above 0, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanOptions, RunConfig):
    """A recipe on a cluster."""

    def __post_init__(self) -> None:
        RunConfig.__post_init__(self)
        PlanOptions.__post_init__(self)
        require(self.optim.precision == "bf16", "optim.precision", self.optim.precision, "a GPU is planned for bf16; give --optim.precision bf16")  # fmt: skip
        with_fp8 = ", ".join(name for name, gpu in GPUS.items() if gpu.fp8_tflops)
        able = not self.engine.real_fp8 or GPUS[self.gpu].fp8_tflops > 0
        require(able, "engine.fp8", self.engine.fp8, f"{self.gpu} has none; these have: {with_fp8}")

    @property
    def cluster(self) -> Cluster:
        """As the formulas take it; the layers multiply at the FP8 peak where the recipe says so."""
        return Cluster(
            gpu=GPUS[self.gpu], gpus=self.gpus, node=self.gpus_per_node, network_gbs=NETWORKS[self.network],
            fp8=self.engine.real_fp8, assume=self.assume,
        )  # fmt: skip

    @property
    def recipe(self) -> RunConfig:
        """Without the cluster."""
        return RunConfig(**{key.name: getattr(self, key.name) for key in fields(RunConfig)})


def main(argv: list[str]) -> None:
    """``python -m tools.plan --config RECIPE.yaml --gpu h100 --gpus 64``, or ``python -m tools.plan --timeline``"""
    if "--timeline" in argv:
        timeline.main([flag for flag in argv if flag != "--timeline"])
        return
    if {"--help", "-h"} & set(argv):  # of the planner's own keys: the recipe's are pages, and are pretrain.train's
        parse_config(PlanOptions, ["--help"], prog=PROG, description=str(__doc__))
    config = parse_config(PlanConfig, argv, prog=PROG, description=str(__doc__))
    print("\n".join(plan(config)))


def plan(config: PlanConfig) -> list[str]:
    """The lines that the command prints; also writes ``config.json``.

    Raises:
        UserError: the recipe has no layout on so many GPUs, or none fits.
    """
    recipe, cluster = config.recipe, config.cluster
    ranking, budget = rank_layouts(recipe, cluster), budget_of(recipe)
    best = ranking.fitting[0]
    lines = describe_search(recipe, cluster, config.gpu, budget, ranking)
    lines += explain_refusals(ranking, cluster) if config.explain else []
    lines += table(recipe, ranking, cluster, budget, config.price_per_gpu_hour, config.top)
    if config.json is not None:
        found = {
            "gpu": config.gpu,
            "gpus": config.gpus,
            "network": config.network,
            "tokens": budget.tokens,
            "layouts": [one.as_dict(cluster) for one in ranking.divisions()[: config.top]],
        }
        write_whole(Path(config.json), json.dumps(found, indent=1) + "\n")
    return lines + detail(best, cluster, budget)


if __name__ == "__main__":
    run_main(main)
