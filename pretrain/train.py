"""Pretrain a looped model, or fine-tune its exit gate on a frozen trunk.

    python -m pretrain.train --config configs/quickstart/pretrain.yaml --optim.train_steps 100
    torchrun --nproc-per-node 8 -m pretrain.train --config A.yaml --config B.yaml --output_dir runs/a

A run is one training stage. The configuration says what it minimizes, what it reads and what it starts from.
"""

import dataclasses
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.data import Dataset

from looplm import chat, checkpoint
from looplm.checkpoint import COMPANION_FOLDER, step_folder
from looplm.cli import parse_config, run_main, to_dict
from looplm.config import RunConfig
from looplm.files import write_whole, writing
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain import health, launcher, run_lock, spikes
from pretrain.data import (
    Batch,
    BatchSchedule,
    Corpus,
    build_train_set,
    build_valid_set,
    check_corpus,
    index_cache,
    micro_batches,
    schedule_on,
)
from pretrain.metrics import RunLog, last_validation
from pretrain.optim import DTYPES
from pretrain.progress import Progress, describe, refuse_other_data
from pretrain.step import StepStats
from pretrain.stopping import STOPPED, StopRequest
from pretrain.trainer import Trainer
from pretrain.watchdog import Watchdog


def main(argv: list[str]) -> None:
    """``python -m pretrain.train --config A.yaml [--config B.yaml] [--model.num_loops 4 ...]``"""
    with launcher.recorded():
        config = parse_config(RunConfig, argv, prog="python -m pretrain.train", description=str(__doc__))
        schedule_on(config, process_groups.expected_ranks())  # refuses an impossible layout before ranks connect
        with Watchdog(config.health, Path(config.output_dir)) as watchdog:
            watchdog.start_up("data check")
            corpus = check_corpus(config.data, config.model.vocab_size)
            watchdog.start_up("process groups")
            try:
                with watchdog.guard():  # it asks the process groups which ranks are late
                    groups = process_groups.start(config.seed, config.parallel, watchdog.collective_timeout)
                    watchdog.join(groups)
                    watchdog.start_up("output_dir")
                    with run_lock.hold(Path(config.output_dir), config.health.max_starts):
                        finished = train(config, corpus, groups, watchdog)
            finally:
                process_groups.stop()
        if not finished:
            sys.exit(STOPPED)


def train(config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, watchdog: Watchdog | None = None) -> bool:
    """Build everything, then loop. Return False if a signal ended the run before it was done; it can be resumed.

    Without ``watchdog``, nothing looks after signals and deadlines.
    """
    watchdog = watchdog or Watchdog(config.health, Path(config.output_dir))
    stop = watchdog.stop
    schedule = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline)
    folder, checkpoints = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
    checkpoint.prepare(config)
    watchdog.start_up("model")
    trainer, initial = build(config, groups)
    watchdog.start_up("checkpoint")
    resumed = checkpoint.resume(checkpoints, trainer.state, config, print) if config.checkpoint.resume else None
    initial_about = None if initial is None else checkpoint.read_about(initial)
    refuse_other_data(config, corpus, resumed, initial_about)

    watchdog.start_up("data index")
    data, total_steps = config.data, config.optim.train_steps
    total_samples = schedule.samples_of(total_steps)
    progress = Progress.start(config, total_samples, resumed, initial_about)
    batches = training_batches(config, corpus, groups, progress, total_samples)
    valid_set = build_valid_set(data, corpus, config.logging.eval_samples, config.seed, index_cache(config))
    if stop.agree():
        if process_groups.is_rank_0():
            print(f"stopped before the first step by {stop.asked}; nothing was written", file=sys.stderr)
        return False
    # A run that was stopped in a validation has saved that step.
    owes_validation = _due(progress.step, config.logging.eval_every, progress.step == total_steps) and (
        process_groups.on_rank_0(lambda: last_validation(folder / "metrics.jsonl")) < progress.step
    )

    process_groups.on_rank_0(lambda: _write_description(config, corpus, initial))
    log = RunLog(config, progress)
    for line in corpus.left_out:
        log.say(line)
    log.say(f"{folder}: {'resuming after' if resumed else 'starting at'} step {progress.step} of {total_steps}")
    if config.engine.emulated:
        log.say(
            f"EMULATED: engine.fp8={config.engine.fp8}. Linear layers round their operands and multiply in fp32; "
            "losses are meaningful, speed and memory are not"
        )
    log.say(watchdog.started())
    for line in launcher.describe_signals(config.health.stop_timeout):
        log.say(line)

    with checkpoint.Saver(config, resumed, log.say) as saver:
        if owes_validation and resumed is not None and valid_set is not None:
            watchdog.enter(f"validation after step {progress.step}")
            validate(trainer, valid_set, config, groups, stop, partial(log.valid, progress), log.say)
        while progress.step < total_steps and not stop.asked:
            watchdog.enter(f"step {progress.step + 1}")
            num_microbatches, batch_size = schedule.at(progress.samples)
            first = progress.position
            done = trainer.train(batches, num_microbatches)
            state = health.count(progress.health, done, config.health)
            progress = progress.advance(batch_size, data.seq_length, state)
            log.train(progress, done)
            saver.poll(log.failure)
            if not done.healthy:
                samples = (first, first + batch_size)
                bad = health.examine(trainer, done, progress.step, samples, data.micro_batch_size)
                log.skipped(bad)
                keep_weights = partial(save_weights, config, corpus, trainer, progress)
                health.report(bad, state, config, keep_weights, log.say)
            if spike := spikes.find(progress, done.stats.loss, config.health):
                if config.health.max_rollbacks:
                    watchdog.enter(f"rollback after step {progress.step}")
                    progress = spikes.roll_back(spike, progress, config, trainer.state, saver, log.say)
                    log.roll_back(progress, spike)
                    batches = training_batches(config, corpus, groups, progress, total_samples)
                    continue
                log.spike(spike)
                progress = dataclasses.replace(progress, health=spikes.accept(progress.health))

            last = progress.step == total_steps
            if not stop.agree() and valid_set is not None and _due(progress.step, config.logging.eval_every, last):
                watchdog.enter(f"validation after step {progress.step}")
                validate(trainer, valid_set, config, groups, stop, partial(log.valid, progress), log.say)
            if _due(progress.step, config.checkpoint.save_every, last or bool(stop.asked)):
                watchdog.enter(f"save of step {progress.step}")
                health.require_finite(trainer.state, progress.step)
                saver.save(trainer.state, describe(config, corpus, progress), corpus.tokenizer_file)
                stop.agree()
                log.restart_clock()
    if stop.asked:
        log.say(f"stopped after step {progress.step} by {stop.asked}; the same command continues")
    log.close()
    process_groups.share_failure(log.failure)
    return progress.step == total_steps and not stop.asked


