"""Settings of an evaluation, and the run as it is measured; all is checked before anything is loaded."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from data_pipeline.synthetic.registry import open_task
from looplm.bounds import at_least, check_bounds, path_field, positive, require, require_file_place
from looplm.checkpoint import ModelDescription
from looplm.config import (
    DataConfig,
    DataSource,
    EngineConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
)
from looplm.config.model import MAX_DEPTH
from looplm.failures import UserError
from looplm.inference.early_exit import ExitSignal, check_signal
from looplm.inference.kv_cache import CacheMode
from pretrain.task_data import TaskDataset

MAX_VOTES = 1_000  # each is a chain, written token by token


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Depths, thresholds, samples and caches to measure.

    Args:
        checkpoint: a training directory, or one step directory of it.
        depths: depths to report, separated by commas; they may exceed the trained number of loops.
        samples: validation samples, a multiple of batch_size.
        batch_size: samples in one forward pass of a rank.
        valid: prefix of validation data; null for the checkpoint's own. It needs output.
        task: a synthetic task in place of the checkpoint's own, such as a harder one with the same symbols. It needs
            output.
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
        fix = f"each forward pass reads batch_size={self.batch_size}; give a multiple of it, or another batch_size"
        require(self.samples % self.batch_size == 0, "samples", self.samples, fix)
        require_file_place(self.output, "output")
        fix = "a task is made while it is measured; leave out one of valid and task"
        require(self.task is None or self.valid is None, "valid", self.valid, fix)
        require(bool(self.depth_list), "depths", self.depths, "give whole numbers above 0, such as 1,2,4,8")
        fix = f"give whole numbers from 1 to {MAX_DEPTH:,}, such as 1,2,4,8"
        require(max(self.depth_list) <= MAX_DEPTH, "depths", self.depths, fix)
        modes = get_args(CacheMode)
        require(set(self.cache_list) <= set(modes), "kv_caches", self.kv_caches, f"give some of {','.join(modes)}")
        few = not self.votes or (bool(self.vote_list) and max(self.vote_list) <= MAX_VOTES)
        require(few, "votes", self.votes, f"give whole numbers from 1 to {MAX_VOTES:,}, such as 1,8")
        fix = "give numbers from 0 to 1, such as 0.5,0.9,1"
        require(bool(self.threshold_list), "exit_thresholds", self.exit_thresholds, fix)
        for key in ("exit_thresholds", "exit_signal", "prompt_tokens"):
            value, fix = getattr(self, key), "it has no effect without kv_caches; give that too"
            require(bool(self.cache_list) or value == getattr(EvaluateConfig, key), key, value, fix)

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
    return sorted({int(part) for part in parts}) if all(map(_is_count, parts)) else []


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0


def validation_run(
    config: EvaluateConfig, trained: RunConfig | None, stored: ModelDescription, folder: str
) -> RunConfig:
    """Return the run that made the checkpoint, or a plain one for imported weights, as it reads the samples.

    Args:
        config: what is measured.
        trained: the run that made the weights; None for imported ones.
        stored: the model and the gate of the weights.
        folder: for Megatron's sample indices; the run's own directory may have been moved since.

    Raises:
        UserError: the model cannot be measured so, or there is no data.
    """
    task = config.task or (trained.data.task if trained and not config.valid else None)
    if task is None:
        run = _text_run(config, trained, stored, folder)
    else:
        run = _task_run(config, task, trained, stored, folder)
    if config.cache_list:
        _check_decoding(config, run)
    return run


def check_output(config: EvaluateConfig) -> None:
    """Raise if the measurements of other data would replace those of the checkpoint's own."""
    fix = "evaluation.json is about the checkpoint's own data; name another file in output"
    for key, value in (("valid", config.valid), ("task", config.task and config.task.name)):
        require(value is None or config.output is not None, key, value, fix)


def data_read(config: EvaluateConfig, run: RunConfig) -> tuple[str, ...]:
    """Return the prefixes that are read, or the task and its split."""
    task = run.data.task
    return tuple(source.prefix for source in run.data.valid) if task is None else (f"{task.name} ({config.split})",)


def check_exits(config: EvaluateConfig, gate_trained: bool) -> None:
    """Raise if tokens should exit by a gate that was never trained."""
    by_gate = bool(config.cache_list) and config.exit_signal == "gate" and min(config.threshold_list) < 1
    fix = "this checkpoint's gate was never trained; run the gate stage, give 1, or another exit_signal"
    require(gate_trained or not by_gate, "exit_thresholds", config.exit_thresholds, fix)


def _text_run(config: EvaluateConfig, trained: RunConfig | None, stored: ModelDescription, folder: str) -> RunConfig:
    for key, value in (("split", config.split == "test"), ("refit_steps", config.refit_steps), ("votes", config.votes)):
        require(not value, key, getattr(config, key), "the checkpoint was trained on text; leave it out")
    valid = (DataSource(prefix=config.valid),) if config.valid else trained.data.valid if trained else ()
    if not valid:
        raise UserError("valid: the checkpoint was made without data.valid; name a prefix with --valid")
    rows, model = config.batch_size, stored.model
    if trained is None:
        length = min(1024, model.max_sequence_length)
        data, optim = DataConfig(train=valid, seq_length=length), OptimConfig(train_steps=1)
        trained = RunConfig(output_dir=folder, data=data, optim=optim, **stored._asdict())
    data = replace(trained.data, task=None, train=valid, seq_length=config.seq_length or trained.data.seq_length)
    data = replace(data, valid=valid, micro_batch_size=rows, global_batch_size=rows, rampup=None, cache_dir=None)
    logging, layout = LoggingConfig(eval_samples=config.samples), ParallelConfig()  # not those of the training
    plain = replace(trained, data=data, logging=logging, parallel=layout, engine=EngineConfig())
    return replace(plain, output_dir=folder)


def _task_run(
    config: EvaluateConfig, task: TaskConfig, trained: RunConfig | None, stored: ModelDescription, folder: str
) -> RunConfig:
    rows, own = config.batch_size, trained.data.seq_length if trained else stored.model.max_sequence_length
    length = config.seq_length or own
    data = DataConfig(task=task, seq_length=length, micro_batch_size=rows, global_batch_size=rows)
    logging, optim = LoggingConfig(eval_samples=config.samples), OptimConfig(train_steps=1)
    seed = trained.seed if trained else 0
    run = RunConfig(output_dir=folder, data=data, optim=optim, logging=logging, seed=seed, **stored._asdict())
    if config.votes:
        some = TaskDataset(open_task(task), length, config.split, seed, rows).__getitems__(list(range(rows)))
        fix = "samples of this task have their labels at different positions, and so no last answer; leave it out"
        require(bool((some["loss_mask"] == some["loss_mask"][0]).all()), "votes", config.votes, fix)
    return run


def _check_decoding(config: EvaluateConfig, run: RunConfig) -> None:
    """Raise if the model or its samples cannot be decoded as asked."""
    check_signal(config.exit_signal, run.model)
    length = run.data.seq_length
    fix = f"samples have {length} tokens; give fewer, so that some are left to measure"
    require(config.prompt_tokens < length, "prompt_tokens", config.prompt_tokens, fix)
