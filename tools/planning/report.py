"""The plan as text: what was searched, the ranking, and the first layout in detail."""

from dataclasses import asdict

from looplm.accounting import parameter_counts
from looplm.cli import UserError
from looplm.config import RunConfig
from tools.planning.budget import DAY_S, Budget, days
from tools.planning.estimate import Estimate, estimate
from tools.planning.hardware import GIB, Cluster
from tools.planning.layouts import as_it_stands
from tools.planning.memory import rank_memory
from tools.planning.search import Ranking

HEADER = "TP PP CP   DP  layers    micro x M  recompute  optimizer    GiB   step s    MFU   tokens/s     days"
NAMES = {
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
    """What is planned, on what, and how many layouts there are."""
    model, found, assume = recipe.model, ranking.found, cluster.assume
    total = sum(parameter_counts(model, recipe.gate).values())
    tried = len(found.legal) + found.refused.total()
    peak = cluster.gpu.fp8_tflops if cluster.fp8 else cluster.gpu.bf16_tflops
    return [
        f"recipe: {total:,} parameters, {model.num_layers} layers x {model.num_loops} loops, {recipe.data.seq_length:,} "
        f"positions, {budget.tokens:.3g} tokens in {recipe.optim.train_steps:,} steps",
        f"cluster: {cluster.gpus} {gpu_name}, {cluster.node} a node, {cluster.network_gbs:g} GB/s each between nodes; "
        f"{cluster.usable_bytes / GIB:.1f} of {cluster.gpu.memory_gib:g} GiB usable",
        f"assumed: {assume.matmul:.0%} of {peak:g} {'fp8' if cluster.fp8 else 'bf16'} TFLOP/s in matrix products, "
        f"{assume.attention:.0%} in attention, {assume.links:.0%} of every link (--assume.*; nothing here is measured)",
        f"layouts: {tried:,} tried, {len(found.legal):,} legal, {len(ranking.fitting):,} fit",
    ]


def explain_refusals(ranking: Ranking, cluster: Cluster) -> list[str]:
    """Why the others are not in the table, the most frequent reason first."""
    found, lines = ranking.found, ["", "not in the table, with one example of each check that refused them:"]
    for key, count in found.refused.most_common():
        lines.append(f"{count:>8,}  {found.reasons[key]}")
    heavy = len(found.legal) - len(ranking.fitting)
    return [*lines, f"{heavy:>8,}  legal, but more than {cluster.usable_bytes / GIB:.1f} GiB"]


def table(
    recipe: RunConfig, ranking: Ranking, cluster: Cluster, budget: Budget, price: float | None, top: int
) -> list[str]:
    """The fastest layout of each way to divide the ranks, and the recipe's own."""
    lines = ["", f"      {HEADER}" + ("" if price is None else "         cost")]
    for number, one in enumerate(ranking.divisions()[:top], start=1):
        lines.append(f"{number:>4}  {_row(one, cluster, budget, price)}")
    try:
        own = estimate(as_it_stands(recipe, cluster.gpus), cluster)
    except UserError as error:
        return [*lines, f"the recipe as it stands cannot run here: {error}"]
    return [
        *lines,
        f" own  {_row(own, cluster, budget, price)}",
        "own: the recipe as it stands, whether it fits or not",
    ]


def _row(one: Estimate, cluster: Cluster, budget: Budget, price: float | None) -> str:
    config, candidate = one.candidate.config, one.candidate
    layout, stages = config.parallel, candidate.stages()
    layers = str(stages[0]) if len(set(stages)) == 1 else f"{stages[0]}..{stages[-1]}"
    micro = f"{config.data.micro_batch_size} x {candidate.micro_batches}"
    state = "shared" if layout.distributed_optimizer else "whole"
    took = days(candidate, cluster, budget)
    cost = "" if price is None else f"{took * 24 * cluster.gpus * price:>13,.0f}"
    return (
        f"{layout.tensor:>2} {layout.pipeline:>2} {layout.context:>2} {candidate.replicas:>4}  {layers:>6} {micro:>12}  "
        f"{layout.recompute:<9}  {state:<9} {one.memory.total / GIB:>6.1f} {one.time.total:>8.2f} "
        f"{one.utilisation(cluster):>6.1%} {one.tokens_per_s:>10,.0f} {took:>8.1f}{cost}"
    )


def detail(one: Estimate, cluster: Cluster, budget: Budget) -> list[str]:
    """The memory of every pipeline rank, the step's time, what is sent, and lines to paste into a recipe."""
    config, total = one.candidate.config, one.time.total
    lines = ["", "The first in detail", "", "memory of a rank, GiB"]
    lines.append(f"  {'pipeline rank':<14}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'working':>9}{'all':>8}")  # fmt: skip
    for rank in range(config.parallel.pipeline):
        memory = rank_memory(one.candidate, rank)
        parts = [f"{value / GIB:>{width}.2f}" for value, width in zip(asdict(memory).values(), (9, 11, 11, 13, 9), strict=True)]  # fmt: skip
        lines.append(f"  {rank:<14}{''.join(parts)}{memory.total / GIB:>8.2f}")
    lines += ["", f"a step of {config.data.global_batch_size:,} samples, seconds"]
    for key, seconds in asdict(one.time).items():
        if seconds > 0:
            lines.append(f"  {NAMES[key]:<36}{seconds:>9.3f}{seconds / total:>8.1%}")
    lines.append(f"  {'all':<36}{total:>9.3f}")
    sent = [f"{kind} {size / GIB:,.1f}" for kind, size in one.sent.items() if size > 0]
    if sent:
        lines += ["", f"moved by a rank in a step, GiB: {', '.join(sent)}"]
    lines.append(
        f"{one.tokens_per_s * DAY_S:,.3g} tokens a day at the full batch; {days(one.candidate, cluster, budget):,.1f} days "
        f"of pure training for {budget.tokens:.3g} tokens"
    )
    return [*lines, "", *paste(one)]


def paste(one: Estimate) -> list[str]:
    """The layout as YAML."""
    config, values = one.candidate.config, asdict(one.candidate.config.parallel)
    keys = ["tensor", "pipeline", "last_stage_layers", "context", "distributed_optimizer", "overlap_grad_reduce", "recompute"]  # fmt: skip
    lines = ["parallel:"]
    for key in keys:
        value = values[key]
        if value is not None:
            lines.append(f"  {key}: {str(value).lower() if isinstance(value, bool) else value}")
    return [*lines, "data:", f"  micro_batch_size: {config.data.micro_batch_size}"]
