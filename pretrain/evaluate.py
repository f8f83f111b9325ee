"""Measure a checkpoint at every depth, also beyond the trained one, and along the exit gate's thresholds.

    python -m pretrain.evaluate --checkpoint runs/quickstart/gate --depths 1,2,3,4,6,8
    python -m pretrain.evaluate --checkpoint runs/quickstart/gate --kv_caches per_loop,last --exit_thresholds 0.5,1

A synthetic task's answers are measured too, by depth and level. With --kv_caches also measure the checkpoint as it
generates, token by token through each cache. The results are printed as a table and written as JSON. The validation
data is the checkpoint's own (data.valid or data.task) unless --valid or --task names another; --output then names the
file. Megatron's sample indices are kept in the checkpoint's training directory, or beside the output if that directory
cannot be written.
"""

import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from tqdm import tqdm

from data_pipeline.synthetic.registry import open_task
from looplm import checkpoint
from looplm.bounds import require
from looplm.checkpoint import step_folder
from looplm.cli import parse_config, run_main
from looplm.config import LossConfig, RunConfig
from looplm.evaluation.answers import AnswerMeter
from looplm.evaluation.attention_sink import attention_sink
from looplm.evaluation.cached import cache_losses, texts_of
from looplm.evaluation.chains import voted_answers
from looplm.evaluation.depth import DepthMeter
from looplm.evaluation.dynamics import mean_over_ranks
from looplm.evaluation.latent_steps import watched_steps
from looplm.evaluation.readout import accuracies, fit_heads
from looplm.evaluation.record import FILE_NAME, CacheLoss, Evaluation, TaskAnswers
from looplm.evaluation.spectral_radius import spectral_radius
from looplm.failures import UserError
from looplm.inference.early_exit import ExitRule
from looplm.inference.kv_cache import CacheMode
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.data import Batch, build_valid_set, check_corpus, index_cache, micro_batches, valid_samples
from pretrain.evaluation_run import EvaluateConfig, check_exits, check_output, data_read, validation_run
from pretrain.step import loop_losses
from pretrain.task_data import TaskDataset

_FEW = 8  # samples whose loops' Jacobians are looked at
THRESHOLDS = [round(0.05 * step, 2) for step in range(1, 20)] + [0.975, 0.99, 1.0]


def main(argv: list[str]) -> None:
    """Run ``python -m pretrain.evaluate --checkpoint DIR --depths 1,2,3,4,6,8``."""
    config = parse_config(EvaluateConfig, argv, prog="python -m pretrain.evaluate", description=str(__doc__))
    check_output(config)
    step = step_folder.locate(config.checkpoint).resolve()
    folder = str(_index_folder(step, config.output))
    run = validation_run(config, checkpoint.read_config(step), checkpoint.read_model(step), folder)
    corpus, about = check_corpus(run.data, run.model.vocab_size), checkpoint.read_about(step)
    check_exits(config, about.gate_trained)
    if corpus.tokenizer.sha256 != about.tokenizer_sha256:
        if run.data.task is not None:
            raise UserError(
                f"task: {run.data.task.name} has other symbols than the task of {step}; give one with its own"
            )
        prefix = run.data.valid[0].prefix
        raise UserError(f"{prefix}: made with another tokenizer than {step}; use {step}/tokenizer.json")
    groups = process_groups.start(run.seed)
    try:
        rank, ranks = groups.dp.rank(), groups.dp.size()
        count, rest = divmod(config.samples, config.batch_size * ranks)
        fix = f"give a multiple of {config.batch_size * ranks}: {ranks} ranks read batch_size={config.batch_size} each"
        require(rest == 0, "samples", config.samples, fix)
        held = valid_samples(run.data, corpus)
        if held is not None and held < config.samples:
            unit, prefixes = config.batch_size * ranks, ", ".join(data_read(config, run))
            fix = f"{held} samples read all of {prefixes}, and {ranks} ranks read that many each; give fewer"
            require(held >= unit, "batch_size", config.batch_size, fix)
            count = held // unit
            if process_groups.is_rank_0():
                print(
                    f"samples: {config.samples} becomes {count * unit}, because {held} samples read all of {prefixes}"
                )
        opened = checkpoint.open_step(step, groups)
        samples = count * config.batch_size * ranks
        valid_set = build_valid_set(run.data, corpus, samples, run.seed, index_cache(run), config.split)
        assert valid_set is not None  # validation_run names data.valid
        batches = list(islice(micro_batches(valid_set, run.data, 0, rank, ranks), count))
        measured = measure(opened.model, batches, config.depth_list, groups, run.loss)
        decoding = _measure_decoding(opened.model, batches, config, groups) if config.cache_list else None
        answers = _measure_answers(opened.model, batches, config, run, groups) if run.data.task else None
        step_number = opened.about.step
        evaluation = replace(
            measured,
            checkpoint=str(step),
            step=step_number,
            data=data_read(config, run),
            decoding=decoding,
            answers=answers,
        )
        is_rank_0 = process_groups.is_rank_0()  # asked while there are ranks
    finally:
        process_groups.stop()
    if is_rank_0:
        _show(evaluation)
        evaluation.write(Path(config.output or Path(config.checkpoint) / FILE_NAME))


