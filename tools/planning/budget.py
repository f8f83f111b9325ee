"""From the time of a step to days and money: what a stage's steps and its growing batch add up to."""

from collections import Counter
from typing import NamedTuple

from looplm.config import RunConfig
from pretrain.data import BatchSchedule
from tools.planning.estimate import step_time
from tools.planning.hardware import Cluster
from tools.planning.planned_run import PlannedRun

DAY_S = 86400


class Budget(NamedTuple):
    """Steps of a stage by their batch size in samples, and the tokens that they consume."""

    steps: Counter[int]
    tokens: int


def budget_of(recipe: RunConfig) -> Budget:
    """The stage's whole run: its steps with the batch that each has."""
    schedule, steps, consumed = BatchSchedule(recipe.data, 1), Counter[int](), 0
    for _ in range(recipe.optim.train_steps):
        size = schedule.at(consumed)[1]
        steps[size] += 1
        consumed += size
    return Budget(steps, consumed * recipe.data.seq_length)


def days(candidate: PlannedRun, cluster: Cluster, budget: Budget) -> float:
    """Of pure training: no validation, checkpoint, failure or queue."""
    return sum(count * step_time(candidate, cluster, size).total for size, count in budget.steps.items()) / DAY_S
