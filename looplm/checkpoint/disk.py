"""The disk of a run's checkpoints: examined before the run, so that a full one is found before days of training."""

from math import lcm
from pathlib import Path

import looplm.checkpoint.step_folder as step_folder
from looplm.accounting import checkpoint_bytes
from looplm.config import RunConfig
from looplm.failures import StorageFailure, UserError
from looplm.files import free_bytes, write_whole
from looplm.megatron import process_groups


def prepare(config: RunConfig) -> None:
    """Clean up after a killed run, and refuse a disk that cannot hold the checkpoints of this one. Collective.

    Only for the one run that holds ``output_dir``.

    Raises:
        UserError: the disk cannot be written, or has too little room.
    """
    process_groups.on_rank_0(lambda: _prepare(config, step_folder.of_run(config.output_dir)))


def _prepare(config: RunConfig, folder: Path) -> None:
    try:
        if folder.is_dir():
            step_folder.recover(folder)
        absent = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        probe = folder / ".probe"
        write_whole(probe, "x" * 4096)  # also finds a disk without free inodes, or one that can only be read
        probe.unlink()
        for made in absent:  # a run that is refused later leaves no empty folders
            made.rmdir()
    except (StorageFailure, OSError) as error:
        raise UserError(f"output_dir: {error}") from error
    size = checkpoint_bytes(config.model, config.gate, config.optim.precision, config.loss.frozen_trunk)
    count = number_at_once(config)
    held = sum(path.stat().st_size for step in step_folder.steps_in(folder) for path in step_folder.files_in(step))
    needed, free = max(size, count * size - held), free_bytes(folder)
    keys = " and ".join(f"checkpoint.{name}={value}" for name, value in _retention(config).items() if value)
    if free < needed:
        raise UserError(
            f"output_dir: the disk of {folder} has {_size(free)} free, but this run needs {_size(needed)} more for "
            f"{count} checkpoints of {_size(size)} ({keys}, and one being written); free space, keep fewer or choose "
            "another disk"
        )


def number_at_once(config: RunConfig) -> int:
    """Return how many checkpoints a run needs room for: those that stay, and one that is written before one goes."""
    keep, every = _retention(config).values()
    save_every, steps = config.checkpoint.save_every or config.optim.train_steps, config.optim.train_steps
    permanent = steps // lcm(save_every, every) if every else 0
    return min(keep + permanent + 1, -(-steps // save_every))


def _retention(config: RunConfig) -> dict[str, int]:
    return {"keep": config.checkpoint.keep, "keep_every": config.checkpoint.keep_every}


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
