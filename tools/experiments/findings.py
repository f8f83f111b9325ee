"""From rows to findings: every pair of the experiment in every figure, and the verdict on its question."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from tools.experiments import formats
from tools.experiments.experiment import Decides, Experiment, Pair
from tools.experiments.rows import Arm
from tools.experiments.statistics import FEWEST_FOR_T, Comparison, Interval, benjamini_hochberg, compare, holm

Answer = Literal["yes", "no", "undecided"]


class Finding(NamedTuple):
    """A pair of arms compared in one figure.

    Args:
        pair: the arms.
        figure: its name.
        seeds: seeds that both arms have.
        comparison: None if the arms cannot be compared.
        problem: why they cannot be compared, or which seeds were left out; empty if neither.
        p_holm: adjusted over all comparisons of the experiment that could be made.
        p_bh: the same, by Benjamini and Hochberg.
    """

    pair: Pair
    figure: str
    seeds: tuple[int, ...]
    comparison: Comparison | None
    problem: str
    p_holm: float | None = None
    p_bh: float | None = None

    @property
    def title(self) -> str:
        """The comparison in words."""
        return f"{self.pair.better} − {self.pair.than}, {self.figure}"


class Verdict(NamedTuple):
    """The answer to an experiment's question, and a sentence that gives its reason."""

    answer: Answer
    reason: str


def find(experiment: Experiment, arms: Mapping[str, Arm]) -> tuple[Finding, ...]:
    """Return a finding for each pair and figure of the experiment, in its order."""
    findings = [_compared(pair, figure, arms) for pair in experiment.pairs for figure in experiment.figures]
    made = [finding.comparison.p for finding in findings if finding.comparison]
    adjusted = iter(zip(holm(np.array(made)), benjamini_hochberg(np.array(made)), strict=True))
    result = list[Finding]()
    for finding in findings:
        p_holm, p_bh = next(adjusted) if finding.comparison else (None, None)
        result.append(finding._replace(p_holm=p_holm, p_bh=p_bh))
    return tuple(result)


def decide(experiment: Experiment, findings: Sequence[Finding]) -> Verdict:
    """Return the verdict by the interval of the deciding comparison alone.

    That comparison was fixed before the experiment ran, so its interval needs no correction for the others.
    """
    decides = experiment.decides
    deciding = next(
        finding
        for finding in findings
        if (finding.figure, finding.pair.better, finding.pair.than) == (decides.figure, decides.better, decides.than)
    )
    comparison = deciding.comparison
    if comparison is None:
        return Verdict("undecided", f"The deciding comparison could not be made: {deciding.problem}.")
    if comparison.is_constant:
        shown = formats.number(comparison.difference.mean)
        reason = "so nothing is known about other seeds; both arms may be at the ceiling or at chance"
        return Verdict("undecided", f"All {len(deciding.seeds)} differences are {shown}, {reason}.")
    seeds = len(deciding.seeds)
    reason = f"The difference is {formats.difference(comparison)} ({seeds} seeds, 95 % interval)."
    if seeds < FEWEST_FOR_T:
        reason += f" With {seeds} seeds the interval rests on the assumption that differences are normal."
    if deciding.problem:
        reason += f" Not all of it is in: {deciding.problem}."
    return Verdict(answer_of(decides, comparison.difference.interval), reason)


def answer_of(decides: Decides, interval: Interval) -> Answer:
    """Return yes if the whole interval is where the claim puts the difference, no if none of it is."""
    low, high = interval
    margin = decides.margin
    if decides.claim == "same":
        inside, outside = -margin <= low and high <= margin, low > margin or high < -margin
    elif decides.claim == "higher":
        inside, outside = low > margin, high <= margin
    else:
        inside, outside = high < -margin, low >= -margin
    return "yes" if inside else "no" if outside else "undecided"


def claim_of(decides: Decides) -> str:
    """Return the claim in words."""
    low, high = f"−{decides.margin:g}" if decides.margin else "0", f"{decides.margin:g}"
    place = {"higher": f"above {high}", "lower": f"below {low}", "same": f"between {low} and {high}"}[decides.claim]
    return f"{decides.better} − {decides.than} in {decides.figure} is {place}"


def _compared(pair: Pair, figure: str, arms: Mapping[str, Arm]) -> Finding:
    missing = [name for name in (pair.better, pair.than) if name not in arms]
    if missing:
        return Finding(pair, figure, (), None, f"no final run of {' and '.join(missing)} is recorded")
    a, b = arms[pair.better], arms[pair.than]
    a_values, b_values = a.values(figure), b.values(figure)
    seeds = tuple(sorted(a_values.keys() & b_values.keys()))
    problems = list[str]()
    for arm, values, other in ((a, a_values, b), (b, b_values, a)):
        if without := sorted(arm.rows.keys() - values.keys()):
            problems.append(f"{arm.name} has no such figure for {_seeds(without)}")
        if alone := sorted(values.keys() - set(seeds)):
            problems.append(f"{_seeds(alone)} of {arm.name} without a partner in {other.name}")
        if broken := sorted(seed for seed in seeds if not math.isfinite(values[seed])):
            problems.append(f"{arm.name} is not finite for {_seeds(broken)}")
    if len(seeds) < 2:
        problems.append(f"{len(seeds)} shared seeds, and an interval needs two")
    is_finite = all(math.isfinite(values[seed]) for values in (a_values, b_values) for seed in seeds)
    comparison = None
    if len(seeds) >= 2 and is_finite:  # a diverged run is a result: without it the other seeds would look too good
        comparison = compare(*(np.array([values[seed] for seed in seeds]) for values in (a_values, b_values)))
    return Finding(pair, figure, seeds, comparison, "; ".join(problems))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
