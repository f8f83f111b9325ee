"""A training run: its parts, and what it does in a step, a validation and a save."""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import yaml
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import checkpoint
from looplm.chat import TEMPLATE_FILE
from looplm.checkpoint import COMPANION_FOLDER, step_folder
from looplm.cli import to_dict
from looplm.config import RunConfig
from looplm.evaluation.dynamics import LoopDynamics, loop_dynamics
from looplm.files import write_whole, writing
from looplm.megatron import process_groups
from looplm.megatron.settings import DTYPES
from looplm.model import LoopLM
from pretrain import health, launcher, spikes
from pretrain.batch_schedule import BatchSchedule
from pretrain.data import Batch, Corpus, build_train_set, build_valid_set, index_cache, micro_batches, valid_samples
from pretrain.loops import loops_of_step
from pretrain.metrics import RunLog, last_validation
from pretrain.mix import describe_passes
from pretrain.progress import Progress, check_start, describe, own_steps
from pretrain.trainer import Step, Trainer
from pretrain.watchdog import Watchdog


class Run:
    """A training stage, from its first step or its newest checkpoint on. Every method is collective.

    Args:
        config: the run's.
        corpus: its checked data.
        groups: the process groups of its layout.
        watchdog: is told what the run is doing, and tells of signals.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, groups: ProcessGroupCollection, watchdog: Watchdog) -> None:
        self._config, self._corpus, self._groups = config, corpus, groups
        self._watchdog, self._stop = watchdog, watchdog.stop
        self._folder = Path(config.output_dir)
        self._schedule = BatchSchedule(config.data, groups.dp.size(), config.parallel.pipeline)
        checkpoint.prepare(config)
        self._saver = checkpoint.Saver(config)
        own = self._newest_checkpoint()
        watchdog.start_up("model")
        self._trainer, self._initial = build(config, groups, resumes=own is not None)
        watchdog.start_up("checkpoint")
        initial = None if self._initial is None else checkpoint.read_about(self._initial)
        self._resumed = None if own is None else checkpoint.resume(own, self._trainer.state, config)
        check_start(config, corpus, self._resumed, initial)
        watchdog.start_up("data index")
        self._progress = Progress.start(config, corpus, self._samples_of_the_run(), self._resumed, initial)
        self._batches = self._training_batches()
        self._valid_held = valid_samples(config.data, corpus)
        asked = config.logging.eval_samples
        self._validated = self._schedule.validation(asked, self._valid_held)  # micro-batches on each rank
        self._eval_samples = self._validated * config.data.micro_batch_size * groups.dp.size()
        self._valid_set = build_valid_set(config.data, corpus, self._eval_samples, config.seed, index_cache(config))

    def begin(self) -> bool:
        """Open the logs and say what begins. Return False if a signal came first; then nothing has been written."""
        if self._stop.agree():
            if process_groups.is_rank_0():
                print(f"stopped before the first step by {self._stop.asked}; nothing was written", file=sys.stderr)
            return False
        self._owes_validation = self._was_stopped_in_a_validation()
        process_groups.on_rank_0(self._write_description)
        self._log = RunLog(self._config, self._progress)
        for line in self._first_lines():
            self._log.say(line)
        return True

    def loop(self) -> bool:
        """Train up to the last step. Return False if a signal ended the run before; it can be resumed."""
        every = self._config.logging.eval_every, self._config.checkpoint.save_every
        with self._saver.attached(self._resumed, self._log.say):
            if self._owes_validation:
                self._validate()
            while not self._is_complete and not self._stop.asked:
                done = self._step()
                if not done.healthy:
                    self._report_skipped(done)
                if self._rolled_back(done):
                    continue
                validates, saves = map(self._is_due, every)
                if done.has_news or validates or saves:
                    self._hear_news()
                if validates and not self._stop.asked:
                    self._validate()
                if saves or self._stop.asked:
                    self._save()
        if self._stop.asked:
            self._log.say(f"stopped after step {self._progress.step} by {self._stop.asked}; the same command continues")
        self._log.close()
        process_groups.share_failure(self._log.failure)
        return self._is_complete and not self._stop.asked

    # ---- parts of the loop

    @property
    def _is_complete(self) -> bool:
        return self._progress.step == self._config.optim.train_steps

    def _is_due(self, every: int) -> bool:
        return self._is_complete or (every > 0 and self._progress.step % every == 0)

    def _step(self) -> Step:
        self._watchdog.enter(f"step {self._progress.step + 1}")
        num_microbatches, batch_size = self._schedule.at(self._progress.samples)
        self._samples = self._progress.position, self._progress.position + batch_size
        loops = loops_of_step(self._config, self._progress.step)
        done = self._trainer.train(self._batches, num_microbatches, self._saver.settle, self._has_news, loops)
        state = health.count(self._progress.health, done, self._config.health)
        self._progress = self._progress.advance(batch_size, self._config.data.seq_length, state)
        self._log.train(self._progress, done, loops)
        self._saver.poll()
        return done

    def _has_news(self) -> bool:
        """Return True if this rank has a signal or a failure to tell the others; not collective."""
        self._stop.poll()
        return self._stop.since is not None or self._log.failure is not None

    def _hear_news(self) -> None:
        """Agree on a signal, and raise a failure to write the log, on every rank."""
        process_groups.share_failure(self._log.failure)
        self._stop.agree()

    def _report_skipped(self, done: Step) -> None:
        """Write down a step without an update, and raise if there were too many."""
        micro_batch_size = self._config.data.micro_batch_size
        bad = health.examine(self._trainer, done, self._progress.step, self._samples, micro_batch_size)
        self._log.skipped(bad)
        health.report(bad, self._progress.health, self._config, self._save_weights, self._log.say)

    def _rolled_back(self, done: Step) -> bool:
        """Return to the last checkpoint before a loss spike that this step completes; return False without one."""
        spike = spikes.find(self._progress, done.stats.loss, self._config.health)
        if spike is None:
            return False
        if not self._config.health.max_rollbacks:
            self._log.spike(spike)
            self._progress = dataclasses.replace(self._progress, health=spikes.accept(self._progress.health))
            return False
        self._watchdog.enter(f"rollback after step {self._progress.step}")
        state, say = self._trainer.state, self._log.say
        self._progress = spikes.roll_back(spike, self._progress, self._config, state, self._saver, say)
        self._log.roll_back(self._progress, spike)
        self._batches = self._training_batches()
        return True

    def _validate(self) -> None:
        """Record the statistics of the validation samples, the same ones every time."""
        if self._valid_set is None:
            return
        self._watchdog.enter(f"validation after step {self._progress.step}")
        stats = self._trainer.evaluate_until(self._stop.agree, self._validation_batches(), self._validated)
        if stats is None:
            self._log.say(f"validation cut short by {self._stop.asked}; it is repeated when the run continues")
        else:
            self._log.valid(self._progress, stats, self._look_at_loops())

    def _look_at_loops(self) -> LoopDynamics | None:
        """Return what ``logging.dynamics_samples`` validation sequences show of the loops; None if it is 0."""
        samples, group = self._config.logging.dynamics_samples, self._groups.dp
        if not samples:
            return None
        own = max(1, samples // group.size())
        batches = islice(self._validation_batches(), -(-own // self._config.data.micro_batch_size))
        ids_BS = torch.cat([batch.ids_BS for batch in batches])
        return loop_dynamics(self._trainer.model, ids_BS[:own], group)

    def _validation_batches(self) -> Iterator[Batch]:
        """Return this rank's validation micro-batches, from the first on; the run has validation data.

        This process prepares them itself: processes for each validation would be forked in the middle of training, out
        of a process with many threads, whose locks may be held just then.
        """
        assert self._valid_set is not None
        rank, ranks = self._groups.dp.rank(), self._groups.dp.size()
        return micro_batches(self._valid_set, dataclasses.replace(self._config.data, num_workers=0), 0, rank, ranks)

    def _save(self) -> None:
        self._watchdog.enter(f"save of step {self._progress.step}")
        state, about = self._trainer.state, describe(self._config, self._corpus, self._progress)
        health.require_finite(state, self._progress.step)
        self._saver.save(state, about, self._corpus.tokenizer_json)
        self._stop.agree()
        self._log.restart_clock()

    def _save_weights(self, folder: Path) -> None:
        """Write the weights alone to ``folder``, outside the run's checkpoints."""
        about = describe(self._config, self._corpus, self._progress)
        about = dataclasses.replace(about, objective=checkpoint.WEIGHTS_ONLY)
        companions, tokenizer = self._folder / COMPANION_FOLDER, self._corpus.tokenizer_json
        checkpoint.save_weights(folder, self._trainer.state.model, self._config.gate, about, tokenizer, companions)

    # ---- parts of the start

    def _newest_checkpoint(self) -> Path | None:
        """Return the checkpoint from which the run resumes, if it has one.

        Raises:
            UserError: an earlier run's steps are here, and this one must not resume from them.
        """
        if self._config.checkpoint.resume:
            return step_folder.newest(step_folder.of_run(self._folder), print)
        process_groups.on_rank_0(lambda: own_steps(self._config))
        return None

    def _samples_of_the_run(self) -> int:
        """Return the samples up to the last step: those of a resumed run, and what the steps that are left consume."""
        steps = self._config.optim.train_steps
        if self._resumed is None:
            return self._schedule.samples_of(steps)
        return self._schedule.samples_of(steps - self._resumed.step, self._resumed.samples)

    def _training_batches(self) -> Iterator[Batch]:
        """Return this rank's micro-batches from the run's position on."""
        progress, rank, ranks = self._progress, self._groups.dp.rank(), self._groups.dp.size()
        steps, other = self._config.optim.train_steps - progress.step, progress.position - progress.samples
        total = self._schedule.samples_of(steps, progress.samples) + other  # a rollback may return to smaller batches
        horizon, first = progress.horizon_samples, progress.position
        train_set = build_train_set(self._config, self._corpus, total, horizon, first)
        return micro_batches(train_set, self._config.data, first, rank, ranks)

    def _was_stopped_in_a_validation(self) -> bool:
        """Return True if a checkpoint's validation is missing: a run that is stopped in one saves that step."""
        step, metrics = self._progress.step, self._folder / "metrics.jsonl"
        if self._resumed is None or not self._is_due(self._config.logging.eval_every):
            return False
        return process_groups.on_rank_0(lambda: last_validation(metrics)) < step

    def _first_lines(self) -> Iterator[str]:
        config, step = self._config, self._progress.step
        yield from self._corpus.left_out
        begins = "resuming after" if self._resumed else "starting at"
        yield f"{self._folder}: {begins} step {step} of {config.optim.train_steps}"
        if self._progress.first_sample and not self._resumed:
            yield f"reads on at sample {self._progress.first_sample:,} of the mix, where {self._initial} stopped"
        if config.logging.eval_every and self._valid_set is None:
            yield f"logging.eval_every: {config.logging.eval_every} has no effect, because data.valid is empty"
        if config.data.task is None:
            tokens = (self._progress.first_sample + self._samples_of_the_run()) * config.data.seq_length
            yield from describe_passes(config.data.train, self._corpus.train_tokens, tokens)
        if self._valid_set is not None and self._eval_samples != config.logging.eval_samples:
            few = self._valid_held is not None and self._valid_held < config.logging.eval_samples
            held = f"{self._valid_held} samples read all of data.valid, and " if few else ""
            yield (
                f"logging.eval_samples: {config.logging.eval_samples} becomes {self._eval_samples}, because {held}"
                "every rank of this layout reads whole micro-batches"
            )
        if config.engine.emulated:
            yield (
                f"EMULATED: engine.fp8={config.engine.fp8}. Linear layers round their operands and multiply in fp32; "
                "losses are meaningful, speed and memory are not"
            )
        yield self._watchdog.started()
        yield from launcher.describe_signals(config.health.stop_timeout)

    def _write_description(self) -> None:
        """Write the configuration and the companion files, which come from the initial checkpoint if it has some."""
        data = dataclasses.replace(self._config.data, first_sample=self._progress.first_sample)
        if data.task is None:
            data = dataclasses.replace(data, horizon_samples=self._progress.horizon_samples)
        resolved = dataclasses.replace(self._config, data=data)
        write_whole(self._folder / "config.yaml", yaml.safe_dump(to_dict(resolved), sort_keys=False))
        own = self._folder / COMPANION_FOLDER
        if self._initial is not None and (self._initial / COMPANION_FOLDER).is_dir() and not own.exists():
            partial = own.with_name(f".{own.name}.partial")
            with writing(own):
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(self._initial / COMPANION_FOLDER, partial)
                partial.rename(own)
        if self._corpus.chat_template is not None:  # an export then says how to talk to the model
            write_whole(own / TEMPLATE_FILE, self._corpus.chat_template)


def build(config: RunConfig, groups: ProcessGroupCollection, *, resumes: bool = False) -> tuple[Trainer, Path | None]:
    """Return the trainer, and the checkpoint from which weights (optionally also Adam's moments) were loaded.

    A run that resumes needs none: the stage before it may be gone by then.
    """
    name = None if resumes else config.checkpoint.initial
    initial = None if name is None else step_folder.locate(name)
    return build_trainer(config, groups, initial), initial


def build_trainer(config: RunConfig, groups: ProcessGroupCollection, initial: Path | None) -> Trainer:
    """Return the trainer with the weights of the checkpoint ``initial``, or with random ones for None."""
    dtype = DTYPES[config.optim.precision]
    model = LoopLM(config.model, config.gate, groups, dtype, config.parallel, engine=config.engine)
    if initial is not None:
        checkpoint.load_weights(initial, model, config.gate)
    trainer = Trainer(model, config.loss, config.optim, config.parallel, groups)
    if initial is not None and config.checkpoint.initial_optimizer:
        checkpoint.load_optimizer(initial, trainer.state, config)
    return trainer
