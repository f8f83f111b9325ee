"""Fit what a loop is worth: the exponent φ with which loops add to the number of parameters of a model.

The law is that of "How Much Is One Recurrence Worth?" (arXiv 2604.21106), for runs of equally many tokens, so that its
term of the tokens is a part of E::

    loss = E + A (N_once + R^φ N_looped)^(-α)

N_looped are the parameters of the layers in the loops and N_once those of prelude and coda. With φ = 1, R loops are as
good as R times as many layers; with φ = 0 they are as good as one. Embedding and head are not counted: a series should
leave the width alone, so that all of its arms have the same.

The law is fitted to each seed by least squares; φ's interval is that of the seeds. For a φ and an α, E and A are linear
and exact, so that only two numbers are searched, from the best points of a grid.

Shapes: M arms of a series.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from looplm.accounting import parameter_counts
from looplm.bounds import check_bounds, non_empty, require
from looplm.config import RunConfig
from tools.experiments.rows import Arm
from tools.experiments.statistics import Comparison, Estimate, compare, estimate

_PHI, _ALPHA = (-1.0, 2.0), (0.02, 2.0)  # where they are searched
_STARTS = 8  # the best points of a grid, from which they are searched
_UNKNOWNS = 4


@dataclass(frozen=True, kw_only=True)
class WorthConfig:
    """Series of arms, to each of which the law is fitted.

    Args:
        figure: loss that it describes, such as "test.loss".
        series: arms by the name of the series, in at least two numbers of loops and two of layers; all of them train on
            as many tokens. The first series is the one that the others are compared with.
    """

    figure: str = non_empty()
    series: dict[str, tuple[str, ...]] = non_empty()

    def __post_init__(self) -> None:
        check_bounds(self, "worth")


class Layers(NamedTuple):
    """The parameters of a model's layers outside the loops and in them, and the number of loops."""

    once: int
    looped: int
    loops: int

    @classmethod
    def of(cls, run: RunConfig) -> "Layers":
        """Return those of a run."""
        counts = parameter_counts(run.model, run.gate)
        once, looped = counts["prelude"] + counts["coda"], counts["layers"] + counts["injection"]
        return cls(once, looped, run.model.num_loops)

    def effective(self, phi: float) -> float:
        """Return N_once + R^φ N_looped."""
        return self.once + self.loops**phi * self.looped


class Fit(NamedTuple):
    """The law fitted to the losses of a series; ``error`` is the root mean square of what it leaves, in nats."""

    phi: float
    alpha: float
    floor: float
    scale: float
    error: float

    @property
    def has_no_phi(self) -> bool:
        """True if φ was searched up to a bound, so that the law does not determine it."""
        return min(abs(self.phi - end) for end in _PHI) < 1e-3

    @property
    def is_at_end(self) -> bool:
        """True if one of the exponents was searched up to a bound."""
        return self.has_no_phi or min(abs(self.alpha / end - 1) for end in _ALPHA) < 1e-3


class Worth(NamedTuple):
    """A series and its fits.

    Args:
        series: its name.
        figure: that was fitted.
        layers: of each arm.
        losses: of each arm, the mean over ``fits``' seeds.
        fits: by seed.
        phi: over the seeds; None for fewer than two, or if one of them has none.
        against_first: φ compared with that of the first series by seed; None for the first, or if it cannot be.
        problem: why there is no fit, or less than all seeds; empty if neither.
    """

    series: str
    figure: str
    layers: tuple[Layers, ...]
    losses: tuple[float, ...]
    fits: Mapping[int, Fit]
    phi: Estimate | None
    against_first: Comparison | None
    problem: str


def check_series(worth: WorthConfig, runs: Mapping[str, RunConfig], tokens: Mapping[str, int]) -> None:
    """Raise a UserError unless the law can be fitted to each series.

    Args:
        worth: the series.
        runs: of every arm of the experiment.
        tokens: that each arm trains on.
    """
    for name, arms in worth.series.items():
        key = f"worth.series.{name}"
        for arm in arms:
            require(arm in runs, key, arm, f"give one of {', '.join(runs)}")
            require(arms.count(arm) == 1, key, arm, "list it once")
        layers = [Layers.of(runs[arm]) for arm in arms]
        fix = f"give at least {_UNKNOWNS + 1} arms, in two numbers of loops and two of layers"
        sizes = ({at.loops for at in layers}, {(at.once, at.looped) for at in layers})
        require(len(arms) > _UNKNOWNS and all(len(size) > 1 for size in sizes), key, ", ".join(arms), fix)
        unequal = {tokens[arm] for arm in arms}
        require(len(unequal) == 1, key, sorted(unequal), "train all arms of a series on as many tokens")