def _index_folder(step: Path, output: str | None) -> Path:
    """Return the training directory of a step, or else the step's own; beside the output if it cannot be written."""
    run = step.parent.parent
    own = run if step.parent == step_folder.of_run(run) else step
    return own if output is None or os.access(own, os.W_OK) else Path(output).parent


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
    ends = (place + 1 for text in texts for place, counts in enumerate(text.counts) if counts)
    last = torch.tensor(max(ends, default=0))
    dist.all_reduce(last, dist.ReduceOp.MAX, groups.dp)
    fix = f"no document has a token to measure behind its first {int(last)}; give fewer"
    require(config.prompt_tokens < int(last), "prompt_tokens", config.prompt_tokens, fix)
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
    highest = torch.stack([batch.level_SB.max() for batch in batches if batch.level_SB is not None]).max().cpu()
    dist.all_reduce(highest, dist.ReduceOp.MAX, groups.dp)  # other ranks read other samples
    meter = AnswerMeter(max(loops, trained), trained, int(highest) + 1, THRESHOLDS)
    for batch in batches:
        with watched_steps(model) as steps:
            output = model(batch.ids_BS, meter.loops)
        assert batch.level_SB is not None
        meter.add(output.hidden, model.head_weight(), output.gate_logit_RSB, batch.labels_SB, batch.level_SB, steps)
    first_BS = batches[0].ids_BS
    looks = attention_sink(model, first_BS, meter.loops), spectral_radius(model, first_BS[:_FEW], meter.loops)
    sink, radius = (mean_over_ranks(values, groups.dp) for values in looks)
    answers = replace(meter.answers(task.level_name, groups.dp), attention_sink=sink, loop_radius=radius)
    if config.vote_list:
        read = map(_labeled, batches)
        voted = voted_answers(model, read, config.vote_list, task.writes_chain, run.seed, groups.dp)
        answers = replace(answers, voted=voted)
    if not config.refit_steps:
        return answers
    train_set = TaskDataset(task, run.data.seq_length, "train", run.seed, 1 << 30)
    with torch.enable_grad():
        heads_RVD = fit_heads(
            model, map(_labeled, micro_batches(train_set, run.data, 0, 0, 1)), config.refit_steps, meter.loops
        )
    return replace(answers, refitted=accuracies(model, heads_RVD, map(_labeled, batches), groups.dp))


def _labeled(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, S], labels [S, B], and which of them count [S, B]."""
    return batch.ids_BS, batch.labels_SB, batch.mask_SB.bool()


def _show(evaluation: Evaluation) -> None:
    trained, read = evaluation.trained_loops, ", ".join(evaluation.data)
    print(f"{evaluation.checkpoint}: {evaluation.tokens:,} tokens of {read}, trained with {trained} loops")
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
        print(f"{'cache':>10} {'loss':>9} {'perplexity':>11} {'threshold':>10} {'mean depth':>11} {'tokens':>9}")
    for row in evaluation.decoding or ():
        figures = f"{row.loss:>9.4f} {row.perplexity:>11.2f} {row.exit_threshold:>10} {row.mean_depth:>11.2f}"
        print(f"{row.kv_cache:>10} {figures} {row.tokens:>9,}")


def _show_answers(answers: TaskAnswers) -> None:
    levels, shown = answers.levels, len(answers.levels.levels)
    print(f"{'depth':>10} {'right':>9} {'changed':>9}  right by {levels.name} {' '.join(map(str, levels.levels))}")
    for at in answers.depths:
        by_level = " ".join(f"{share:.2f}" for share in at.accuracy_by_level[:shown])
        print(f"{at.depth:>10} {at.accuracy:>9.4f} {at.answers_changed:>9.4f}  {by_level}")
    if levels.latent_steps:
        steps = " ".join(f"{steps:.2f}" for steps in levels.latent_steps)
        print(f"steps inside attention by {levels.name}: {steps}")
    if answers.loop_radius:
        print(f"spectral radius of each loop from the second on: {' '.join(f'{r:.2f}' for r in answers.loop_radius)}")
    if answers.refitted:
        print(f"right with a head fitted to each depth: {' '.join(f'{share:.4f}' for share in answers.refitted)}")
    for voted in answers.voted:
        print(f"last answer right, {voted.votes} of its own chains: {voted.solved:.4f}")


if __name__ == "__main__":
    run_main(main)
