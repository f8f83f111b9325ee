"""The checkpoints of one run: at most one in the making, the newest and the permanent ones kept."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import looplm.checkpoint.step_folder as step_folder
from looplm.checkpoint.about import About
from looplm.checkpoint.saving import COMPANION_FOLDER, Saving
from looplm.checkpoint.state import TrainingState, sharded_state
from looplm.checkpoint.writer import Writer
from looplm.cli import to_dict
from looplm.config import CheckpointConfig, RunConfig
from looplm.failures import NumericalFailure, StorageFailure
from looplm.megatron import process_groups


class Saver:
    """Writer of a run's checkpoints to ``output_dir/checkpoints``. Every method is collective.

    A context manager: at the end it waits for the checkpoint in the making, or gives it up after an exception.

    Build it before the model: it forks a process, which keeps whatever memory is in use at that moment.

    Args:
        config: the run's.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._say: Callable[[str], None] = print
        self._folder = step_folder.of_run(config.output_dir)
        self._whole = set[str]()
        self._saving: Saving | None = None
        try:
            self._writer, failure = Writer(), None
        except OSError as error:
            failure = StorageFailure(f"{self._folder}: no process can be started that writes checkpoints ({error})")
        process_groups.share_failure(failure)

    def attached(self, resumed: About | None, say: Callable[[str], None]) -> "Saver":
        """Return this, to enter before the first step. Collective.

        Older checkpoints than the resumed one count as whole if their files have their sizes. Otherwise none would ever
        be deleted by a run whose starts save fewer than ``checkpoint.keep`` each.

        Args:
            resumed: the checkpoint that the run continues, which has been verified.
            say: prints a line for each checkpoint that is published.
        """
        self._say = say
        if resumed is not None:
            keep, healthy = self._config.checkpoint.keep, resumed.healthy_step
            find = partial(step_folder.whole_up_to, self._folder, resumed.step, keep, healthy)
            self._whole.update(process_groups.on_rank_0(find))
        return self

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, NumericalFailure):  # all ranks raise it, and what was saved is healthy
            self.close()
        elif self._saving is not None:
            self._saving.abort()
        self._writer.end()

    def save(self, training: TrainingState, about: About, tokenizer: bytes) -> None:
        """Begin a checkpoint, after the one before is published. The state must not change before :meth:`settle`.

        ``tokenizer`` is the content of tokenizer.json.

        While steps are skipped or losses are above the limit of a spike, the newest checkpoint before them stays.

        Raises:
            StorageFailure: this or the earlier checkpoint cannot be written; on every rank.
        """
        self.close()
        final = self._folder / step_folder.step_name(about.step)
        whole = frozenset(self._whole | {final.name})
        after = partial(_tidy, final, self._config.checkpoint, whole, about.healthy_step)
        companions = Path(self._config.output_dir) / COMPANION_FOLDER
        state = sharded_state(training)
        config = to_dict(self._config)
        self._saving = Saving(final, state, config, about, tokenizer, companions, after, self._writer, True)
        if not self._config.checkpoint.in_background:
            self.close()

    def poll(self) -> None:
        """Look after the checkpoint in the making. Call it after each step; it does not wait for the disk.

        Without one it returns at once, and the ranks exchange nothing.

        Raises:
            StorageFailure: the checkpoint could not be written; on every rank.
        """
        if self._saving is not None and self._saving.advance():
            self._published(self._saving.final)

    def settle(self) -> None:
        """Return once the state of the checkpoint in the making is copied; then training may change it."""
        if self._saving is not None:
            self._saving.settle()

    def close(self) -> None:
        """Wait until the checkpoint in the making is published; raise as :meth:`poll` does."""
        if self._saving is not None:
            self._saving.wait()
            self._published(self._saving.final)

    def forget_after(self, final: Path) -> None:
        """Delete all later checkpoints than ``final``, to which the run returns; collective."""
        self.close()
        self._whole = {name for name in self._whole if name < final.name} | {final.name}
        process_groups.on_rank_0(lambda: step_folder.delete_after(final))

    def _published(self, final: Path) -> None:
        self._saving = None
        self._whole.add(final.name)
        self._say(f"saved {final}")


def _tidy(final: Path, config: CheckpointConfig, whole: frozenset[str], healthy: int) -> None:
    """Point ``latest`` at a new checkpoint, and delete old ones."""
    step_folder.note_latest(final)
    step_folder.delete_old(final.parent, config.keep, config.keep_every, whole, healthy)
