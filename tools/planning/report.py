"""The plan as text: the search, the ranking, and the first layout in detail."""

from dataclasses import asdict

import yaml

from looplm.accounting import parameter_counts
from looplm.config import RunConfig
from looplm.failures import UserError
from tools.planning.estimate import DAY_S, Budget, Estimate, days, estimate
from tools.planning.hardware import GIB, Cluster
from tools.planning.layouts import own_layout
from tools.planning.memory import rank_memory
from tools.planning.search import Ranking

HEADER = "TP PP CP   DP  layers    micro x M  recompute  optimizer    GiB   step s    MFU   tokens/s     days"
MEMORY_WIDTHS = {"weights": 9, "gradients": 11, "optimizer": 11, "activations": 13, "working": 9}
TIME_NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "traffic": "memory traffic between them",
    "tensor": "waiting for TP messages",
    "context": "waiting for CP messages",
    "bubble": "pipeline's bubble",
    "gradients": "gradients, not hidden by backward",
    "weights": "weights gathered from shares",
    "optimizer": "optimizer",
}


def describe_search(recipe: RunConfig, cluster: Cluster, gpu_name: str, budget: Budget, ranking: Ranking) -> list[str]:
    """Return lines on the recipe, the cluster, the assumptions and the number of layouts."""
    model, search, assume = recipe.model, ranking.search, cluster.assume
    total = sum(parameter_counts(model, recipe.gate).values())
    tried = len(search.legal) + search.refused.total()
    steps = f"{recipe.optim.train_steps:,} steps"
    steps += f" of {budget.mean_loops:.2f} loops on average" if recipe.loss.varies_loops else ""
    peak = cluster.gpu.fp8_tflops if cluster.fp8 else cluster.gpu.bf16_tflops
    return [
        f"recipe: {total:,} parameters, {model.depth_summary}, "
        f"{recipe.data.seq_length:,} positions, {budget.tokens:.3g} tokens in {steps}",
        f"cluster: {cluster.gpus} {gpu_name}, {cluster.node} a node, {cluster.network_gbs:g} GB/s each between nodes; "
        f"{cluster.usable_bytes / GIB:.1f} of {cluster.gpu.memory_gib:g} GiB usable",
        f"assumed: {assume.matmul:.0%} of {peak:g} {'fp8' if cluster.fp8 else 'bf16'} TFLOP/s in matrix products, "
        f"{assume.attention:.0%} in attention, {assume.links:.0%} of every link (--assume.*; nothing here is measured)",
        f"layouts: {tried:,} tried, {len(search.legal):,} legal, {len(ranking.fitting):,} fit",
    ]


def explain_refusals(ranking: Ranking, cluster: Cluster) -> list[str]:
    """Return the reasons why other layouts are not in the table, most frequent first."""
    search, lines = ranking.search, ["", "not in the table, with one example of each check that refused them:"]
    lines += [f"{count:>8,}  {search.reasons[key]}" for key, count in search.refused.most_common()]
    too_large = len(search.legal) - len(ranking.fitting)
    return [*lines, f"{too_large:>8,}  legal, but more than {cluster.usable_bytes / GIB:.1f} GiB"]


def table(
    recipe: RunConfig, ranking: Ranking, cluster: Cluster, budget: Budget, price: float | None, top: int
) -> list[str]:
    """Return the fastest layout of each way to divide the ranks, and the recipe's own."""
    lines = ["", f"      {HEADER}" + ("" if price is None else "         cost")]
    for number, one in enumerate(ranking.fastest_per_division()[:top], start=1):
        lines.append(f"{number:>4}  {_row(one, cluster, budget, price)}")
    try:
        own = estimate(own_layout(recipe, cluster.gpus), cluster)
    except UserError as error:
        return [*lines, f"this recipe cannot run here as written: {error}"]
    return [*lines, f" own  {_row(own, cluster, budget, price)}", "own: the recipe as written, even if it does not fit"]


def _row(one: Estimate, cluster: Cluster, budget: Budget, price: float | None) -> str:
    config, run = one.run.config, one.run
    layout, per_rank = config.parallel, run.layers_per_rank()
    layers = str(per_rank[0]) if len(set(per_rank)) == 1 else f"{per_rank[0]}..{per_rank[-1]}"
    micro = f"{config.data.micro_batch_size} x {run.micro_batches}"
    state = "shared" if layout.distributed_optimizer else "whole"
    duration = days(run, cluster, budget)
    cost = "" if price is None else f"{duration * 24 * cluster.gpus * price:>13,.0f}"
    return (
        f"{layout.tensor:>2} {layout.pipeline:>2} {layout.context:>2} {run.replicas:>4}  {layers:>6} {micro:>12}  "
        f"{layout.recompute:<9}  {state:<9} {one.memory.total / GIB:>6.1f} {one.time.total:>8.2f} "
        f"{one.utilization(cluster):>6.1%} {one.tokens_per_s:>10,.0f} {duration:>8.1f}{cost}"
    )


def detail(one: Estimate, cluster: Cluster, budget: Budget) -> list[str]:
    """Return every pipeline rank's memory, the step's time, the bytes sent, and lines to paste into a recipe."""
    config, total = one.run.config, one.time.total
    loops = f" and {one.run.num_loops} loops" if config.loss.varies_loops else ""
    heads = "".join(f"{name:>{width}}" for name, width in MEMORY_WIDTHS.items())
    lines = ["", "The first in detail", "", "memory of a rank, GiB", f"  {'pipeline rank':<14}{heads}{'all':>8}"]
    for rank in range(config.parallel.pipeline):
        memory = rank_memory(one.run, rank)
        cells = "".join(f"{getattr(memory, name) / GIB:>{width}.2f}" for name, width in MEMORY_WIDTHS.items())
        lines.append(f"  {rank:<14}{cells}{memory.total / GIB:>8.2f}")
    lines += ["", f"a step of {config.data.global_batch_size:,} samples{loops}, seconds"]
    for key, seconds in asdict(one.time).items():
        if seconds > 0:
            lines.append(f"  {TIME_NAMES[key]:<36}{seconds:>9.3f}{seconds / total:>8.1%}")
    lines.append(f"  {'all':<36}{total:>9.3f}")
    sent = [f"{kind} {size / GIB:,.1f}" for kind, size in one.sent.items() if size > 0]
    if sent:
        lines += ["", f"moved by a rank in a step, GiB: {', '.join(sent)}"]
    lines.append(
        f"{one.tokens_per_s * DAY_S:,.3g} tokens a day at the full batch{loops}; "
        f"{days(one.run, cluster, budget):,.1f} days of pure training for {budget.tokens:.3g} tokens"
    )
    return [*lines, "", *layout_as_yaml(one)]


def layout_as_yaml(one: Estimate) -> list[str]:
    """Return the layout as lines of YAML, with every key, so that none of the recipe's own values stays in force."""
    config = one.run.config
    pasted = {"parallel": asdict(config.parallel), "data": {"micro_batch_size": config.data.micro_batch_size}}
    return yaml.safe_dump(pasted, sort_keys=False).splitlines()
