"""What FP8 costs in loss: a recipe trained with emulated FP8 and, beside it, with bf16, from the same seeds.

Every run is a training of its own (``engine.fp8=emulate-...``) and goes on where it stood if the command is repeated; the
table and ``study.json`` are written anew after each. A variant's cost is the difference to bf16 *of the same seed*.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from looplm.checkpoint import git_revision, versions
from looplm.cli import parse_config, require, run_main
from looplm.files import write_whole

# In the order in which they are worth knowing.
VARIANTS = {
    "bf16": ("emulate-bf16", "tensorwise"),
    "hybrid-tensorwise": ("emulate-hybrid", "tensorwise"),
    "e4m3-tensorwise": ("emulate-e4m3", "tensorwise"),
    "hybrid-delayed": ("emulate-hybrid", "delayed"),
    "e4m3-blockwise": ("emulate-e4m3", "blockwise"),
    "e4m3-mxfp8": ("emulate-e4m3", "mxfp8"),
}
BASELINE = "bf16"


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What is compared.

    Args:
        recipe: YAML file of the training, as for pretrain.train.
        output_dir: a folder per run, study.json and table.md go here.
        seeds: each variant is trained from each of these.
        variants: which, in this order; bf16, that all are compared with, among them.
    """

    recipe: str = "configs/quickstart/pretrain.yaml"
    output_dir: str = "runs/fp8_study"
    seeds: tuple[int, ...] = (1, 2, 3)
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        require(len(self.seeds) > 0, "seeds", list(self.seeds), "give at least one")
        for variant in self.variants:
            require(variant in VARIANTS, "variants", variant, f"choose from {', '.join(VARIANTS)}")
        require(BASELINE in self.variants, "variants", list(self.variants), f"{BASELINE} must be among them")


@dataclass(frozen=True)
class Run:
    """One training."""

    variant: str
    seed: int
    validation_loss: float  # of the last loop, at the end, in nats
    loss_per_loop: list[float]
    minutes: float


def main(argv: list[str]) -> None:
    """``python -m tools.fp8_study [--seeds [1,2,3]] [--variants [bf16,hybrid-tensorwise]]``"""
    config = parse_config(StudyConfig, argv, prog="python -m tools.fp8_study", description=str(__doc__))
    folder, runs = Path(config.output_dir), list[Run]()
    folder.mkdir(parents=True, exist_ok=True)
    for variant, seed in plan(config):
        run = result(folder, variant, seed) or train(config, folder, variant, seed)
        runs.append(run)
        report = {"recipe": config.recipe, "commit": git_revision(), "versions": versions(), "machine": machine()}
        write_whole(folder / "study.json", json.dumps(report | {"runs": [vars(run) for run in runs]}, indent=1))
        write_whole(folder / "table.md", table(runs))
        print(
            f"{variant:<18} seed {seed}  validation loss {run.validation_loss:.4f}  {run.minutes:.1f} min", flush=True
        )
    print(table(runs), end="")


def plan(config: StudyConfig) -> Iterator[tuple[str, int]]:
    """Variant and seed of each run: the baseline beside the first variant, seed by seed, then each other variant."""
    first = [variant for variant in config.variants if variant == BASELINE]
    others = [variant for variant in config.variants if variant != BASELINE]
    yield from ((variant, seed) for seed in config.seeds for variant in first + others[:1])
    yield from ((variant, seed) for variant in others[1:] for seed in config.seeds)


def train(config: StudyConfig, folder: Path, variant: str, seed: int) -> Run:
    """Train, or go on training, one variant from one seed."""
    fp8, recipe = VARIANTS[variant]
    own = folder / f"{variant}_seed{seed}"
    command = [sys.executable, "-m", "pretrain.train", "--config", config.recipe, "--output_dir", str(own)]
    command += ["--seed", str(seed), "--engine.fp8", fp8, "--engine.fp8_recipe", recipe, "--checkpoint.keep", "1"]
    own.mkdir(exist_ok=True)
    begin = time.monotonic()
    with (own / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"error: {variant}, seed {seed}, ended with status {code}; see {own / 'log.txt'}")
    write_whole(own / "minutes", f"{(time.monotonic() - begin) / 60:.2f}\n")
    run = result(folder, variant, seed)
    assert run is not None, f"{own}: no last validation; does the recipe have data.valid?"
    return run


def result(folder: Path, variant: str, seed: int) -> Run | None:
    """What a finished run has said; None of one that is not."""
    own = folder / f"{variant}_seed{seed}"
    if not (own / "minutes").exists():  # written last
        return None
    rows = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "valid"][-1]["loss_per_loop"]
    return Run(variant, seed, last[-1], last, float((own / "minutes").read_text()))


def table(runs: list[Run]) -> str:
    """A row per variant: validation loss by seed, and how far it lies from the baseline of the same seed."""
    seeds = sorted({run.seed for run in runs})
    loss = {(run.variant, run.seed): run.validation_loss for run in runs}
    lines = ["| linears | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | against bf16, mean and worst |"]
    lines.append("|" + "---|" * (len(seeds) + 3))
    for variant in dict.fromkeys(run.variant for run in runs):
        own = {seed: loss[variant, seed] for seed in seeds if (variant, seed) in loss}
        cells = [f"{own[seed]:.4f}" if seed in own else "" for seed in seeds]
        cost = [value / loss[BASELINE, seed] - 1 for seed, value in own.items() if (BASELINE, seed) in loss]
        against = "" if variant == BASELINE or not cost else f"{statistics.mean(cost):+.2%}, {max(cost, key=abs):+.2%}"
        lines.append(f"| {variant} | {' | '.join(cells)} | {statistics.mean(own.values()):.4f} | {against} |")
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """Where it ran."""
    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")}


if __name__ == "__main__":
    run_main(main)
