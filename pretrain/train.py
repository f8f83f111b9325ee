"""Pretrain a looped model, or fine-tune its exit gate on a frozen trunk.

    python -m pretrain.train --config configs/quickstart/pretrain.yaml --optim.train_steps 100
    torchrun --nproc-per-node 8 -m pretrain.train --config A.yaml --config B.yaml --output_dir runs/a

A run is one training stage. The configuration says what it minimizes, what it reads and what it starts from.
"""

import shutil
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils.data import Dataset

from looplm import chat, checkpoint
from looplm.checkpoint import COMPANION_FOLDER, step_folder
from looplm.cli import parse_config, run_main, to_dict
from looplm.config import RunConfig
from looplm.files import write_whole
from looplm.megatron import process_groups
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from pretrain.data import (
    BatchSchedule,
    Corpus,
    build_train_set,
    build_valid_set,
    check_corpus,
    index_cache,
    micro_batches,
)
from pretrain.metrics import RunLog
from pretrain.optim import DTYPES
from pretrain.progress import Progress, describe, refuse_other_data
from pretrain.step import StepStats
from pretrain.trainer import Trainer

STOPPED = 128 + signal.SIGTERM  # exit status of a run that a signal ended, as a shell reports it


def main(argv: list[str]) -> None:
    """``python -m pretrain.train --config A.yaml [--config B.yaml] [--model.num_loops 4 ...]``"""
    config = parse_config(RunConfig, argv, prog="python -m pretrain.train", description=str(__doc__))
    corpus = check_corpus(config.data, config.model.vocab_size)
    groups = process_groups.start(config.seed, config.parallel)
    try:
        finished = train(config, corpus, groups)
    finally:
        process_groups.stop()
    if not finished:
        sys.exit(STOPPED)


def train(config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection) -> bool:
    """Build everything, then loop. Return False if a signal ended the run before its last step; it can be resumed."""
    schedule = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline)
    folder, checkpoints = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
    trainer, initial = build(config, groups)
    resumed = checkpoint.resume(checkpoints, trainer.state, config, print) if config.checkpoint.resume else None
    initial_about = None if initial is None else checkpoint.read_about(initial)
    refuse_other_data(config, corpus, resumed, initial_about)

    data, total_steps = config.data, config.optim.train_steps
    total_samples = schedule.samples_of(total_steps)
    progress = Progress.start(config, total_samples, resumed, initial_about)
    train_set = build_train_set(config, corpus, total_samples, progress.horizon_samples)
    valid_set = build_valid_set(data, corpus, config.logging.eval_samples, config.seed, index_cache(config))
    batches = micro_batches(train_set, data, progress.samples, groups.dp.rank(), groups.dp.size())

    if process_groups.is_rank_0():
        write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        _copy_companions(initial, folder)
        if corpus.end_id is not None:  # an export then says how to talk to the model
            write_whole(folder / COMPANION_FOLDER / chat.TEMPLATE_FILE, chat.JINJA)
    log = RunLog(config, progress)
    for line in corpus.left_out:
        log.say(line)
    log.say(f"{folder}: {'resuming after' if resumed else 'starting at'} step {progress.step} of {total_steps}")
    if config.engine.emulated:
        log.say(
            f"EMULATED: engine.fp8={config.engine.fp8}. Linear layers round their operands and multiply in fp32; "
            "losses are meaningful, speed and memory are not"
        )
    with StopRequest() as stop:
        while progress.step < total_steps:
            num_microbatches, batch_size = schedule.at(progress.samples)
            stats, grad_norm, learning_rate = trainer.train(batches, num_microbatches)
            progress = progress.advance(batch_size, data.seq_length)
            log.train(progress, stats, grad_norm, learning_rate)

            last = progress.step == total_steps or stop.requested()
            if valid_set is not None and _due(progress.step, config.logging.eval_every, last):
                log.valid(progress, validate(trainer, valid_set, config, groups))
            if _due(progress.step, config.checkpoint.save_every, last):
                about, keep = describe(config, corpus, progress), config.checkpoint.keep
                saved = checkpoint.save(
                    checkpoints, trainer.state, config, about, corpus.tokenizer_file, keep, folder / COMPANION_FOLDER
                )
                log.say(f"step {progress.step}/{total_steps}  saved {saved}")
                log.restart_clock()
            if last:
                break
    log.close()
    return progress.step == total_steps


def validate(trainer: Trainer, valid_set: Dataset[Any], config: RunConfig, groups: ProcessGroupCollection) -> StepStats:
    """Return the statistics of ``logging.eval_samples`` validation sequences, the same ones every time."""
    rank, ranks = groups.dp.rank(), groups.dp.size()
    batches = micro_batches(valid_set, config.data, 0, rank, ranks)
    return trainer.evaluate(batches, max(1, config.logging.eval_samples // (config.data.micro_batch_size * ranks)))


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


class StopRequest:
    """While active, SIGTERM or Ctrl-C asks for a checkpoint and an orderly end after the current step."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:  # a second signal ends the run at once
            raise KeyboardInterrupt
        self._asked = True

    def requested(self) -> bool:
        """Return True if any rank received a signal; collective."""
        flag = torch.tensor([float(self._asked)], device=DEVICE)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _copy_companions(initial: Path | None, folder: Path) -> None:
    """Copy the companion files of the initial checkpoint into the run, unless the run already has some."""
    own = folder / COMPANION_FOLDER
    if initial is not None and (initial / COMPANION_FOLDER).is_dir() and not own.exists():
        shutil.copytree(initial / COMPANION_FOLDER, own)


if __name__ == "__main__":
    run_main(main)
