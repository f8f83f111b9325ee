"""Position of a run in its data and its schedule, as a checkpoint records it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from looplm import checkpoint
from looplm.bounds import require
from looplm.checkpoint import About, Health, step_folder
from looplm.config import RunConfig
from looplm.failures import UserError
from looplm.megatron.settings import DTYPES
from pretrain.data import Corpus, data_order, matches_data_order, samples_without_repetition
from pretrain.mix import check_sources


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Position of a run."""

    horizon_samples: int  # in one shuffled pass over the data; fixed when the run starts
    first_sample: int = 0  # with which the run began, in the data's order
    inherited_steps: int = 0  # of earlier stages in Adam's moments; its bias correction counts them too
    step: int = 0  # optimizer steps done
    samples: int = 0  # training samples consumed
    tokens: int = 0  # in those samples
    health: Health = field(default_factory=Health)

    @classmethod
    def start(
        cls, config: RunConfig, corpus: Corpus, total_samples: int, resumed: About | None, initial: About | None
    ) -> "Progress":
        """Return the position at which a run of ``total_samples`` samples starts or resumes.

        ``resumed`` describes the run's own checkpoint, ``initial`` the one that its weights come from; None if there is
        no such checkpoint. A pass that has begun becomes as long as the data without a repetition: its order so far
        stays.
        """
        if resumed is not None:
            start = cls.at(resumed)
        else:
            first, before = first_sample(config, corpus, initial), stage_before(config, corpus, initial)
            horizon = config.data.horizon_samples or first + total_samples
            start = cls(
                horizon_samples=horizon if before is None else before.horizon_samples,
                inherited_steps=initial.adam_steps if initial and config.checkpoint.initial_optimizer else 0,
                first_sample=first,
            )
        if start.position > start.horizon_samples:
            return start
        return replace(
            start, horizon_samples=max(start.horizon_samples, samples_without_repetition(config.data, corpus))
        )

    @classmethod
    def at(cls, about: About) -> "Progress":
        """Return the position that a checkpoint of the run describes."""
        return cls(
            horizon_samples=about.horizon_samples,
            inherited_steps=about.adam_steps - (about.step - about.health.skipped),
            step=about.step,
            first_sample=about.first_sample,
            samples=about.samples,
            tokens=about.tokens,
            health=about.health,
        )

    @property
    def position(self) -> int:
        """Number of samples in the data's order before the next step: of earlier stages, consumed, and skipped."""
        return self.first_sample + self.samples + self.health.samples_left_out

    @property
    def adam_steps(self) -> int:
        """Steps behind Adam's moments."""
        return self.step - self.health.skipped + self.inherited_steps

    def advance(self, samples: int, seq_length: int, health: Health) -> "Progress":
        """Return the position after one more step, of ``samples`` samples with ``seq_length`` tokens each."""
        samples, tokens = self.samples + samples, self.tokens + samples * seq_length
        return replace(self, step=self.step + 1, samples=samples, tokens=tokens, health=health)


def stage_before(config: RunConfig, corpus: Corpus, initial: About | None) -> About | None:
    """Return ``initial`` if its run read the same data in the same order, so that this one reads on; else None."""
    return initial if initial is not None and matches_data_order(initial.data_order, config, corpus) else None


def first_sample(config: RunConfig, corpus: Corpus, initial: About | None) -> int:
    """Return the sample, in the data's order, with which a run begins that starts from the checkpoint ``initial``."""
    if config.data.first_sample is not None:
        return config.data.first_sample
    before = stage_before(config, corpus, initial)
    return 0 if before is None else before.position


def describe(config: RunConfig, corpus: Corpus, progress: Progress) -> About:
    """Return the description that is saved with a checkpoint at this position."""
    return About(
        step=progress.step,
        samples=progress.samples,
        tokens=progress.tokens,
        horizon_samples=progress.horizon_samples,
        first_sample=progress.first_sample,
        objective=config.loss.objective,
        gate_trained=config.model.num_loops > 1 and config.loss.trains_gate,
        tokenizer_sha256=corpus.tokenizer.sha256,
        eos_ids=(corpus.stop_id,),
        data_order=data_order(config, corpus),
        versions=checkpoint.versions(),
        git_revision=checkpoint.git_revision(),
        bos_id=corpus.tokenizer.bos_id,
        pad_id=corpus.tokenizer.pad_id,
        begin_id=corpus.tokenizer.begin_id,
        dtype=str(DTYPES[config.optim.precision]).removeprefix("torch."),
        optimizer_step=progress.adam_steps,
        health=progress.health,
    )


def own_steps(config: RunConfig) -> list[Path]:
    """Return the step directories that an output_dir holds, newest first, damaged ones too.

    Raises:
        UserError: there are some, and ``checkpoint.resume`` is false: later commands would take the one with the
            highest number, whichever run wrote it.
    """
    folder = step_folder.of_run(config.output_dir)
    steps = step_folder.steps_in(folder)
    fix = f"{folder} holds steps of an earlier run; remove them, or give a new output_dir"
    require(config.checkpoint.resume or not steps, "checkpoint.resume", False, fix)
    return steps


def check_start(config: RunConfig, corpus: Corpus, resumed: About | None, initial: About | None) -> None:
    """Check that a run may begin or resume with these weights and these data.

    Raises:
        UserError: the weights belong to another tokenizer, or the run would resume in other data or another order, or
            in another pass, or has more steps behind it than it is to have; or a new run has a source twice, or trains
            on held-out data.
    """
    if resumed is None:  # an older run may have begun so
        check_sources(config.data)
    for about, where in ((initial, config.checkpoint.initial), (resumed, config.output_dir)):
        if about is not None and about.tokenizer_sha256 != corpus.tokenizer.sha256:
            raise UserError(
                f"{where}: trained with another tokenizer ({about.tokenizer_sha256[:12]}) than the data's "
                f"({corpus.tokenizer.sha256[:12]}); tokenize the data with {where}/…/tokenizer.json"
            )
    if resumed is not None and not matches_data_order(resumed.data_order, config, corpus):
        raise UserError(
            f"{config.output_dir}: was trained on other data, weights, data.seq_length or seed than given now; "
            "restore them, or give a new output_dir and name this one in checkpoint.initial"
        )
    if resumed is not None:
        first, fix = config.data.first_sample, f"{config.output_dir} began with {resumed.first_sample}; leave it out"
        require(first in (None, resumed.first_sample), "data.first_sample", first, fix)
        given, begun = config.data.horizon_samples, resumed.horizon_samples
        if given is not None and config.checkpoint.initial is None:  # a stage that reads on has its predecessor's
            kept = begun in (given, max(given, samples_without_repetition(config.data, corpus)))
            fix = f"{config.output_dir} began with {begun}; leave it out"
            require(kept, "data.horizon_samples", given, fix)
        fix = f"{config.output_dir} has trained {resumed.step} steps; give at least as many"
        require(resumed.step <= config.optim.train_steps, "optim.train_steps", config.optim.train_steps, fix)
