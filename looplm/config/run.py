"""A training run: loss, optimizer, data, checkpoints and logging, each a frozen dataclass validated when it is built.

Keys have their full path as name (``model.num_loops``), in YAML and on the command line. Checks here need only the
values; data and devices are checked where they are opened, still before training starts.
"""

from dataclasses import dataclass, field
from typing import Literal

from looplm.bounds import at_least, check_bounds, path_field, positive, require
from looplm.config.engine import EngineConfig
from looplm.config.loss import LossConfig
from looplm.config.model import GateConfig, ModelConfig
from looplm.config.parallel import ParallelConfig
from looplm.config.tasks import TaskConfig
from looplm.parameters import linear_widths, replicates_matrices, tensor_parallel_units


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning-rate schedule and the training precision.

    Args:
        train_steps: optimizer steps of this stage in total.
        lr: learning rate after warm-up.
        min_lr: wsd and cosine only: learning rate at the end of the decay.
        schedule: wsd (warm-up, stable, decay), cosine, or constant.
        warmup_steps: steps in which the learning rate rises from 0 to lr.
        decay_steps: wsd only: number of last steps, over which the learning rate falls to min_lr.
        weight_decay: of matrices; norms, biases, the gate, the injection and the step embedding have none.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        eps: AdamW's epsilon.
        clip_grad: largest global gradient norm; 0 does not clip.
        precision: fp32, or bf16 parameters with fp32 main weights and gradients.
    """

    train_steps: int = positive()
    lr: float = positive(3e-4)
    min_lr: float = at_least(0, 0.0)
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = at_least(0, 0)
    decay_steps: int = at_least(0, 0)
    weight_decay: float = at_least(0, 0.1)
    beta1: float = at_least(0, 0.9, below=1)
    beta2: float = at_least(0, 0.95, below=1)
    eps: float = positive(1e-8)
    clip_grad: float = at_least(0, 1.0)
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        check_bounds(self, "optim")
        require(self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"give a number from 0 to optim.lr={self.lr}")
        fits = self.warmup_steps + self.decay_steps <= self.train_steps
        fix = f"with optim.decay_steps={self.decay_steps} it must fit into optim.train_steps={self.train_steps}"
        require(fits, "optim.warmup_steps", self.warmup_steps, fix)
        decays = self.schedule == "wsd" or self.decay_steps == 0
        require(decays, "optim.decay_steps", self.decay_steps, "only optim.schedule=wsd has it; leave it 0")
        falls = self.schedule == "cosine" or self.decay_steps > 0 or self.min_lr == 0
        fix = f"with optim.schedule={self.schedule} and optim.decay_steps=0 the rate never falls; leave it 0"
        require(falls, "optim.min_lr", self.min_lr, fix)


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A prefix written by data_pipeline.tokenize, and its share of the mix.

    Args:
        prefix: path without .bin / .idx.
        weight: share of the samples, relative to the other sources.
    """

    prefix: str = path_field()
    weight: float = positive(1.0)

    def __post_init__(self) -> None:
        check_bounds(self, "data source")


