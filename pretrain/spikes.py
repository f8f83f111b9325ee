"""Loss spikes: what one is, and the return to the checkpoint before it.

A loss is compared with the median of recent ones, in units of their spread. OLMo 2 (arXiv 2501.00656) counts values
that are 7 standard deviations above the mean of recent ones; median and median absolute deviation are not moved by the
spike itself (Iglewicz and Hoaglin 1993). PaLM (arXiv 2204.02311, section 5.1) restarts from a checkpoint before the
spike and skips the data in between: spikes come from certain data *and* a certain state, so the same data do no harm
elsewhere.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from looplm.checkpoint import Health
from looplm.config import HealthConfig

STANDARD_DEVIATIONS = 1.4826  # of a normal distribution, in its median absolute deviation
SMALLEST_SPREAD = 1e-3  # relative to the median; losses that hardly differ would make any difference a spike


def limit(recent: Sequence[float], config: HealthConfig) -> float | None:
    """Return the loss above which a step belongs to a spike; None before enough steps, or if none is looked for."""
    if config.spike_factor is None or len(recent) < config.spike_window:
        return None
    middle = median(recent)
    spread = STANDARD_DEVIATIONS * median(abs(loss - middle) for loss in recent)
    return middle + config.spike_factor * max(spread, SMALLEST_SPREAD * abs(middle))


def watch(health: Health, loss: float, config: HealthConfig) -> Health:
    """Return the state after a step with that loss. Losses above the limit are not compared with later ones."""
    if config.spike_factor is None:
        return health
    highest = limit(health.recent_losses, config)
    if highest is not None and loss > highest:
        return replace(health, losses_above=health.losses_above + 1)
    recent = (*health.recent_losses, loss)[-config.spike_window :]
    return replace(health, recent_losses=recent, losses_above=0)
