"""Fabricated experiments and records of runs."""

from typing import Any

from tools.experiments.experiment import Decides, Experiment, Pair
from tools.experiments.rows import Row

# Accuracy of each arm for seeds 0 to 4; by hand, so that tests know what a page must say.
ACCURACY = {
    "once": (0.345, 0.343, 0.346, 0.351, 0.340),
    "looped": (0.655, 0.723, 0.664, 0.690, 0.671),
    "deep": (0.627, 0.660, 0.691, 0.702, 0.650),
}
SIZES = {"once": (50_432, 3.0e5), "looped": (50_432, 2.4e6), "deep": (402_112, 2.4e6)}  # parameters, FLOPs a token
LEVELS = (4.0, 8.0, 12.0, 16.0)


def a_row(**values: Any) -> Row:
    """Return a final run of the arm "looped" with ``values`` in place of its own."""
    arm = values.get("arm", "looped")
    parameters, flops = SIZES.get(arm, (50_432, 2.4e6))
    default: dict[str, Any] = {
        "arm": arm,
        "seed": 0,
        "trial": "final",
        "lr": 1e-3,
        "parameters": parameters,
        "flops_per_token": flops,
        "steps": 1500,
        "tokens": 3_072_000,
        "seconds": 390.0,
        "machine": "2 cores, x86_64",
        "commit": "0123456",
        "figures": {"test.accuracy": 0.5},
        "settings": "89abcdef",
    }
    return Row(**{**default, **values})


def some_rows() -> list[Row]:
    """Return a sweep of three rates and five seeds for each arm; "deep" has no seed 4, and one curve per run."""
    rows = list[Row]()
    for arm, accuracies in ACCURACY.items():
        for lr in (3e-4, 1e-3, 3e-3):
            loss = 1.0 + abs(lr - 1e-3) * 100
            rows.append(a_row(arm=arm, trial="sweep", seed=100, lr=lr, figures={"valid.loss": loss}, seconds=60.0))
        for seed, accuracy in enumerate(accuracies):
            figures = {"test.accuracy": accuracy, "longer.accuracy": accuracy / 2}
            levels = tuple(min(1.0, accuracy * 8 / level) for level in LEVELS)
            depths = tuple(accuracy * (r + 1) / 8 for r in range(8))
            curves = {"test.levels": LEVELS, "test.accuracy by level": levels, "test.accuracy by depth": depths}
            if (arm, seed) != ("deep", 4):
                rows.append(a_row(arm=arm, seed=seed, figures=figures, curves=curves))
    return rows


def an_experiment(**values: Any) -> Experiment:
    """Return an experiment over the arms of :func:`some_rows` with ``values`` in place of its own."""
    default: dict[str, Any] = {
        "question": "Is one layer looped eight times better than the same layer once?",
        "decides": Decides(figure="test.accuracy", better="looped", than="once", margin=0.05),
        "pairs": (
            Pair(better="looped", than="once", matched="parameters"),
            Pair(better="looped", than="deep", matched="flops"),
        ),
        "figures": ("test.accuracy", "longer.accuracy"),
    }
    return Experiment(**{**default, **values})