@dataclass(frozen=True, kw_only=True)
class RampUpConfig:
    """Growth of the batch from ``start`` to data.global_batch_size, by ``increment``, over ``samples`` samples.

    Args:
        start: global batch size of the first step, in sequences.
        increment: sequences added at a time.
        samples: number of samples over which the batch grows.
    """

    start: int = positive()
    increment: int = positive()
    samples: int = positive()

    def __post_init__(self) -> None:
        check_bounds(self, "data.rampup")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and validation data, and their batches.

    Args:
        train: training sources with weights.
        valid: validation sources with weights; empty means no validation.
        task: a synthetic task in place of train and valid, made while training; each sample is new.
        seq_length: tokens of a sample.
        micro_batch_size: sequences in one forward pass of a rank.
        global_batch_size: sequences in one optimizer step, over all ranks.
        rampup: let the global batch grow at the start.
        document_masking: of text: attention, gate and loss do not cross the borders of documents packed into one
            sample.
        first_sample: number of the sample, in the order of these data, with which a stage begins; null reads on where
            checkpoint.initial stopped if that read the same data in the same order, and begins with 0 if not.
        horizon_samples: of text: samples in one shuffled pass over the mix, fixed at a run's start, or at that of the
            stage that it reads on from; null means the run's length. A pass is at least as long as no source repeats.
        cache_dir: of text: where Megatron keeps its sample indices; null means OUTPUT_DIR/index_cache.
        num_workers: processes that prefetch training batches.
    """

    train: tuple[DataSource, ...] = ()
    valid: tuple[DataSource, ...] = ()
    task: TaskConfig | None = None
    seq_length: int = positive(1024)
    micro_batch_size: int = positive(1)
    global_batch_size: int = positive(1)
    rampup: RampUpConfig | None = None
    document_masking: bool = True
    first_sample: int | None = at_least(0, None)
    horizon_samples: int | None = positive(None)
    cache_dir: str | None = path_field(None)
    num_workers: int = at_least(0, 0)

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        sources = bool(self.train) or self.task is not None
        fix = "name at least one source: [{prefix: PATH, weight: 1}], or a task in data.task"
        require(sources, "data.train", list(self.train), fix)
        if self.task is not None:
            text = [source.prefix for source in (*self.train, *self.valid)]
            require(not text, "data.task", self.task.name, f"it replaces text; leave out {', '.join(text)}")
            for key in ("document_masking", "horizon_samples", "cache_dir"):
                value, fix = getattr(self, key), "a task has no documents, passes or indices; leave it out"
                require(value == getattr(DataConfig, key), f"data.{key}", value, fix)
        batch, micro, ramp = self.global_batch_size, self.micro_batch_size, self.rampup
        multiple = f"give a multiple of data.micro_batch_size={micro}"
        require(batch % micro == 0, "data.global_batch_size", batch, multiple)
        if ramp is not None:
            require(ramp.start % micro == 0, "data.rampup.start", ramp.start, multiple)
            require(ramp.increment % micro == 0, "data.rampup.increment", ramp.increment, multiple)
            growth = batch - ramp.start
            require(growth >= 0, "data.rampup.start", ramp.start, f"it must not exceed data.global_batch_size={batch}")
            fix = f"it must divide global_batch_size - start = {growth}"
            require(growth % ramp.increment == 0, "data.rampup.increment", ramp.increment, fix)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved and what it starts from.

    Args:
        save_every: steps between checkpoints; 0 saves only at the end.
        keep: number of newest whole checkpoints that stay on disk.
        keep_every: checkpoints of steps divisible by this stay for good; 0 keeps none for good.
        in_background: write checkpoints beside training, which waits only while they are planned; false waits until
            each is on the disk.
        resume: continue from the newest complete checkpoint in output_dir, if there is one.
        initial: directory of an earlier stage (or of one of its steps) whose weights this stage starts from.
        initial_optimizer: also load Adam's moments from there; the schedule starts again at step 0.
    """

    save_every: int = at_least(0, 0)
    keep: int = at_least(1, 2)
    keep_every: int = at_least(0, 0)
    in_background: bool = True
    resume: bool = True
    initial: str | None = path_field(None)
    initial_optimizer: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")
        known = self.initial is not None or not self.initial_optimizer
        require(known, "checkpoint.initial_optimizer", True, "name the stage it comes from in checkpoint.initial")


@dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """What a run tolerates before it ends itself: steps that are not finite, loss spikes, and hangs.

    Args:
        max_skipped: steps in a row whose loss or gradient may be not finite; each is skipped, the next ends the run.
        spike_factor: a loss that exceeds the median of the last spike_window ones by more than this many of their
            standard deviations (1.4826 x their median absolute deviation) may be a spike; null looks for none. 7 is a
            usual number.
        spike_window: with spike_factor: losses that a loss is compared with; none is judged before that many.
        spike_steps: with spike_factor: steps in a row above the limit that make a spike.
        max_rollbacks: returns to the last checkpoint before a spike, with all data between it and the spike's end
            skipped; a later spike ends the run. 0 only reports spikes.
        step_timeout: seconds that a step, validation or save may take before the watchdog ends the run; 0 never.
        startup_timeout: seconds that everything before the first step may take; 0 is without limit.
        stop_timeout: seconds after a signal within which every rank must have saved.
        max_starts: starts in a row that may crash, hang or be killed without a new checkpoint; the next is refused, so
            that a job is not requeued forever; 0 is without limit.
    """

    max_skipped: int = at_least(0, 3)
    spike_factor: float | None = positive(None)
    spike_window: int = positive(64)
    spike_steps: int = positive(3)
    max_rollbacks: int = at_least(0, 0)
    step_timeout: float = at_least(0, 1800.0)
    startup_timeout: float = at_least(0, 3600.0)
    stop_timeout: float = positive(480.0)
    max_starts: int = at_least(0, 3)

    def __post_init__(self) -> None:
        check_bounds(self, "health")
        known = self.spike_factor is not None or self.max_rollbacks == 0
        require(known, "health.max_rollbacks", self.max_rollbacks, "say what a spike is with health.spike_factor")
        for key in ("spike_window", "spike_steps"):
            value, fix = getattr(self, key), "without health.spike_factor none is looked for; give that too"
            known = self.spike_factor is not None or value == getattr(HealthConfig, key)
            require(known, f"health.{key}", value, fix)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logs and validations during training.

    Args:
        log_every: steps between lines of metrics.jsonl and TensorBoard points.
        eval_every: steps between validations; 0 validates only after the last step. Without data.valid nothing is
            validated.
        eval_samples: samples of a validation; rounded up to whole micro-batches on every rank, and no more than read
            all of data.valid once.
        dynamics_samples: of these, samples (at least one on each rank) on which a validation also looks at the loops
            themselves: attention on the first token, and the spectral radius of each loop (24 backward passes); 0 does
            not look.
        tensorboard: write TensorBoard curves to OUTPUT_DIR/tensorboard.
        peak_tflops: peak of one device, for model FLOPs utilization; null looks it up (GPU) or measures it (CPU).
    """

    log_every: int = positive(1)
    eval_every: int = at_least(0, 0)
    eval_samples: int = positive(64)
    dynamics_samples: int = at_least(0, 0)
    tensorboard: bool = True
    peak_tflops: float | None = positive(None)

    def __post_init__(self) -> None:
        check_bounds(self, "logging")
        fix = f"give at most logging.eval_samples={self.eval_samples}"
        require(self.dynamics_samples <= self.eval_samples, "logging.dynamics_samples", self.dynamics_samples, fix)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One stage of training.

    Args:
        output_dir: directory for everything that the run writes.
        seed: seed of weights, order of the training data and sampling; not of validation text.
        model: the looped transformer.
        gate: the exit gate.
        loss: the training objective.
        optim: optimizer, schedule, precision.
        data: training and validation data.
        parallel: layout over the ranks.
        engine: backend and matmul precision of the linear layers.
        checkpoint: when a run is saved and what it starts from.
        health: what a run tolerates before it ends itself.
        logging: what is written during training.
    """

    output_dir: str = path_field(fix="name a directory")
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    gate: GateConfig = field(default_factory=GateConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = at_least(0, 1234, below=2**31)

    def __post_init__(self) -> None:
        check_bounds(self, "")
        model, length = self.model, self.data.seq_length
        fix = f"it must not exceed model.max_sequence_length={model.max_sequence_length}"
        require(length <= model.max_sequence_length, "data.seq_length", length, fix)
        units, replicated = tensor_parallel_units(model), replicates_matrices(model)
        self.parallel.check(units, length, model.num_layers, replicated, model.tie_embeddings)
        fix = "later loops would need the prelude's output on the first rank again; take parallel.pipeline=1 or none"
        at_hand = model.injection == "none" or not model.prelude_layers or self.parallel.pipeline == 1
        require(at_hand, "model.injection", model.injection, fix)
        engine, initial, frozen = self.engine, self.checkpoint.initial, self.loss.frozen_trunk
        widths = linear_widths(model, self.parallel.tensor)
        engine.check(model.num_layers, widths, self.parallel, length * self.data.micro_batch_size, frozen)
        bf16 = self.optim.precision == "bf16"
        require(bf16 or not engine.real_fp8, "engine.fp8", engine.fp8, "it needs optim.precision=bf16")
        fix = "the optimizer's fp32 weights would start from rounded ones; leave it false with checkpoint.initial"
        require(initial is None or not engine.fp8_params, "engine.fp8_params", True, fix)
        self.loss.check(model, self.parallel)
        whole = self.parallel.model_ranks == 1 and engine.transformer_impl == "local"
        looks, fix = self.logging.dynamics_samples, "it needs the whole model on each rank, and engine.transformer_impl"
        require(whole or not looks, "logging.dynamics_samples", looks, f"{fix}=local; leave it 0")
        has_data = bool(self.data.valid) or self.data.task is not None
        fix = "only a validation looks at the loops: name data.valid, or leave it 0"
        require(has_data or not looks, "logging.dynamics_samples", looks, fix)
        fix = "different numbers of loops do not compare; leave it out with loss.sampled_loops and loss.loop_onset"
        comparable = not self.loss.varies_loops or self.health.spike_factor is None
        require(comparable, "health.spike_factor", self.health.spike_factor, fix)
        fix = "the gate stage needs a trained trunk: name the stage-1 directory"
        require(not frozen or initial is not None, "checkpoint.initial", None, fix)
