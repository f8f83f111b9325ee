"""Measure a checkpoint at every depth, also beyond the trained one, and along the exit gate's thresholds.

    python -m pretrain.evaluate --checkpoint runs/quickstart/gate --depths 1,2,3,4,6,8
    python -m pretrain.evaluate --checkpoint runs/quickstart/gate --kv_caches per_loop,last --exit_thresholds 0.5,1

A synthetic task's answers are measured too, by depth and level. With --kv_caches also measure the checkpoint as it
generates, token by token through each cache. The results are printed as a table and written as JSON. The validation
data is the checkpoint's own (data.valid or data.task) unless --valid or --task names another.
"""

import sys
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from data_pipeline.synthetic.registry import open_task
from looplm import checkpoint
from looplm.bounds import at_least, check_bounds, path_field, positive
from looplm.checkpoint import step_folder
from looplm.cli import UserError, parse_config, require, run_main
from looplm.config import (
    DataConfig,
    DataSource,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TaskConfig,
)
from looplm.evaluation.answers import AnswerMeter
from looplm.evaluation.attention_sink import attention_sink
from looplm.evaluation.cached import cache_losses, texts_of
from looplm.evaluation.chains import voted_answers
from looplm.evaluation.depth import DepthMeter
from looplm.evaluation.dynamics import mean_over_ranks
from looplm.evaluation.readout import accuracies, fit_heads
from looplm.evaluation.record import FILE_NAME, CacheLoss, Evaluation, TaskAnswers
from looplm.evaluation.spectral_radius import spectral_radius
from looplm.inference.early_exit import ExitRule, ExitSignal, check_signal
from looplm.inference.kv_cache import CacheMode
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.data import Batch, build_valid_set, check_corpus, index_cache, micro_batches
from pretrain.step import loop_losses
from pretrain.task_data import TaskDataset

