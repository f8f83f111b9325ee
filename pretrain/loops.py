"""Number of loops of each training step (``loss.loop_onset``, ``loss.sampled_loops``).

It depends on the run's seed, its number of steps and the step alone, so all ranks agree, and a resumed run repeats it.
A run that is extended moves its onset: give ``loss.loop_onset`` the same number of steps as a share of the new one.
"""

import math
import random

from looplm.config import RunConfig

_SPREAD = 0.5  # standard deviation of the logarithm of the Poisson rate, as in Huginn (arXiv 2502.05171)


def loops_of_step(config: RunConfig, step: int) -> int:
    """Return how many loops the step runs that follows ``step`` steps."""
    loss, loops = config.loss, config.model.num_loops
    if step < round(loss.loop_onset * config.optim.train_steps):
        return loss.onset_loops
    if loss.sampled_loops == "none":
        return loops
    dice = random.Random(f"loops {config.seed} {step}")  # a string is hashed in the same way everywhere
    return 1 + dice.randrange(loops) if loss.sampled_loops == "uniform" else log_normal_poisson(loops, dice)


def log_normal_poisson(loops: int, dice: random.Random) -> int:
    """Return 1 + Poisson(exp(t)), at most ``loops``; t is normal, and the mean of exp(t) is half of ``loops``."""
    rate = math.exp(dice.gauss(math.log(loops / 2) - _SPREAD**2 / 2, _SPREAD))
    drawn, time = 1, dice.expovariate(1.0)  # arrivals until the time ``rate``
    while time <= rate and drawn < loops:
        drawn, time = drawn + 1, time + dice.expovariate(1.0)
    return drawn
