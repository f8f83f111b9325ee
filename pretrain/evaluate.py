"""Measure a checkpoint at every depth, beyond the trained one too, and along the exit gate's thresholds; with --kv_caches
also as it generates, token by token through each cache.

Prints a table and writes it as JSON. Validation data are the checkpoint's own (data.valid) unless others are named.
"""

import json
import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tqdm import tqdm

from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import DataConfig, DataSource, LossConfig, OptimConfig, RunConfig
from looplm.evaluation.cached import decoding_report, texts_of
from looplm.evaluation.depth import DepthMeter
from looplm.files import write_whole
from looplm.inference.early_exit import ExitRule, ExitSignal
from looplm.inference.kv_cache import CacheMode
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.data import Batch, build_valid_set, check_corpus, index_cache, micro_batches
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
        seq_length: tokens of a sequence; null takes the training's, or of weights that no run has made at most 1024.
        output: JSON file to write; null writes CHECKPOINT/evaluation.json.
        kv_caches: caches to decode the same samples through, separated by commas: per_loop, last, mean, first; none if
            empty.
        exit_thresholds: with kv_caches: thresholds to decode at; 1 is full depth.
        exit_signal: with kv_caches: the score that is held against the thresholds.
        prompt_tokens: with kv_caches: tokens of each text that are read as a prompt; those after them are measured.
    """

    checkpoint: str
    depths: str = "1,2,3,4,6,8"
    samples: int = 64
    batch_size: int = 4
    valid: str | None = None
    seq_length: int | None = None
    output: str | None = None
    kv_caches: str = ""
    exit_thresholds: str = "1"
    exit_signal: ExitSignal = "gate"
    prompt_tokens: int = 32

    def __post_init__(self) -> None:
        require(self.samples > 0, "samples", self.samples, "give a number above 0")
        require(self.batch_size > 0, "batch_size", self.batch_size, "give a number above 0")
        require(self.seq_length is None or self.seq_length > 0, "seq_length", self.seq_length, "give null or a number above 0")  # fmt: skip
        require(bool(self.depth_list), "depths", self.depths, "give whole numbers above 0, such as 1,2,4,8")
        modes = set(get_args(CacheMode))
        require(modes.issuperset(self.cache_list), "kv_caches", self.kv_caches, "give some of per_loop,last,mean,first")
        require(bool(self.threshold_list), "exit_thresholds", self.exit_thresholds, "give numbers from 0 to 1, such as 0.5,0.9,1")  # fmt: skip
        require(self.prompt_tokens > 0, "prompt_tokens", self.prompt_tokens, "give a number above 0")

    @property
    def depth_list(self) -> list[int]:
        """Depths in rising order; empty when they cannot be read."""
        parts = [part.strip() for part in self.depths.split(",")]
        return sorted({int(part) for part in parts}) if all(part.isdigit() and int(part) > 0 for part in parts) else []

    @property
    def cache_list(self) -> list[str]:
        """Caches in the order given."""
        return [part.strip() for part in self.kv_caches.split(",") if part.strip()]

    @property
    def threshold_list(self) -> list[float]:
        """Thresholds in the order given; empty when they cannot be read."""
        try:
            values = [float(part) for part in self.exit_thresholds.split(",")]
        except ValueError:
            return []
        return values if all(0 <= value <= 1 for value in values) else []


def main(argv: list[str]) -> None:
    """``python -m pretrain.evaluate --checkpoint DIR --depths 1,2,3,4,6,8``"""
    config = parse_config(EvaluateConfig, argv, prog="python -m pretrain.evaluate", description=str(__doc__))
    found = step_folder.locate(config.checkpoint)
    run = _validation_run(config, found)
    corpus, about = check_corpus(run.data, run.model.vocab_size), checkpoint.read_about(found)
    _check_decoding(config, run, about.gate_trained)
    if corpus.tokenizer_sha256 != about.tokenizer_sha256:
        raise UserError(
            f"{run.data.valid[0].prefix}: made with another tokenizer than {found}; use {found}/tokenizer.json"
        )
    groups = process_groups.start(run.seed)
    try:
        opened = checkpoint.open_model(str(found), groups)
        valid_set = build_valid_set(run.data, corpus, run.logging.eval_samples, run.seed, index_cache(run))
        assert valid_set is not None  # _validation_run saw to it
        count = -(-config.samples // (config.batch_size * groups.dp.size()))
        batches = list(islice(micro_batches(valid_set, run.data, 0, groups.dp.rank(), groups.dp.size()), count))
        report = {"checkpoint": str(found), "step": opened.about.step}
        report |= measure(opened.model, batches, config, groups, run.loss)
        if config.cache_list:
            report["decoding"] = measure_decoding(opened.model, batches, config, groups)
    finally:
        process_groups.stop()
    if process_groups.is_rank_0():
        _show(report)
        write_whole(
            Path(config.output or Path(config.checkpoint) / "evaluation.json"), json.dumps(report, indent=1) + "\n"
        )


def _validation_run(config: EvaluateConfig, found: Path) -> RunConfig:
    """The run that made the checkpoint, or a plain one of its shape, reading ``samples`` validation sequences."""
    trained, shape = checkpoint.read_config(found), checkpoint.read_model(found)
    valid = (DataSource(prefix=config.valid),) if config.valid else trained.data.valid if trained else ()
    if not valid:
        raise UserError("valid: the checkpoint was made without data.valid; name a prefix with --valid")
    if trained is None:
        plain = DataConfig(train=valid, seq_length=min(1024, shape.model.max_sequence_length))
        trained = RunConfig(output_dir=str(found), data=plain, optim=OptimConfig(train_steps=1), **shape._asdict())
    data = replace(trained.data, train=valid, valid=valid, micro_batch_size=config.batch_size, rampup=None,
                   global_batch_size=config.batch_size, seq_length=config.seq_length or trained.data.seq_length)  # fmt: skip
    samples = max(config.samples, config.batch_size)
    return replace(trained, data=data, logging=replace(trained.logging, eval_samples=samples))


@torch.no_grad()
def measure(
    model: LoopLM, batches: list[Batch], config: EvaluateConfig, groups: ProcessGroupCollection, loss: LossConfig
) -> dict[str, Any]:
    """Run every validation batch to the deepest depth asked for; see :class:`DepthMeter` for what comes back."""
    trained, depths = model.model_config.num_loops, config.depth_list
    deepest = max(trained, *depths)
    meter = DepthMeter(sorted({*depths, deepest}), trained, THRESHOLDS)
    for batch in tqdm(batches, unit="batch", disable=not (process_groups.is_rank_0() and sys.stderr.isatty())):
        meter.add(*loop_losses(model, batch, loss, num_loops=deepest), batch.mask_SB)
    report = meter.report(groups.dp)
    report["depths"] = [row for row in report["depths"] if row["depth"] in depths]
    return report


def measure_decoding(
    model: LoopLM, batches: list[Batch], config: EvaluateConfig, groups: ProcessGroupCollection
) -> list[dict[str, Any]]:
    """The same samples token by token, through each cache at each threshold."""
    texts = [text for batch in batches for text in texts_of(*batch)]
    rules = [
        ExitRule(max_depth=model.model_config.num_loops, threshold=threshold, signal=config.exit_signal)
        for threshold in config.threshold_list
    ]
    modes = cast(list[CacheMode], config.cache_list)
    return decoding_report(model, texts, config.prompt_tokens, config.batch_size, modes, rules, groups.dp)


def _check_decoding(config: EvaluateConfig, run: RunConfig, gate_trained: bool) -> None:
    """What only the checkpoint can tell of the decoding that is asked for."""
    if not config.cache_list:
        return
    by_gate = config.exit_signal == "gate" and min(config.threshold_list) < 1
    require(gate_trained or not by_gate, "exit_thresholds", config.exit_thresholds, "this checkpoint's gate was never trained; run the gate stage, give 1, or another exit_signal")  # fmt: skip
    length = run.data.seq_length
    require(config.prompt_tokens < length, "prompt_tokens", config.prompt_tokens, f"samples have {length} tokens; leave some to measure")  # fmt: skip


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
    if "decoding" in report:
        print(f"{'cache':>10} {'loss':>9} {'perplexity':>11} {'threshold':>10} {'mean depth':>11}")
    for row in report.get("decoding", []):
        print(
            f"{row['kv_cache']:>10} {row['loss']:>9.4f} {row['perplexity']:>11.2f} {row['exit_threshold']:>10} "
            f"{row['mean_depth']:>11.2f}"
        )


if __name__ == "__main__":
    run_main(main)
