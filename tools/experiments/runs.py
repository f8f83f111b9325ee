"""The runs of an experiment: every arm at every learning rate of the sweep, then every arm at its best rate and seed.

Each arm gets the same number of trials, on a seed of its own and judged by validation data, because the best rate
depends on the number of loops. Two arms may only be compared if one of parameters, training FLOPs and trained tokens is
equal, as their pair says.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from looplm.accounting import parameter_counts, training_flops_per_token
from looplm.bounds import at_least, check_bounds, non_empty, positive, require
from looplm.cli import from_dict, to_plain
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.files import is_file_name
from pretrain.batch_schedule import BatchSchedule
from pretrain.loops import loops_of_step
from tools.experiments.experiment import Experiment, Pair
from tools.experiments.measure import MeasureConfig, Trial, evaluations
from tools.experiments.rows import Arm, Row
from tools.experiments.worth import Layers, Worth, WorthConfig, check_series, worth_of

_TUNED = "the sweep chooses rates by it; name other text"
TOLERANCE = 0.03  # by which quantities that count as equal may differ


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """The search for each arm's learning rate.

    Args:
        rates: learning rates; with one there is nothing to search.
        seeds: seeds of the trials, none of them one of the experiment's.
        steps: optimizer steps of a trial; null for those of a whole run.
    """

    rates: tuple[float, ...] = positive()
    seeds: tuple[int, ...] = at_least(0, (1000,))
    steps: int | None = positive(None)

    def __post_init__(self) -> None:
        check_bounds(self, "sweep")
        _require_distinct("sweep.rates", self.rates)
        _require_distinct("sweep.seeds", self.seeds)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(Experiment):
    """An experiment: what it asks, written before it runs, and its runs.

    Args:
        seeds: of the runs whose figures count.
        sweep: the search for each arm's learning rate.
        base: keys of pretrain.train that all arms share.
        arms: by name, the keys that differ.
        measure: what is measured after each run.
        worth: series of arms that show what a loop is worth.
    """

    seeds: tuple[int, ...] = at_least(0)
    sweep: SweepConfig
    base: dict[str, Any]
    arms: dict[str, dict[str, Any]] = non_empty()
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    worth: WorthConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_distinct("seeds", self.seeds)
        for arm in self.arms:
            require(is_file_name(arm) and arm == arm.strip(), "arms", arm, "give a name that a folder can have")
            require(not arm.startswith("_"), "arms", arm, "legends leave out names that begin with _")
        for seed in self.sweep.seeds:
            require(seed not in self.seeds, "sweep.seeds", seed, "rates tuned on a seed would favor it; give another")
        named = [("retired.arms", arm) for arm in (self.retired.arms if self.retired else ())]
        named += [(f"pairs.{key}", getattr(pair, key)) for pair in self.pairs for key in ("better", "than")]
        for key, arm in named:
            require(arm in self.arms, key, arm, f"give one of {', '.join(self.arms)}")
        for pair in self.pairs:
            self._refuse_unfair(pair)
        for arm in self.live_arms:
            self._check(arm)
        if self.worth is not None:
            runs = {arm: self.run_config(arm) for arm in self.live_arms}
            check_series(self.worth, runs, {arm: size.trained_tokens for arm, size in self.sizes.items()})

    def run_config(self, arm: str, **changes: Any) -> RunConfig:
        """Return what pretrain.train gets for an arm; ``changes`` are nested keys."""
        values = merged(merged(self.base, self.arms[arm]), {"output_dir": "run"}, changes)
        return from_dict(RunConfig, values, where=f"arms.{arm}")

    @property
    def live_arms(self) -> tuple[str, ...]:
        """The arms that are not retired."""
        return tuple(arm for arm in self.arms if self.retired is None or arm not in self.retired.arms)

    @cached_property
    def sizes(self) -> Mapping[str, "Size"]:
        """The size of each arm that is not retired."""
        return {arm: Size.of(self.run_config(arm)) for arm in self.live_arms}

    def worths(self, arms: Mapping[str, Arm]) -> tuple[Worth, ...]:
        """Return what a loop is worth in each series, from the final runs by arm; nothing if it is not asked."""
        if self.worth is None:
            return ()
        return worth_of(self.worth, {arm: Layers.of(self.run_config(arm)) for arm in self.live_arms}, arms)

    def _check(self, arm: str) -> None:
        """Raise if a run of an arm could not start, or could not be measured after it has trained."""
        trials: tuple[tuple[Trial, int], ...] = (("sweep", self.sweep.seeds[0]), ("final", self.seeds[0]))
        for trial, seed in trials:
            run = config_of(self, Unit(trial, arm, seed, self.sweep.rates[0]), Path("run"))
            try:
                evaluations(self.measure, run, trial)
            except UserError as error:
                raise UserError(f"arms.{arm}: {error}") from error
        loops, depth = run.model.num_loops, int(self.tuned_by.partition("@depth=")[2] or 1)
        require(1 <= depth <= loops, "tuned_by", self.tuned_by, f"arm {arm} has {loops} loops")
        tuned = {source.prefix for source in run.data.valid if len(self.sweep.rates) > 1}
        for name, split in self.measure.tests.items():
            fix = "text is tested on other text than that of data.valid; give its prefix"
            require(run.data.task is not None or split.valid is not None, f"measure.tests.{name}.valid", None, fix)
            require(split.valid not in tuned, f"measure.tests.{name}.valid", split.valid, _TUNED)

    def _refuse_unfair(self, pair: Pair) -> None:
        """Raise unless the two arms have equal what the pair says; those that are retired had it when they ran."""
        if not {pair.better, pair.than} <= set(self.live_arms):
            return
        sizes = [self.sizes[arm] for arm in (pair.better, pair.than)]
        attribute = pair.matched.replace(" ", "_")
        first, second = (float(getattr(size, attribute)) for size in sizes)
        if abs(first - second) > TOLERANCE * max(first, second):
            raise UserError(
                f"pairs: {pair.better} and {pair.than} are not matched in {pair.matched}: {first:,.0f} and "
                f"{second:,.0f}; change an arm (tools.count_params --partners designs one), or say what is matched"
            )


@dataclass(frozen=True)
class Size:
    """An arm in numbers: parameters without the gate, training FLOPs and tokens of a whole run."""

    parameters: int
    flops: float
    trained_tokens: int
    flops_per_token: float

    @classmethod
    def of(cls, config: RunConfig) -> "Size":
        """Return the size of a run."""
        counts = parameter_counts(config.model, config.gate)
        length, samples = config.data.seq_length, Counter[int]()
        schedule = BatchSchedule(config.data, data_parallel_size=1)
        for step in range(config.optim.train_steps):
            samples[loops_of_step(config, step)] += schedule.at(samples.total())[1]
        tokens = length * samples.total()
        flops = sum(
            length * count * training_flops_per_token(config.model, config.gate, config.loss, length, loops)
            for loops, count in samples.items()
        )
        return cls(sum(counts.values()) - counts.get("gate", 0), flops, tokens, flops / tokens)


@dataclass(frozen=True)
class Unit:
    """One run of an experiment."""

    trial: Trial
    arm: str
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.trial}_{self.arm}_lr{self.lr:g}_seed{self.seed}"

    def is_of(self, row: Row) -> bool:
        """Return True if a record is that of this run."""
        return (row.trial, row.arm, row.seed, row.lr) == (self.trial, self.arm, self.seed, self.lr)


def settings_of(config: ExperimentConfig, arm: str) -> str:
    """Return a fingerprint of the keys that make an arm's runs and their measurements.

    Keys that the experiment leaves to their defaults do not count: a new key leaves old records valid.
    """
    measured = {spec.name: getattr(config.measure, spec.name) for spec in fields(config.measure)}
    plain = {name: getattr(MeasureConfig(), name) for name in measured}
    changed = {name: to_plain(value) for name, value in measured.items() if value != plain[name]}
    keys = {"run": merged(config.base, config.arms[arm]), "steps of a trial": config.sweep.steps, "measure": changed}
    return sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def sweep_units(config: ExperimentConfig) -> list[Unit]:
    """Return the trials of the learning rates; none if there is only one rate."""
    rates = config.sweep.rates if len(config.sweep.rates) > 1 else ()
    return [Unit("sweep", arm, seed, lr) for seed in config.sweep.seeds for arm in config.live_arms for lr in rates]


def final_units(config: ExperimentConfig, rows: Sequence[Row]) -> Iterator[Unit]:
    """Yield the runs whose figures count, seed by seed, for the arms whose rate is known."""
    for seed in config.seeds:
        for arm in config.live_arms:
            rate = best_rate(config, arm, rows)
            if rate is not None:
                yield Unit("final", arm, seed, rate)


def best_rate(config: ExperimentConfig, arm: str, rows: Sequence[Row]) -> float | None:
    """Return the rate with the lowest mean of ``tuned_by`` over the sweep's seeds; None while trials are missing."""
    if len(config.sweep.rates) == 1:
        return config.sweep.rates[0]
    means = dict[float, float]()
    for lr in config.sweep.rates:
        trials = [row for row in rows if row.trial == "sweep" and (row.arm, row.lr) == (arm, lr)]
        found = [value for row in trials if (value := row.value(config.tuned_by)) is not None]
        if len(found) < len(config.sweep.seeds):
            return None
        mean = sum(found) / len(found)
        means[lr] = mean if math.isfinite(mean) else math.inf
    return min(means, key=lambda lr: means[lr])


def config_of(config: ExperimentConfig, unit: Unit, folder: Path) -> RunConfig:
    """Return what pretrain.train gets for a run in ``folder``."""
    optim: dict[str, Any] = {"lr": unit.lr}
    whole = config.run_config(unit.arm).optim
    if unit.trial == "sweep" and config.sweep.steps is not None:
        optim["train_steps"] = config.sweep.steps
        optim["decay_steps"] = -(-whole.decay_steps * config.sweep.steps // whole.train_steps)  # at least one, if any
    optim["min_lr"] = whole.min_lr / whole.lr * unit.lr  # the same share of the rate for every rate
    return config.run_config(unit.arm, output_dir=str(folder / "run"), seed=unit.seed, optim=optim)


def _require_distinct(key: str, values: tuple[float, ...]) -> None:
    require(len(values) > 0, key, [], "give at least one")
    for value in values:
        require(values.count(value) == 1, key, value, "give each once")


def merged(first: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested keys, later ones over earlier ones; a task replaces a task."""
    result = dict(first)
    for other in others:
        for key, value in other.items():
            deep = key != "task" and isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if deep else to_plain(value)
    return result
