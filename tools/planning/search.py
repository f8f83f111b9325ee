"""The search: every legal layout estimated, those that fit ranked; or one line on what is nearest where none does."""

from dataclasses import dataclass, replace

from looplm.cli import UserError
from looplm.config import RunConfig
from tools.planning.estimate import Estimate, estimate
from tools.planning.hardware import GIB, GPUS, Cluster
from tools.planning.layouts import Found, find_layouts
from tools.planning.memory import fullest_rank
from tools.planning.planned_run import PlannedRun

MOST_GPUS = 1 << 14


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What a search gives.

    Args:
        fitting: layouts that fit the GPUs' memory, the fastest first.
        found: all that were tried.
    """

    fitting: list[Estimate]
    found: Found

    def divisions(self) -> list[Estimate]:
        """The fastest of each division of the ranks into TP, PP, CP and DP."""
        first: dict[tuple[int, int, int], Estimate] = {}
        for one in self.fitting:
            layout = one.candidate.config.parallel
            first.setdefault((layout.tensor, layout.pipeline, layout.context), one)
        return list(first.values())


def rank_layouts(recipe: RunConfig, cluster: Cluster) -> Ranking:
    """Estimate every legal layout of a recipe on a cluster.

    Raises:
        UserError: none is legal, or none fits.
    """
    found = find_layouts(recipe, cluster.gpus, cluster.node)
    if not found.legal:
        raise UserError(_no_layout(recipe, cluster, found))
    fitting = [one for one in found.legal if _fits(one, cluster)]
    if not fitting:
        raise UserError(_too_large(recipe, cluster, found))
    estimates = [estimate(candidate, cluster) for candidate in fitting]
    estimates.sort(key=lambda one: (one.time.total, one.memory.total))
    return Ranking(fitting=estimates, found=found)


def _fits(candidate: PlannedRun, cluster: Cluster) -> bool:
    return fullest_rank(candidate)[1].total <= cluster.usable_bytes


def _no_layout(recipe: RunConfig, cluster: Cluster, found: Found) -> str:
    """Nearest numbers of GPUs, below and above, that have a layout."""
    below = (number for number in range(cluster.gpus - 1, 0, -1))
    above = (number for number in range(cluster.gpus + 1, 2 * cluster.gpus + 1))
    nearest = [
        str(next((n for n in numbers if find_layouts(recipe, n, cluster.node).legal), "none"))
        for numbers in (below, above)
    ]
    reason = found.reasons[found.refused.most_common(1)[0][0]] if found.refused else "nothing divides them"
    return (
        f"gpus: {cluster.gpus} is not allowed; the recipe has no layout on so many, mostly because of {reason}; "
        f"the nearest numbers with one are {nearest[0]} below and {nearest[1]} above"
    )


def _too_large(recipe: RunConfig, cluster: Cluster, found: Found) -> str:
    """The layout that needs least, and the smallest change of the cluster under which one fits."""
    leanest = min(found.legal, key=lambda one: fullest_rank(one)[1].total)
    needed, layout = fullest_rank(leanest)[1].total, leanest.config.parallel
    fixes = [f"--gpu {name}" for name in GPUS if _fits(leanest, replace(cluster, gpu=GPUS[name]))][:1]
    number = 2 * cluster.gpus
    while number <= MOST_GPUS:
        if any(_fits(one, cluster) for one in find_layouts(recipe, number, cluster.node).legal):
            fixes.append(f"--gpus {number}")
            break
        number *= 2
    fix = f"nearest that fits: {' or '.join(fixes)}" if fixes else "nothing in the tables fits; shorten data.seq_length"
    return (
        f"gpus: {cluster.gpus} hold no layout of the recipe: the leanest (tensor {layout.tensor}, pipeline "
        f"{layout.pipeline}, context {layout.context}, micro-batch {leanest.config.data.micro_batch_size}, recompute "
        f"{layout.recompute}) needs {needed / GIB:.1f} GiB of {cluster.usable_bytes / GIB:.1f} usable on each; {fix}"
    )
