"""Measure what FP8 costs in loss: train a recipe with emulated FP8 and, for comparison, bf16, from the same seeds.

    python -m tools.fp8_study --seeds [1,2,3] --variants [bf16,hybrid-tensorwise]

Every run is a separate training (``engine.fp8=emulate-...``) and resumes if the command is repeated. The table and
``study.json`` are rewritten after each run. A variant's cost is the difference from bf16 *of the same seed*.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from looplm.bounds import check_bounds, non_empty, path_field, require
from looplm.cli import parse_config, run_main
from looplm.config import RunConfig
from looplm.yaml_text import read_yaml
from tools.studies.study import Study, markdown_table

# In order of interest.
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
    """The runs of the study.

    Args:
        recipe: YAML file of the training, as for pretrain.train.
        output_dir: folder for the runs, study.json and table.md.
        seeds: each variant is trained from each of these.
        variants: variants in order, including bf16, which the others are compared with.
    """

    recipe: str = path_field("configs/quickstart/pretrain.yaml")
    output_dir: str = path_field("runs/fp8_study")
    seeds: tuple[int, ...] = non_empty((1, 2, 3))
    variants: tuple[str, ...] = tuple(VARIANTS)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        for variant in self.variants:
            require(variant in VARIANTS, "variants", variant, f"choose from {', '.join(VARIANTS)}")
        require(BASELINE in self.variants, "variants", list(self.variants), f"{BASELINE} must be among them")


class Run(NamedTuple):
    """One finished training. Its validation loss is that of the last loop at the end, in nats per token.

    The minutes are those of its steps.
    """

    variant: str
    seed: int
    validation_loss: float
    loss_per_loop: list[float]
    minutes: float


def main(argv: list[str]) -> None:
    """``python -m tools.fp8_study [--seeds [1,2,3]] [--variants [bf16,hybrid-tensorwise]]``"""
    config = parse_config(StudyConfig, argv, prog="python -m tools.fp8_study", description=str(__doc__))
    recipe = parse_config(RunConfig, ["--config", config.recipe], prog="", description="")
    require(bool(recipe.data.valid), "recipe", config.recipe, "it validates nothing; give it data.valid")
    settings = {"recipe": config.recipe, "keys": read_yaml(config.recipe).values}
    study, runs = Study(Path(config.output_dir), settings, Run), list[Run]()
    for variant, seed in tqdm(list(plan(config)), unit="run", disable=None):
        name = f"{variant}_seed{seed}"
        run = study.earlier(name) or study.complete(name, train(config.recipe, study.folder / name, variant, seed))
        runs.append(run)
        study.write_report(runs, table(runs))
        line = f"{variant:<18} seed {seed}  validation loss {run.validation_loss:.4f}  {run.minutes:.1f} min"
        print(line, flush=True)
    print(table(runs), end="")


def plan(config: StudyConfig) -> Iterator[tuple[str, int]]:
    """Yield the baseline with the first variant, seed by seed, then each other variant."""
    baseline = [variant for variant in config.variants if variant == BASELINE]
    others = [variant for variant in config.variants if variant != BASELINE]
    yield from ((variant, seed) for seed in config.seeds for variant in baseline + others[:1])
    yield from ((variant, seed) for variant in others[1:] for seed in config.seeds)


def train(recipe: str, folder: Path, variant: str, seed: int) -> Run:
    """Train one variant from one seed, or resume its training."""
    fp8, fp8_recipe = VARIANTS[variant]
    command = [sys.executable, "-m", "pretrain.train", "--config", recipe, "--output_dir", str(folder)]
    command += ["--seed", str(seed), "--engine.fp8", fp8, "--engine.fp8_recipe", fp8_recipe, "--checkpoint.keep", "1"]
    folder.mkdir(exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit(f"error: {variant}, seed {seed}, ended with status {code}; see {folder / 'log.txt'}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss_per_loop"] for row in rows if row["kind"] == "valid"]
    seconds = sum(row["seconds"] for row in rows if row["kind"] == "train")  # of every attempt
    return Run(variant, seed, losses[-1][-1], losses[-1], round(seconds / 60, 2))


def table(runs: list[Run]) -> str:
    """Return a row per variant: validation loss by seed, and its distance from the baseline of the same seed."""
    seeds = sorted({run.seed for run in runs})
    loss = {(run.variant, run.seed): run.validation_loss for run in runs}
    rows = []
    for variant in dict.fromkeys(run.variant for run in runs):
        own = {seed: loss[variant, seed] for seed in seeds if (variant, seed) in loss}
        cells = [f"{own[seed]:.4f}" if seed in own else "" for seed in seeds]
        cost = [value / loss[BASELINE, seed] - 1 for seed, value in own.items() if (BASELINE, seed) in loss]
        against = "" if variant == BASELINE or not cost else f"{statistics.mean(cost):+.2%}, {max(cost, key=abs):+.2%}"
        rows.append([variant, *cells, f"{statistics.mean(own.values()):.4f}", against])
    header = ["linears", *(f"seed {seed}" for seed in seeds), "mean", "against bf16, mean and worst"]
    return markdown_table(header, rows)


if __name__ == "__main__":
    run_main(main)
