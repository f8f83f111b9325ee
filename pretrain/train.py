"""Pretrain a looped model, or fine-tune its exit gate on a frozen trunk.

One stage of training: what it minimises, reads and starts from are configuration (see ``--help``).
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
from looplm.checkpoint import COMPANIONS, About, Trained, step_folder
from looplm.cli import UserError, parse_config, run_main, to_dict
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
    data_order,
    micro_batches,
)
from pretrain.metrics import RunLog
from pretrain.optim import DTYPES, build_optimizer, build_scheduler, wrap_data_parallel
from pretrain.step import Stepper, StepStats

STOPPED = 128 + signal.SIGTERM  # exit status of a run that was asked to stop, as the shell gives it


def main(argv: list[str]) -> None:
    """``python -m pretrain.train --config A.yaml [--config B.yaml] [--model.num_loops 4 ...]``"""
    config = parse_config(RunConfig, argv, prog="python -m pretrain.train", description=str(__doc__))
    corpus = check_corpus(config)
    groups = process_groups.start(config.seed, config.parallel)
    try:
        finished = train(config, corpus, groups)
    finally:
        process_groups.stop()
    if not finished:
        sys.exit(STOPPED)


def train(config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection) -> bool:
    """Build everything, then loop. False when a signal ended it before the last step; it can then be resumed."""
    schedule = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline)
    folder, checkpoints = Path(config.output_dir), Path(config.output_dir) / "checkpoints"
    trained, stepper, initial = build(config, corpus, groups)
    done = checkpoint.resume(checkpoints, trained, config, print) if config.checkpoint.resume else None
    begun = None if initial is None else checkpoint.read_about(initial)
    refuse_other_data(done, begun, corpus, config)

    step, samples, tokens = (done.step, done.samples, done.tokens) if done else (0, 0, 0)
    taken_over = _optimizer_steps_taken_over(done, begun, config)
    total_samples = schedule.samples_of(config.optim.train_steps)
    horizon = done.horizon_samples if done else config.data.horizon_samples or total_samples
    train_set, valid_set = build_train_set(config, corpus, total_samples, horizon), build_valid_set(config, corpus)
    batches = micro_batches(train_set, config.data, samples, groups.dp.rank(), groups.dp.size())

    log = RunLog(config, folder, process_groups.is_rank_0(), step, tokens, dist.get_world_size())
    if process_groups.is_rank_0():
        write_whole(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
        _take_companions(initial, folder)
        if corpus.end_id is not None:  # an export tells how to talk to it
            write_whole(folder / COMPANIONS / chat.TEMPLATE_FILE, chat.JINJA)
    for line in corpus.left_out:
        log.say(line)
    log.say(f"{folder}: {'resuming after' if done else 'starting at'} step {step} of {config.optim.train_steps}")
    if config.engine.emulated:
        log.say(f"EMULATED: engine.fp8={config.engine.fp8}. Linears round their operands and multiply in fp32; only the loss means anything")  # fmt: skip
    with StopRequest() as stop:
        while step < config.optim.train_steps:
            num_microbatches, batch_size = schedule.at(samples)
            stats, grad_norm, learning_rate = stepper.train(batches, num_microbatches)
            step, samples, tokens = step + 1, samples + batch_size, tokens + batch_size * config.data.seq_length
            log.train(step, samples, tokens, stats, grad_norm, learning_rate)

            last = step == config.optim.train_steps or stop.requested()
            if valid_set is not None and _due(step, config.logging.eval_every, last):
                log.valid(step, validate(stepper, valid_set, config, groups))
            if _due(step, config.checkpoint.save_every, last):
                about = _about(config, corpus, step, samples, tokens, horizon, step + taken_over)
                saved = checkpoint.save(
                    checkpoints, trained, config, about, corpus.tokenizer, config.checkpoint.keep, folder / COMPANIONS
                )
                log.say(f"step {step}/{config.optim.train_steps}  saved {saved}")
                log.restart_clock()
            if last:
                break
    log.close()
    return step == config.optim.train_steps


def validate(stepper: Stepper, valid_set: Dataset[Any], config: RunConfig, groups: ProcessGroupCollection) -> StepStats:
    """``logging.eval_samples`` validation sequences, the same ones every time."""
    rank, ranks = groups.dp.rank(), groups.dp.size()
    batches = micro_batches(valid_set, config.data, 0, rank, ranks)
    return stepper.evaluate(batches, max(1, config.logging.eval_samples // (config.data.micro_batch_size * ranks)))


def build(config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection) -> tuple[Trained, Stepper, Path | None]:
    """Model, optimizer and schedule; and the step directory that weights, and at will moments, come from."""
    dtype = DTYPES[config.optim.precision]
    model = LoopLM(config.model, config.gate, groups, dtype, config.parallel, engine=config.engine)
    initial = None if config.checkpoint.initial is None else step_folder.locate(config.checkpoint.initial)
    if initial is not None:
        checkpoint.load_weights(initial, model, config.gate)
    ddp = wrap_data_parallel(model, config.loss, config.parallel)
    optimizer = build_optimizer(ddp, config.optim, config.parallel)
    scheduler = build_scheduler(optimizer, config.optim)
    data = config.data
    stepper = Stepper(ddp, optimizer, scheduler, config.loss, groups, data.seq_length, data.micro_batch_size)
    trained = Trained(model, optimizer, scheduler)
    if initial is not None and config.checkpoint.initial_optimizer:
        checkpoint.load_optimizer(initial, trained, config)
    return trained, stepper, initial


class StopRequest:
    """While active, SIGTERM or Ctrl-C asks for a checkpoint and an orderly end after the step that is running."""

    def __enter__(self) -> "StopRequest":
        self._asked = False
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked:  # a second one means now
            raise KeyboardInterrupt
        self._asked = True

    def requested(self) -> bool:
        """Whether any rank was asked; collective."""
        flag = torch.tensor([float(self._asked)], device=DEVICE)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def refuse_other_data(done: About | None, initial: About | None, corpus: Corpus, config: RunConfig) -> None:
    """Weights know one tokenizer; a resumed run knows one data set, in one order."""
    for about, where in ((initial, config.checkpoint.initial), (done, config.output_dir)):
        if about is not None and about.tokenizer_sha256 != corpus.tokenizer_sha256:
            raise UserError(
                f"{where}: trained with another tokenizer ({about.tokenizer_sha256[:12]}) than the data's "
                f"({corpus.tokenizer_sha256[:12]}); tokenise the data with {where}/…/tokenizer.json"
            )
    if done is not None and done.data_order != data_order(config, corpus):
        raise UserError(
            f"{config.output_dir}: was trained on other data, weights, data.seq_length or seed than given now; "
            "restore them, or give a new output_dir and name this one in checkpoint.initial"
        )


def _optimizer_steps_taken_over(done: About | None, initial: About | None, config: RunConfig) -> int:
    """Steps of other runs that Adam's moments are made of: its bias correction counts them too."""
    if done is not None:
        return done.steps_of_optimizer - done.step
    return initial.steps_of_optimizer if initial is not None and config.checkpoint.initial_optimizer else 0


def _take_companions(initial: Path | None, folder: Path) -> None:
    """What came with the weights that this stage starts from stays with it."""
    own = folder / COMPANIONS
    if initial is not None and (initial / COMPANIONS).is_dir() and not own.exists():
        shutil.copytree(initial / COMPANIONS, own)


def _about(
    config: RunConfig, corpus: Corpus, step: int, samples: int, tokens: int, horizon: int, optimizer_step: int
) -> About:
    return About(
        step=step,
        samples=samples,
        tokens=tokens,
        horizon_samples=horizon,
        objective=config.loss.objective,
        gate_trained=config.model.num_loops > 1,
        tokenizer_sha256=corpus.tokenizer_sha256,
        eos_id=corpus.stop_id,
        data_order=data_order(config, corpus),
        versions=checkpoint.versions(),
        git_revision=checkpoint.git_revision(),
        bos_id=corpus.bos_id,
        pad_id=corpus.pad_id,
        dtype=str(DTYPES[config.optim.precision]).removeprefix("torch."),
        optimizer_step=optimizer_step,
    )


if __name__ == "__main__":
    run_main(main)
