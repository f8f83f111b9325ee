"""Runs of eight steps in four layouts, which the fault tests hurt."""

from pathlib import Path
from typing import Any, NamedTuple

from looplm.config import RunConfig
from tests.support.tiny import run_config

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two replicas": (2, {"distributed_optimizer": True}),
    "tensor parallel": (2, {"tensor": 2}),
    "pipeline": (2, {"pipeline": 2}),
}
STEPS = 8


class Reference(NamedTuple):
    """An uninterrupted run."""

    config: RunConfig
    rows: list[tuple[str, ...]]
    samples: dict[int, list[int]]
    events: list[list[str]]  # of each rank


def config_of(layout: str, corpus: Path, folder: Path) -> RunConfig:
    """Return a run that saves every second step and validates every third."""
    return run_config(
        corpus,
        folder,
        optim={"train_steps": STEPS},
        parallel=LAYOUTS[layout][1],
        checkpoint={"save_every": 2, "keep": 9},
        logging={"eval_every": 3, "tensorboard": False},
    )