def training_batches(
    config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, progress: Progress, total_samples: int
) -> Iterator[Batch]:
    """Return this rank's micro-batches from ``progress`` on. The whole run trains on ``total_samples`` samples."""
    skipped = progress.position - progress.samples
    train_set = build_train_set(config, corpus, total_samples + skipped, progress.horizon_samples)
    return micro_batches(train_set, config.data, progress.position, groups.dp.rank(), groups.dp.size())


def validate(
    trainer: Trainer,
    valid_set: Dataset[Any],
    config: RunConfig,
    groups: ProcessGroupCollection,
    stop: StopRequest,
    record: Callable[[StepStats], None],
    say: Callable[[str], None],
) -> None:
    """Record the statistics of ``logging.eval_samples`` validation sequences, the same ones every time."""
    rank, ranks = groups.dp.rank(), groups.dp.size()
    batches = micro_batches(valid_set, config.data, 0, rank, ranks)
    count = max(1, config.logging.eval_samples // (config.data.micro_batch_size * ranks))
    stats = trainer.evaluate_until(stop.agree, batches, count)
    if stats is None:
        say(f"validation cut short by {stop.asked}; it is repeated when the run continues")
    else:
        record(stats)


def save_weights(config: RunConfig, corpus: Corpus, trainer: Trainer, progress: Progress, folder: Path) -> None:
    """Write the weights alone to ``folder``, outside the run's checkpoints; collective."""
    about = dataclasses.replace(describe(config, corpus, progress), objective=checkpoint.WEIGHTS_ONLY)
    companions = Path(config.output_dir) / COMPANION_FOLDER
    checkpoint.save_weights(folder, trainer.model, config.gate, about, corpus.tokenizer_file, companions)


def build(config: RunConfig, groups: ProcessGroupCollection) -> tuple[Trainer, Path | None]:
    """Return the trainer, and the checkpoint from which weights (optionally also Adam's moments) were loaded."""
    dtype = DTYPES[config.optim.precision]
    model = LoopLM(config.model, config.gate, groups, dtype, config.parallel, engine=config.engine)
    initial = None if config.checkpoint.initial is None else step_folder.locate(config.checkpoint.initial)
    if initial is not None:
        checkpoint.load_weights(initial, model, config.gate)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    if initial is not None and config.checkpoint.initial_optimizer:
        checkpoint.load_optimizer(initial, trainer.state, config)
    return trainer, initial


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _write_description(config: RunConfig, corpus: Corpus, initial: Path | None) -> None:
    """Write the configuration and the companion files of a run."""
    folder = Path(config.output_dir)
    write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    with writing(folder / COMPANION_FOLDER):
        _copy_companions(initial, folder)
    if corpus.end_id is not None:  # an export then says how to talk to the model
        write_whole(folder / COMPANION_FOLDER / chat.TEMPLATE_FILE, chat.JINJA)


def _copy_companions(initial: Path | None, folder: Path) -> None:
    """Copy the companion files of the initial checkpoint into the run, unless the run already has some."""
    own = folder / COMPANION_FOLDER
    if initial is not None and (initial / COMPANION_FOLDER).is_dir() and not own.exists():
        shutil.copytree(initial / COMPANION_FOLDER, own)


if __name__ == "__main__":
    run_main(main)
