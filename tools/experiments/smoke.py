"""Run an experiment of each task with a tiny budget, up to its page: shows that tasks, runner and reports work.

    python -m tools.experiments.smoke --jobs 2

Nothing of it is kept unless --output_dir names a folder; the figures mean nothing.
"""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import yaml

from looplm.bounds import check_bounds, path_field, positive
from looplm.cli import from_dict, parse_config, run_main
from looplm.failures import UserError
from looplm.files import write_whole
from tools import experiment
from tools.experiments.runs import ExperimentConfig, merged

PROG = "python -m tools.experiments.smoke"
_STEPS, _ROWS = 2, 8


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """The experiments to run, and where.

    Args:
        experiments: folder of the experiments' YAML files.
        output_dir: folder for the tiny experiments, their runs and pages; null for one that is deleted at the end.
        jobs: runs side by side, each with one thread.
    """

    experiments: str = path_field("configs/experiments")
    output_dir: str | None = path_field(None)
    jobs: int = positive(2)

    def __post_init__(self) -> None:
        check_bounds(self, "")


def main(argv: list[str]) -> None:
    """``python -m tools.experiments.smoke --jobs 2``"""
    config = parse_config(SmokeConfig, argv, prog=PROG, description=str(__doc__))
    files = one_per_task(Path(config.experiments))
    with ExitStack() as stack:
        folder = Path(config.output_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        begin = time.monotonic()
        for number, path in enumerate(files):
            print(f"== {path.stem} ({number + 1} of {len(files)})")
            file = folder / path.name
            write_whole(file, yaml.safe_dump(shrunk(_read(path), whole=number == 0), sort_keys=False))
            places = ["--output_dir", str(folder / "runs"), "--evidence", str(folder / "evidence")]
            experiment.main(["run", str(file), *places, "--jobs", str(config.jobs)])
            experiment.main(["report", str(file), *places])
        print(f"{len(files)} experiments in {time.monotonic() - begin:.0f} s")


def one_per_task(folder: Path) -> list[Path]:
    """Return the first file of each task: a process takes seconds to start, and the others differ in settings only.

    Raises:
        UserError: the folder has no experiment on a task.
    """
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UserError(f"experiments: {folder} has no YAML file; name the folder of the experiments")
    first = dict[str, Path]()
    for path in files:
        config = _experiment(_read(path))
        for arm in config.live_arms:
            if (task := config.run_config(arm).data.task) is not None:
                first.setdefault(task.name, path)
    if not first:
        raise UserError(f"experiments: {folder} has no experiment on a task; name the folder of the experiments")
    return sorted(set(first.values()))


def shrunk(values: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    """Return an experiment that runs in seconds: the arms of the deciding comparison, with few steps and samples.

    Args:
        values: of the experiment's YAML file.
        whole: sweep two learning rates and run two seeds, so that every part of the runner and the page is used; else
            one rate and one seed.

    Raises:
        UserError: ``values`` are no experiment.
    """
    config = _experiment(values)
    arms = {name: values["arms"][name] for name in (config.decides.better, config.decides.than)}
    steps = _few_steps({name: config.run_config(name).optim.train_steps for name in arms})
    many = 2 if whole else 1
    rows = {"micro_batch_size": _ROWS, "global_batch_size": _ROWS}
    measure = {"samples": _ROWS, "batch_size": _ROWS, "refit_steps": min(1, config.measure.refit_steps)}
    return values | {
        "seeds": list(config.seeds[:many]),
        "sweep": {"rates": list(config.sweep.rates[:many]), "seeds": list(config.sweep.seeds[:1]), "steps": _STEPS},
        "retired": None,
        "pairs": [pair for pair in values["pairs"] if {pair["better"], pair["than"]} <= set(arms)],
        "base": merged(values["base"], {"data": rows, "checkpoint": {"save_every": _STEPS}}),
        "arms": {
            name: merged(arm, {"optim": {"train_steps": steps[name], "warmup_steps": 1}}) for name, arm in arms.items()
        },
        "measure": values.get("measure", {}) | measure,
    }


def _few_steps(steps: dict[str, int]) -> dict[str, int]:
    """Return few steps in the ratio of the arms' own, within 2.5 %: it may be what makes their FLOPs equal (3 %)."""
    least = min(steps.values())
    for fewest in range(_STEPS, least + 1):
        few = {name: round(count * fewest / least) for name, count in steps.items()}
        if all(isclose(few[name], count * fewest / least, rel_tol=0.025) for name, count in steps.items()):
            return few
    return steps


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a file that is an experiment."""
    parse_config(ExperimentConfig, ["--config", str(path)], prog=PROG, description=str(__doc__))
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _experiment(values: dict[str, Any]) -> ExperimentConfig:
    return from_dict(ExperimentConfig, values, where="experiment")


if __name__ == "__main__":
    run_main(main)
