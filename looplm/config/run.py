"""What a run is: one frozen dataclass per concern, validated once, at the edge.

Keys are named by their full path (``model.num_loops``), in YAML and on the command line alike. Every check here needs
nothing but the values; checks against data and devices are made where those are opened, still before training starts.
"""

from dataclasses import dataclass, field
from typing import Literal

from looplm.cli import require
from looplm.config.engine import EngineConfig
from looplm.config.model import GateConfig, ModelConfig, require_positive
from looplm.config.parallel import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What is minimised.

    Args:
        objective: entropy_regularised (stage 1, all parameters) or adaptive_gate (stage 2, the gate on a frozen trunk).
        beta: stage 1: weight of the entropy (uniform prior) or of the divergence from the prior.
        prior: stage 1: uniform (Ouro) or geometric (for the ablation).
        geometric_rate: stage 1, prior=geometric: chance to leave at each loop.
        slope: stage 2: k of w = sigmoid(k (I - gamma)), the steepness of "this loop helped".
        threshold: stage 2: gamma, the least gain in nats for which one more loop is worth it.
        target: stage 2: paper (as printed) or next (lambda_t learns whether loop t+1 helps).
        head_chunk_tokens: tokens whose logits are made in one piece.
        head_recompute: keep no logits for backward but make them again; false is faster and holds [R, tokens, V].
    """

    objective: Literal["entropy_regularised", "adaptive_gate"] = "entropy_regularised"
    beta: float = 0.1
    prior: Literal["uniform", "geometric"] = "uniform"
    geometric_rate: float = 0.5
    slope: float = 50.0
    threshold: float = 0.005
    target: Literal["paper", "next"] = "next"
    head_chunk_tokens: int = 256
    head_recompute: bool = True

    def __post_init__(self) -> None:
        require(self.beta >= 0, "loss.beta", self.beta, "give a number of at least 0")
        require(0 < self.geometric_rate < 1, "loss.geometric_rate", self.geometric_rate, "give a number between 0 and 1")  # fmt: skip
        require_positive("loss", self, "slope", "head_chunk_tokens")

    @property
    def frozen_trunk(self) -> bool:
        """Whether only the gate is trained (stage 2)."""
        return self.objective == "adaptive_gate"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, its learning-rate schedule and the precision it works in.

    Args:
        train_steps: optimizer steps of this stage, all in all.
        lr: learning rate after warm-up.
        min_lr: learning rate at the end of the decay.
        schedule: wsd (warm-up, stable, decay), cosine, or constant.
        warmup_steps: steps from 0 to lr.
        decay_steps: wsd only: the last steps, over which lr falls to min_lr.
        weight_decay: on matrices; norms, biases and the gate are spared.
        beta1: AdamW's first-moment decay.
        beta2: AdamW's second-moment decay.
        eps: AdamW's epsilon.
        clip_grad: largest global gradient norm; 0 does not clip.
        precision: fp32, or bf16 parameters with fp32 main weights and gradients.
    """

    train_steps: int
    lr: float = 3e-4
    min_lr: float = 0.0
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    warmup_steps: int = 0
    decay_steps: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    precision: Literal["fp32", "bf16"] = "bf16"

    def __post_init__(self) -> None:
        require_positive("optim", self, "train_steps", "lr", "eps")
        require(0 <= self.min_lr <= self.lr, "optim.min_lr", self.min_lr, f"give a number from 0 to optim.lr={self.lr}")
        for key in ("warmup_steps", "decay_steps", "weight_decay", "clip_grad"):
            require(getattr(self, key) >= 0, f"optim.{key}", getattr(self, key), "give a number of at least 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"optim.{key}", getattr(self, key), "give a number in [0, 1)")
        require(
            self.warmup_steps + self.decay_steps <= self.train_steps,
            "optim.warmup_steps",
            self.warmup_steps,
            f"with optim.decay_steps={self.decay_steps} it must fit into optim.train_steps={self.train_steps}",
        )
        require(self.schedule == "wsd" or self.decay_steps == 0, "optim.decay_steps", self.decay_steps, "it belongs to optim.schedule=wsd; leave it 0")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """A prefix written by data_pipeline.tokenize, and its share of the mix.

    Args:
        prefix: path without .bin / .idx.
        weight: share of the samples, relative to the other sources.
    """

    prefix: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        require(self.weight > 0, "data.train[].weight", self.weight, "give a number above 0, or leave the source out")


@dataclass(frozen=True, kw_only=True)
class RampUpConfig:
    """The batch grows from ``start`` by ``increment`` to data.global_batch_size over ``samples`` samples.

    Args:
        start: global batch size of the first step, in sequences.
        increment: how much it grows at a time.
        samples: over how many samples it grows.
    """

    start: int
    increment: int
    samples: int

    def __post_init__(self) -> None:
        require_positive("data.rampup", self, "start", "increment", "samples")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and in what portions.

    Args:
        train: training sources with weights.
        valid: validation sources with weights; empty means no validation.
        seq_length: tokens of a sample.
        micro_batch_size: sequences in one forward pass, per rank.
        global_batch_size: sequences in one optimizer step, over all ranks.
        rampup: let the global batch grow at the start.
        document_masking: attention, gate and loss stay inside a document when several share a sample.
        horizon_samples: samples in one shuffled pass over the mix, fixed at a run's start; null takes the run's own length.
        cache_dir: where Megatron keeps its sample indices; null means OUTPUT_DIR/index_cache.
        num_workers: processes that read ahead.
    """

    train: tuple[DataSource, ...] = ()
    valid: tuple[DataSource, ...] = ()
    seq_length: int = 1024
    micro_batch_size: int = 1
    global_batch_size: int = 1
    rampup: RampUpConfig | None = None
    document_masking: bool = True
    horizon_samples: int | None = None
    cache_dir: str | None = None
    num_workers: int = 0

    def __post_init__(self) -> None:
        require(len(self.train) > 0, "data.train", list(self.train), "name at least one source: [{prefix: PATH, weight: 1}]")  # fmt: skip
        require_positive("data", self, "seq_length", "micro_batch_size", "global_batch_size")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "give 0 or more")
        require(self.horizon_samples is None or self.horizon_samples > 0, "data.horizon_samples", self.horizon_samples, "give null or a number above 0")  # fmt: skip
        batch, micro = self.global_batch_size, self.micro_batch_size
        require(batch % micro == 0, "data.global_batch_size", batch, f"give a multiple of data.micro_batch_size={micro}")  # fmt: skip
        if self.rampup is not None:
            grown = batch - self.rampup.start
            for key in ("start", "increment"):
                value = getattr(self.rampup, key)
                require(value % micro == 0, f"data.rampup.{key}", value, f"give a multiple of data.micro_batch_size={micro}")  # fmt: skip
            require(grown >= 0, "data.rampup.start", self.rampup.start, f"it must not exceed data.global_batch_size={batch}")  # fmt: skip
            require(grown % self.rampup.increment == 0, "data.rampup.increment", self.rampup.increment, f"it must divide global_batch_size - start = {grown}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved and what it starts from.

    Args:
        save_every: steps between checkpoints; 0 saves only at the end.
        keep: how many of the newest checkpoints stay on disk.
        resume: go on from the newest whole checkpoint of output_dir, if there is one.
        initial: directory of an earlier stage (or of one of its steps) whose weights this stage starts from.
        initial_optimizer: take Adam's moments over from there too; the schedule starts anew.
    """

    save_every: int = 0
    keep: int = 2
    resume: bool = True
    initial: str | None = None
    initial_optimizer: bool = False

    def __post_init__(self) -> None:
        require(self.save_every >= 0, "checkpoint.save_every", self.save_every, "give 0 or more steps")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "keep at least one")
        require(self.initial is not None or not self.initial_optimizer, "checkpoint.initial_optimizer", True, "name the stage it comes from in checkpoint.initial")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training.

    Args:
        log_every: steps between lines of metrics.jsonl and TensorBoard points.
        eval_every: steps between validations; 0 validates never.
        eval_samples: sequences of a validation.
        tensorboard: write TensorBoard curves to OUTPUT_DIR/tensorboard.
        peak_tflops: peak of one device for model FLOPs utilisation; null looks it up (GPU) or measures it (CPU).
    """

    log_every: int = 1
    eval_every: int = 0
    eval_samples: int = 64
    tensorboard: bool = True
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require_positive("logging", self, "log_every", "eval_samples")
        require(self.eval_every >= 0, "logging.eval_every", self.eval_every, "give 0 or more steps")
        require(self.peak_tflops is None or self.peak_tflops > 0, "logging.peak_tflops", self.peak_tflops, "give null or a number above 0")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A stage of training, whole.

    Args:
        output_dir: everything the run writes goes here.
        seed: of weights, data order and sampling.
        model: the looped transformer.
        gate: the exit gate.
        loss: what is minimised.
        optim: optimizer, schedule, precision.
        data: what is read.
        parallel: layout over the ranks.
        engine: what the stack's linears are made of, and in which numbers they multiply.
        checkpoint: saving and starting.
        logging: what is written.
    """

    output_dir: str
    model: ModelConfig
    optim: OptimConfig
    data: DataConfig
    gate: GateConfig = field(default_factory=GateConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 1234

    def __post_init__(self) -> None:
        require(self.output_dir != "", "output_dir", self.output_dir, "name a directory")
        require(0 <= self.seed < 2**31, "seed", self.seed, "give a whole number from 0 to 2147483647")
        require(
            self.data.seq_length <= self.model.max_sequence_length,
            "data.seq_length",
            self.data.seq_length,
            f"it must not exceed model.max_sequence_length={self.model.max_sequence_length}",
        )
        model = self.model
        mla, tied = model.attention == "mla", model.tie_embeddings
        self.parallel.check(model.tensor_parallel_widths, self.data.seq_length, model.num_layers, mla, tied)
        frozen, tokens = self.loss.frozen_trunk, self.data.seq_length * self.data.micro_batch_size
        self.engine.check(model, self.parallel, tokens, frozen)
        require(not self.engine.real_fp8 or self.optim.precision == "bf16", "engine.fp8", self.engine.fp8, "it needs optim.precision=bf16")  # fmt: skip
        require(not self.engine.fp8_params or self.checkpoint.initial is None, "engine.fp8_params", True, "the optimizer's fp32 weights would start from rounded ones; leave it false where checkpoint.initial is given")  # fmt: skip
        if frozen:
            require(self.model.num_loops > 1, "model.num_loops", self.model.num_loops, "the gate stage needs at least 2 loops to choose from")  # fmt: skip
            require(self.checkpoint.initial is not None, "checkpoint.initial", None, "the gate stage needs a trained trunk: name the stage-1 directory")  # fmt: skip
