"""Measure a checkpoint at every depth, beyond the trained one too, and along the exit gate's thresholds.

Prints a table and writes it as JSON. Validation data are the checkpoint's own (data.valid) unless others are named.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from looplm import checkpoint, parallel
from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import DataSource, LossConfig, RunConfig
from looplm.evaluation.depth import DepthMeter
from looplm.files import write_whole
from looplm.model import LoopLM
from pretrain.data import Batch, build_valid_set, check_corpus, micro_batches
from pretrain.step import loop_losses

THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)] + [0.975, 0.99, 1.0]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is measured.

    Args:
        checkpoint: a training directory, or one step directory of it.
        depths: depths to report, separated by commas; larger than the trained number of loops is allowed.
        samples: validation sequences.
        batch_size: sequences in one forward pass.
        valid: prefix of validation data; null takes the checkpoint's own.
        output: JSON file to write; null writes CHECKPOINT/evaluation.json.
    """

    checkpoint: str
    depths: str = "1,2,3,4,6,8"
    samples: int = 64
    batch_size: int = 4
    valid: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        require(self.samples > 0, "samples", self.samples, "give a number above 0")
        require(self.batch_size > 0, "batch_size", self.batch_size, "give a number above 0")
        require(bool(self.depth_list), "depths", self.depths, "give whole numbers above 0, such as 1,2,4,8")

    @property
    def depth_list(self) -> list[int]:
        """Depths in rising order; empty when they cannot be read."""
        parts = [part.strip() for part in self.depths.split(",")]
        return sorted({int(part) for part in parts}) if all(part.isdigit() and int(part) > 0 for part in parts) else []


def main(argv: list[str]) -> None:
    """``python -m pretrain.evaluate --checkpoint DIR --depths 1,2,3,4,6,8``"""
    config = parse_config(EvaluateConfig, argv, prog="python -m pretrain.evaluate", description=str(__doc__))
    found = checkpoint.locate(config.checkpoint)
    run = _validation_run(config, checkpoint.read_config(found))
    corpus = check_corpus(run)
    if corpus.tokenizer_sha256 != checkpoint.read_about(found).tokenizer_sha256:
        raise UserError(
            f"{run.data.valid[0].prefix}: made with another tokenizer than {found}; use {found}/tokenizer.json"
        )
    groups = parallel.start(run.seed)
    try:
        opened = checkpoint.open_model(str(found), groups)
        valid_set = build_valid_set(run, corpus)
        assert valid_set is not None  # _validation_run saw to it
        batches = micro_batches(valid_set, run.data, 0, groups.dp.rank(), groups.dp.size())
        report = {"checkpoint": str(found), "step": opened.step}
        report |= measure(opened.model, batches, config, groups, run.loss)
    finally:
        parallel.stop()
    if parallel.is_rank_0():
        _show(report)
        write_whole(
            Path(config.output or Path(config.checkpoint) / "evaluation.json"), json.dumps(report, indent=1) + "\n"
        )


def _validation_run(config: EvaluateConfig, trained: RunConfig) -> RunConfig:
    """The training configuration, reading ``samples`` validation sequences."""
    valid = (DataSource(prefix=config.valid),) if config.valid else trained.data.valid
    if not valid:
        raise UserError("valid: the checkpoint was trained without data.valid; name a prefix with --valid")
    data = replace(trained.data, train=valid, valid=valid, micro_batch_size=config.batch_size, rampup=None,
                   global_batch_size=config.batch_size)  # fmt: skip
    samples = max(config.samples, config.batch_size)
    return replace(trained, data=data, logging=replace(trained.logging, eval_samples=samples))


@torch.no_grad()
def measure(
    model: LoopLM, batches: Iterator[Batch], config: EvaluateConfig, groups: ProcessGroupCollection, loss: LossConfig
) -> dict[str, Any]:
    """Run every validation batch to the deepest depth asked for; see :class:`DepthMeter` for what comes back."""
    trained, depths = model.shape.num_loops, config.depth_list
    deepest = max(trained, *depths)
    meter = DepthMeter(sorted({*depths, deepest}), trained, THRESHOLDS)
    count = -(-config.samples // (config.batch_size * groups.dp.size()))
    for _ in tqdm(range(count), unit="batch", disable=not (parallel.is_rank_0() and sys.stderr.isatty())):
        batch = next(batches)
        meter.add(*loop_losses(model, batch, loss, num_loops=deepest), batch.mask_SB)
    report = meter.report(groups.dp)
    report["depths"] = [row for row in report["depths"] if row["depth"] in depths]
    return report


def _show(report: dict[str, Any]) -> None:
    print(
        f"{report['checkpoint']}: {report['tokens']:,} validation tokens, trained with {report['trained_loops']} loops"
    )
    print(f"{'depth':>10} {'loss':>9} {'perplexity':>11}")
    for row in report["depths"]:
        mark = "" if row["depth"] <= report["trained_loops"] else "  beyond training"
        print(f"{row['depth']:>10} {row['loss']:>9.4f} {row['perplexity']:>11.2f}{mark}")
    print(f"{'threshold':>10} {'loss':>9} {'mean depth':>11}")
    for row in report["exit_curve"]:
        print(f"{row['threshold']:>10} {row['loss']:>9.4f} {row['mean_depth']:>11.2f}")


if __name__ == "__main__":
    run_main(main)