_FEW = 8  # samples whose loops' Jacobians are looked at
THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)] + [0.975, 0.99, 1.0]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Depths, thresholds, samples and caches to measure.

    Args:
        checkpoint: a training directory, or one step directory of it.
        depths: depths to report, separated by commas; they may exceed the trained number of loops.
        samples: validation sequences.
        batch_size: sequences in one forward pass.
        valid: prefix of validation data; null for the checkpoint's own.
        task: a synthetic task in place of the checkpoint's own, such as a harder one with the same symbols.
        split: of a task: valid, or test, which nothing else reads.
        refit_steps: of a task: also fit a head to the states of each depth, by that many steps; 0 fits none.
        votes: of a task: numbers of chains that the model writes for each last answer, separated by commas; the most
            frequent answer counts. 1 is the likeliest chain. Empty to write none.
        seq_length: tokens of a sequence; null for the training run's, or for imported weights at most 1024.
        output: JSON file to write; null for CHECKPOINT/evaluation.json.
        kv_caches: caches to decode the same samples through, separated by commas: per_loop, last, mean, first; empty to
            skip decoding.
        exit_thresholds: with kv_caches: thresholds to decode at; 1 is full depth.
        exit_signal: with kv_caches: the score that is compared with the thresholds.
        prompt_tokens: with kv_caches: tokens of each text that are read as a prompt; those after them are measured.
    """

    checkpoint: str = path_field()
    depths: str = "1,2,3,4,6,8"
    samples: int = positive(64)
    batch_size: int = positive(4)
    valid: str | None = path_field(None)
    task: TaskConfig | None = None
    split: Literal["valid", "test"] = "valid"
    refit_steps: int = at_least(0, 0)
    votes: str = ""
    seq_length: int | None = positive(None)
    output: str | None = path_field(None)
    kv_caches: str = ""
    exit_thresholds: str = "1"
    exit_signal: ExitSignal = "gate"
    prompt_tokens: int = positive(32)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        require(bool(self.depth_list), "depths", self.depths, "give whole numbers above 0, such as 1,2,4,8")
        modes = get_args(CacheMode)
        require(set(self.cache_list) <= set(modes), "kv_caches", self.kv_caches, f"give some of {','.join(modes)}")
        require(not self.votes or bool(self.vote_list), "votes", self.votes, "give whole numbers above 0, such as 1,8")
        fix = "give numbers from 0 to 1, such as 0.5,0.9,1"
        require(bool(self.threshold_list), "exit_thresholds", self.exit_thresholds, fix)

    @property
    def depth_list(self) -> list[int]:
        """Depths in ascending order; empty if they cannot be parsed."""
        return _counts(self.depths)

    @property
    def vote_list(self) -> list[int]:
        """Numbers of votes in ascending order; empty if none is asked for, or they cannot be parsed."""
        return _counts(self.votes)

    @property
    def cache_list(self) -> list[str]:
        """Caches in the order given."""
        return [part.strip() for part in self.kv_caches.split(",") if part.strip()]

    @property
    def threshold_list(self) -> list[float]:
        """Thresholds in the order given; empty if they cannot be parsed."""
        try:
            values = [float(part) for part in self.exit_thresholds.split(",")]
        except ValueError:
            return []
        return values if all(0 <= value <= 1 for value in values) else []


def _counts(text: str) -> list[int]:
    """Return numbers above 0 in ascending order; nothing if they cannot be parsed."""
    parts = [part.strip() for part in text.split(",")]
    return sorted({int(part) for part in parts}) if all(part.isdigit() and int(part) > 0 for part in parts) else []


def main(argv: list[str]) -> None:
    """Run ``python -m pretrain.evaluate --checkpoint DIR --depths 1,2,3,4,6,8``."""
    config = parse_config(EvaluateConfig, argv, prog="python -m pretrain.evaluate", description=str(__doc__))
    step = step_folder.locate(config.checkpoint)
    run = _validation_run(config, step)
    corpus, about = check_corpus(run.data, run.model.vocab_size), checkpoint.read_about(step)
    _check_decoding(config, run.model, run.data.seq_length, about.gate_trained)
    if corpus.tokenizer.sha256 != about.tokenizer_sha256:
        prefix = run.data.valid[0].prefix
        raise UserError(f"{prefix}: made with another tokenizer than {step}; use {step}/tokenizer.json")
    groups = process_groups.start(run.seed)
    try:
        opened = checkpoint.open_model(str(step), groups)
        samples, cache = run.logging.eval_samples, index_cache(run)
        valid_set = build_valid_set(run.data, corpus, samples, run.seed, cache, config.split)
        assert valid_set is not None  # _validation_run names data.valid
        count = -(-config.samples // (config.batch_size * groups.dp.size()))
        batches = list(islice(micro_batches(valid_set, run.data, 0, groups.dp.rank(), groups.dp.size()), count))
        measured = measure(opened.model, batches, config.depth_list, groups, run.loss)
        decoding = _measure_decoding(opened.model, batches, config, groups) if config.cache_list else None
        answers = _measure_answers(opened.model, batches, config, run, groups) if run.data.task else None
        step_number = opened.about.step
        evaluation = replace(measured, checkpoint=str(step), step=step_number, decoding=decoding, answers=answers)
        is_rank_0 = process_groups.is_rank_0()  # asked while there are ranks
    finally:
        process_groups.stop()
    if is_rank_0:
        _show(evaluation)
        evaluation.write(Path(config.output or Path(config.checkpoint) / FILE_NAME))


def _validation_run(config: EvaluateConfig, step: Path) -> RunConfig:
    """Return the run that made the checkpoint, or a plain one for imported weights, reading ``samples`` sequences."""
    trained, stored = checkpoint.read_config(step), checkpoint.read_model(step)
    task = config.task or (trained.data.task if trained and not config.valid else None)
    if task is not None:
        return _task_run(config, task, step)
    for key, value in (("split", config.split == "test"), ("refit_steps", config.refit_steps), ("votes", config.votes)):
        require(not value, key, getattr(config, key), "the checkpoint was trained on text; leave it out")
    valid = (DataSource(prefix=config.valid),) if config.valid else trained.data.valid if trained else ()
    if not valid:
        raise UserError("valid: the checkpoint was made without data.valid; name a prefix with --valid")
    if trained is None:
        plain = DataConfig(train=valid, seq_length=min(1024, stored.model.max_sequence_length))
        trained = RunConfig(output_dir=str(step), data=plain, optim=OptimConfig(train_steps=1), **stored._asdict())
    rows, seq_length = config.batch_size, config.seq_length or trained.data.seq_length
    data = replace(trained.data, train=valid, valid=valid, seq_length=seq_length)
    data = replace(data, micro_batch_size=rows, global_batch_size=rows, rampup=None)
    return replace(trained, data=data, logging=replace(trained.logging, eval_samples=max(config.samples, rows)))


def _task_run(config: EvaluateConfig, task: TaskConfig, step: Path) -> RunConfig:
    """Return a run that reads ``samples`` samples of a task."""
    trained, stored = checkpoint.read_config(step), checkpoint.read_model(step)
    rows, own = config.batch_size, trained.data.seq_length if trained else stored.model.max_sequence_length
    length = config.seq_length or own
    data = DataConfig(task=task, seq_length=length, micro_batch_size=rows, global_batch_size=rows)
    logging = LoggingConfig(eval_samples=max(config.samples, rows))
    optim, seed = OptimConfig(train_steps=1), trained.seed if trained else 0
    run = RunConfig(output_dir=str(step), data=data, optim=optim, logging=logging, seed=seed, **stored._asdict())
    if config.votes:
        some = TaskDataset(open_task(task), length, config.split, seed, rows).__getitems__(list(range(rows)))
        fix = "samples of this task have their labels at different positions, and so no last answer; leave it out"
        require(bool((some["loss_mask"] == some["loss_mask"][0]).all()), "votes", config.votes, fix)
    return run


def _check_decoding(config: EvaluateConfig, model: ModelConfig, seq_length: int, gate_trained: bool) -> None:
    """Raise if the checkpoint or its samples do not allow the decoding that is asked for."""
    if not config.cache_list:
        return
    check_signal(config.exit_signal, model)
    by_gate = config.exit_signal == "gate" and min(config.threshold_list) < 1
    fix = "this checkpoint's gate was never trained; run the gate stage, give 1, or another exit_signal"
    require(gate_trained or not by_gate, "exit_thresholds", config.exit_thresholds, fix)
    fix = f"samples have {seq_length} tokens; give fewer, so that some are left to measure"
    require(config.prompt_tokens < seq_length, "prompt_tokens", config.prompt_tokens, fix)


@torch.no_grad()
def measure(
    model: LoopLM, batches: list[Batch], depths: list[int], groups: ProcessGroupCollection, loss: LossConfig
) -> Evaluation:
    """Return the losses at ``depths`` and along :data:`THRESHOLDS`."""
    meter = DepthMeter(depths, model.model_config.num_loops, THRESHOLDS)
    for batch in tqdm(batches, unit="batch", disable=not (process_groups.is_rank_0() and sys.stderr.isatty())):
        losses = loop_losses(model, batch, loss, num_loops=meter.loops)
        meter.add(losses.token_loss_RSB, losses.gate_logit_RSB, batch.mask_SB)
    return meter.evaluation(groups.dp)


def _measure_decoding(
    model: LoopLM, batches: list[Batch], config: EvaluateConfig, groups: ProcessGroupCollection
) -> tuple[CacheLoss, ...]:
    """Return the losses of the same samples, decoded token by token through each cache at each threshold."""
    texts = [text for batch in batches for text in texts_of(*batch[:4])]
    rules = [
        ExitRule(max_depth=model.model_config.num_loops, threshold=threshold, signal=config.exit_signal)
        for threshold in config.threshold_list
    ]
    modes = cast(list[CacheMode], config.cache_list)
    return cache_losses(model, texts, config.prompt_tokens, config.batch_size, modes, rules, groups.dp)


@torch.no_grad()
def _measure_answers(
    model: LoopLM, batches: list[Batch], config: EvaluateConfig, run: RunConfig, groups: ProcessGroupCollection
) -> TaskAnswers:
    """Return the answers at every depth up to the largest, those of heads fitted to each, and those of votes."""
    assert run.data.task is not None
    task = open_task(run.data.task)
    loops, trained = max(config.depth_list), model.model_config.num_loops
    highest = max(int(batch.level_SB.max()) for batch in batches if batch.level_SB is not None)
    meter = AnswerMeter(max(loops, trained), trained, highest + 1, THRESHOLDS)
    for batch in batches:
        output = model(batch.ids_BS, meter.loops)
        assert batch.level_SB is not None
        meter.add(output.hidden, model.head_weight(), output.gate_logit_RSB, batch.labels_SB, batch.level_SB)
    first_BS = batches[0].ids_BS
    looks = attention_sink(model, first_BS, meter.loops), spectral_radius(model, first_BS[:_FEW], meter.loops)
    sink, radius = (mean_over_ranks(values, groups.dp) for values in looks)
    answers = replace(meter.answers(task.level_name, groups.dp), attention_sink=sink, loop_radius=radius)
    if config.vote_list:
        read = map(_states_read, batches)
        voted = voted_answers(model, read, config.vote_list, task.writes_chain, run.seed, groups.dp)
        answers = replace(answers, voted=voted)
    if not config.refit_steps:
        return answers
    train_set = TaskDataset(task, run.data.seq_length, "train", run.seed, 1 << 30)
    with torch.enable_grad():
        heads_RVD = fit_heads(
            model, map(_states_read, micro_batches(train_set, run.data, 0, 0, 1)), config.refit_steps, meter.loops
        )
    return replace(answers, refitted=accuracies(model, heads_RVD, map(_states_read, batches)))


def _states_read(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return batch.ids_BS, batch.labels_SB, batch.mask_SB.bool()


def _show(evaluation: Evaluation) -> None:
    trained = evaluation.trained_loops
    print(f"{evaluation.checkpoint}: {evaluation.tokens:,} validation tokens, trained with {trained} loops")
    print(f"{'depth':>10} {'loss':>9} {'perplexity':>11}")
    for at in evaluation.depths:
        mark = "" if at.depth <= trained else "  beyond training"
        print(f"{at.depth:>10} {at.loss:>9.4f} {at.perplexity:>11.2f}{mark}")
    print(f"{'threshold':>10} {'loss':>9} {'mean depth':>11}")
    for point in evaluation.exit_curve:
        print(f"{point.threshold:>10} {point.loss:>9.4f} {point.mean_depth:>11.2f}")
    if evaluation.answers is not None:
        _show_answers(evaluation.answers)
    if evaluation.decoding is not None:
        print(f"{'cache':>10} {'loss':>9} {'perplexity':>11} {'threshold':>10} {'mean depth':>11}")
    for row in evaluation.decoding or ():
        figures = f"{row.loss:>9.4f} {row.perplexity:>11.2f} {row.exit_threshold:>10} {row.mean_depth:>11.2f}"
        print(f"{row.kv_cache:>10} {figures}")


def _show_answers(answers: TaskAnswers) -> None:
    levels, shown = answers.levels, len(answers.levels.levels)
    print(f"{'depth':>10} {'right':>9} {'changed':>9}  right by {levels.name} {' '.join(map(str, levels.levels))}")
    for at in answers.depths:
        by_level = " ".join(f"{share:.2f}" for share in at.accuracy_by_level[:shown])
        print(f"{at.depth:>10} {at.accuracy:>9.4f} {at.answers_changed:>9.4f}  {by_level}")
    if answers.loop_radius:
        print(f"spectral radius of each loop from the second on: {' '.join(f'{r:.2f}' for r in answers.loop_radius)}")
    if answers.refitted:
        print(f"right with a head fitted to each depth: {' '.join(f'{share:.4f}' for share in answers.refitted)}")
    for voted in answers.voted:
        print(f"last answer right, {voted.votes} of its own chains: {voted.solved:.4f}")


if __name__ == "__main__":
    run_main(main)
