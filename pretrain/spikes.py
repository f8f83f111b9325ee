"""Loss spikes: what one is, and the return to the checkpoint before it.

A loss is compared with the median of recent ones, in units of their spread. OLMo 2 (arXiv 2501.00656) counts values
that are 7 standard deviations above the mean of recent ones; median and median absolute deviation are not moved by the
spike itself (Iglewicz and Hoaglin 1993). PaLM (arXiv 2204.02311, section 5.1) restarts from a checkpoint before the
spike and skips the data in between: spikes come from certain data *and* a certain state, so the same data do no harm
elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from looplm import checkpoint
from looplm.checkpoint import Health, Saver, TrainingState, step_folder
from looplm.config import HealthConfig, RunConfig
from looplm.failures import NumericalFailure
from pretrain.progress import Progress

STANDARD_DEVIATIONS = 1.4826  # of a normal distribution, in its median absolute deviation
SMALLEST_SPREAD = 1e-3  # relative to the median; losses that hardly differ would make any difference a spike


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A spike that ends with ``step``: the loss there, and the highest that would not belong to one."""

    step: int
    loss: float
    limit: float

    def __str__(self) -> str:
        return f"step {self.step}: a loss spike ({self.loss:.4f}, above {self.limit:.4f})"


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
        return accept(health)
    highest = limit(health.recent_losses, config)
    if highest is not None and loss > highest:
        return replace(health, losses_above=health.losses_above + 1)
    recent = (*health.recent_losses, loss)[-config.spike_window :]
    return replace(health, recent_losses=recent, losses_above=0, skipped_above=0)


def find(progress: Progress, loss: float, config: HealthConfig) -> Spike | None:
    """Return the spike that the last step completes, if it does."""
    highest = limit(progress.health.recent_losses, config)
    if highest is None or progress.health.losses_above < config.spike_steps:
        return None
    return Spike(step=progress.step, loss=loss, limit=highest)


def accept(health: Health) -> Health:
    """Return the state in which nothing is known of earlier losses, as after a spike that is only reported."""
    return replace(health, recent_losses=(), losses_above=0, skipped_above=0)


def roll_back(
    spike: Spike, progress: Progress, config: RunConfig, state: TrainingState, saver: Saver, say: Callable[[str], None]
) -> Progress:
    """Load the newest checkpoint before a spike, and skip the data between it and the spike's end; collective.

    The batch ramps up with the samples that are consumed, and the skipped ones are not. A run that is killed before
    its next checkpoint meets the same spike again and skips the same data.

    Raises:
        NumericalFailure: there is no such checkpoint, or ``health.max_rollbacks`` have been made.
    """
    allowed, windows = config.health.max_rollbacks, progress.health.skipped_samples
    if len(windows) >= allowed:
        raise NumericalFailure(
            f"{spike}; health.max_rollbacks={allowed} allows no further rollback; lower optim.lr, or look at the batch "
            f"with: python -m tools.replay {config.output_dir} --step {spike.step}"
        )
    saver.close()  # the checkpoint in the making may be the one to return to
    before = progress.step - progress.health.steps_above
    found = step_folder.newest(step_folder.of_run(config.output_dir), say, before)
    if found is None:
        raise NumericalFailure(
            f"{spike}; there is no checkpoint of step {before} or earlier to return to; lower checkpoint.save_every"
        )
    saver.forget_after(found)
    checkpoint.load_run(found, state)
    about = checkpoint.read_about(found)
    health = replace(about.health, skipped_samples=windows)  # those of earlier rollbacks
    returned = replace(Progress.at(about), horizon_samples=progress.horizon_samples, health=health)
    first = returned.position
    windows = (*windows, (first, progress.position))
    say(
        f"{spike}; back to step {about.step} (rollback {len(windows)} of {allowed}), "
        f"samples {first}-{progress.position - 1} are skipped"
    )
    return replace(returned, health=replace(health, skipped_samples=windows))