def worth_of(worth: WorthConfig, layers: Mapping[str, Layers], arms: Mapping[str, Arm]) -> tuple[Worth, ...]:
    """Return the fits of each series.

    Args:
        worth: the series.
        layers: of every arm.
        arms: final runs by arm.
    """
    found = [_of_series(name, worth, layers, arms) for name in worth.series]
    first = found[0].fits
    for place, other in enumerate(found[1:], start=1):
        shared = sorted(first.keys() & other.fits.keys())
        if len(shared) > 1 and not any(fits[seed].has_no_phi for fits in (other.fits, first) for seed in shared):
            phis = (np.array([fits[seed].phi for seed in shared]) for fits in (other.fits, first))
            found[place] = other._replace(against_first=compare(*phis))
    return tuple(found)


def fit(layers: Sequence[Layers], losses: Sequence[float]) -> Fit:
    """Fit the law to the losses of a series."""
    unit = float(min(at.once + at.looped for at in layers))
    loss_M = np.array(losses)

    def linear(phi: float, log_alpha: float) -> tuple[np.ndarray, np.ndarray]:
        """Return E and A, and what the law leaves of each loss."""
        size_M = np.array([at.effective(phi) for at in layers]) / unit
        columns = np.stack([np.ones_like(size_M), size_M ** -math.exp(log_alpha)], axis=1)
        weights, *_ = np.linalg.lstsq(columns, loss_M, rcond=None)
        return weights, columns @ weights - loss_M

    bounds = ([_PHI[0], math.log(_ALPHA[0])], [_PHI[1], math.log(_ALPHA[1])])
    grid = product(np.linspace(*_PHI, 31), np.log(np.geomspace(*_ALPHA, 21)))
    starts = sorted(grid, key=lambda at: float((linear(*at)[1] ** 2).sum()))[:_STARTS]
    best = min((least_squares(lambda at: linear(*at)[1], start, bounds=bounds) for start in starts), key=_cost)
    (floor, scale), left_M = linear(*best.x)
    phi, alpha = float(best.x[0]), math.exp(best.x[1])
    return Fit(phi, alpha, float(floor), float(scale * unit**alpha), float(np.sqrt((left_M**2).mean())))


def _cost(result: OptimizeResult) -> float:
    return float(result.cost)


def _of_series(name: str, worth: WorthConfig, layers: Mapping[str, Layers], arms: Mapping[str, Arm]) -> Worth:
    members = worth.series[name]
    of_arm = tuple(layers[arm] for arm in members)
    values = [arms[arm].values(worth.figure) if arm in arms else {} for arm in members]
    all_seeds = {seed for by_seed in values for seed in by_seed}
    seeds = [
        seed for seed in sorted(all_seeds) if all(math.isfinite(by_seed.get(seed, math.nan)) for by_seed in values)
    ]
    problems = list[str]()
    if left_out := sorted(all_seeds - set(seeds)):
        problems.append(f"without {worth.figure} of every arm for seeds {', '.join(map(str, left_out))}")
    if not seeds:
        return Worth(
            name, worth.figure, of_arm, (), {}, None, None, "; ".join(problems) or f"no final run has {worth.figure}"
        )
    fits = {seed: fit(of_arm, [by_seed[seed] for by_seed in values]) for seed in seeds}
    if at_end := [seed for seed, found in fits.items() if found.is_at_end]:
        problems.append(
            f"φ or α is at an end of its range for seeds {', '.join(map(str, at_end))}: the law does not fit"
        )
    losses = tuple(float(np.mean([by_seed[seed] for seed in seeds])) for by_seed in values)
    phis = np.array([found.phi for found in fits.values() if not found.has_no_phi])
    phi = estimate(phis) if 1 < len(phis) == len(fits) else None
    return Worth(name, worth.figure, of_arm, losses, fits, phi, None, "; ".join(problems))
