"""Search: estimate every legal layout and rank those that fit, or name the nearest change if none does."""

from dataclasses import dataclass, replace

from tqdm import tqdm

from looplm.config import RunConfig
from looplm.failures import UserError
from tools.planning.estimate import Estimate, estimate
from tools.planning.hardware import GIB, GPUS, Cluster, is_legal_number
from tools.planning.layouts import LayoutSearch, find_layouts
from tools.planning.memory import fullest_rank_memory
from tools.planning.planned_run import PlannedRun

MOST_GPUS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Result of a search."""

    fitting: list[Estimate]  # layouts that fit the GPUs' memory, fastest first
    search: LayoutSearch  # all layouts that were tried

    def fastest_per_division(self) -> list[Estimate]:
        """Return the fastest layout of each division of the ranks into TP, PP, CP and DP."""
        first: dict[tuple[int, int, int], Estimate] = {}
        for one in self.fitting:
            layout = one.run.config.parallel
            first.setdefault((layout.tensor, layout.pipeline, layout.context), one)
        return list(first.values())


def rank_layouts(recipe: RunConfig, cluster: Cluster) -> Ranking:
    """Estimate every legal layout of a recipe on a cluster.

    Raises:
        UserError: no layout is legal, or none fits.
    """
    search = find_layouts(recipe, cluster.gpus, cluster.node)
    if not search.legal:
        raise UserError(_no_layout_message(recipe, cluster, search))
    fitting = [run for run in search.legal if _fits(run, cluster)]
    if not fitting:
        raise UserError(_too_large_message(recipe, cluster, search))
    estimates = [estimate(run, cluster) for run in tqdm(fitting, unit="layout", leave=False, disable=None)]
    estimates.sort(key=lambda one: (one.time.total, one.memory.total))
    return Ranking(fitting=estimates, search=search)


def _fits(run: PlannedRun, cluster: Cluster) -> bool:
    return fullest_rank_memory(run).total <= cluster.usable_bytes


def _no_layout_message(recipe: RunConfig, cluster: Cluster, search: LayoutSearch) -> str:
    """Return the most common refusal, and the nearest numbers of GPUs below and above that have a layout."""
    ranges = (range(cluster.gpus - 1, 0, -1), range(cluster.gpus + 1, 2 * cluster.gpus + 1))
    legal = ((n for n in numbers if is_legal_number(n, cluster.node)) for numbers in ranges)
    below, above = (
        next((n for n in numbers if find_layouts(recipe, n, cluster.node).legal), "none") for numbers in legal
    )
    reason = search.reasons[search.refused.most_common(1)[0][0]] if search.refused else "nothing divides them"
    return (
        f"gpus: {cluster.gpus} is not allowed; the recipe has no layout on so many, mostly because of {reason}; "
        f"the nearest numbers with one are {below} below and {above} above"
    )


def _too_large_message(recipe: RunConfig, cluster: Cluster, search: LayoutSearch) -> str:
    """Return the layout that needs the least memory, and the smallest change of the cluster with which one fits."""
    leanest = min(search.legal, key=lambda run: fullest_rank_memory(run).total)
    needed, layout = fullest_rank_memory(leanest).total, leanest.config.parallel
    fixes = [f"--gpu {name}" for name in GPUS if _fits(leanest, replace(cluster, gpu=GPUS[name]))][:1]
    number = _more_gpus(cluster.gpus, cluster.node)
    while number <= MOST_GPUS:
        if any(_fits(run, cluster) for run in find_layouts(recipe, number, cluster.node).legal):
            fixes.append(f"--gpus {number}")
            break
        number = _more_gpus(number, cluster.node)
    fix = f"nearest that fits: {' or '.join(fixes)}" if fixes else "nothing in the tables fits; shorten data.seq_length"
    return (
        f"gpus: {cluster.gpus} hold no layout of the recipe: the leanest (tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}, context {layout.context}, micro-batch {leanest.config.data.micro_batch_size}, recompute "
        f"{layout.recompute}) needs {needed / GIB:.1f} GiB of {cluster.usable_bytes / GIB:.1f} usable on each; {fix}"
    )


def _more_gpus(gpus: int, node: int) -> int:
    """Return twice the number of GPUs, but the whole node if that were more than a part of it."""
    return min(2 * gpus, node) if gpus < node else 2 * gpus
