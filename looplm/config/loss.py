"""The training objective."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from looplm.bounds import at_least, check_bounds, positive, require
from looplm.config.model import ModelConfig
from looplm.config.parallel import ParallelConfig

_ALL_LOOPS = "the gate stage runs all loops; leave out loss.loop_onset and loss.sampled_loops"


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The training objective.

    Args:
        objective: entropy_regularised (stage 1, all parameters) or adaptive_gate (stage 2, the gate on a frozen trunk).
        weights: stage 1: what weighs the losses of the loops: gate (the exit distribution, as in Ouro), last (1 for the
            last loop, 0 for the others) or uniform (1/R each). With last or uniform the gate is not trained.
        beta: stage 1, weights=gate: weight of the entropy (uniform prior) or of the divergence from the prior.
        regularizer: stage 1, weights=gate: what is held to the prior: token (the exit distribution of each, as in Ouro)
            or batch (its mean over the tokens of a micro-batch, so that single tokens may differ; arXiv 2610.09013).
        prior: stage 1: uniform (Ouro), geometric (for the ablation) or given.
        geometric_rate: stage 1, prior=geometric: probability of leaving at each loop.
        prior_shares: stage 1, prior=given: share of each loop, in any unit; one number for each of model.num_loops.
        ponder_cost: stage 1, weights=gate: nats that each loop costs a token: the loss gets this times the token's mean
            depth (Adaptive Computation Time, arXiv 1603.08983).
        stability: stage 1: weight of how much the loops change what the head reads: sum of |h_r - h_{r-1}|² / D, r > 1.
        backward_loops: stage 1: how many of the last loops the gradient of the last loop's loss flows through; the
            state that enters the first of them is a constant for all behind it, and the losses of loops in front of it
            keep their own gradients. null: through all. With weights=last the embedding then learns only through
            model.injection, or from sampled_loops.
        loop_onset: stage 1: share of optim.train_steps, from the first step on, that run onset_loops loops; the others
            run model.num_loops. Record runs of small models switch loops on after 35 to 70 %.
        onset_loops: stage 1, with loop_onset: loops of those steps.
        sampled_loops: stage 1: loops of each (later) step: none (all), uniform (1 to model.num_loops, equally likely)
            or poisson (1 + Poisson(m exp(z / 2 - 1/8)) with m = num_loops / 2 and a normal z, at most num_loops; after
            Huginn, arXiv 2502.05171). The number depends on seed and step alone. A step of n loops is one of a model
            with num_loops=n: losses, gate and prior know of n loops only. Validation runs all.
        slope: stage 2: k of w = sigmoid(k (I - gamma)), the steepness of "this loop helped".
        threshold: stage 2: gamma, the smallest gain in nats for which one more loop is worth it.
        target: stage 2: paper (as printed) or next (lambda_t learns whether loop t+1 helps).
    """

    RETIRED: ClassVar[dict[str, str]] = {
        "head_chunk_tokens": "the head's chunks have a fixed number of bytes",
        "head_recompute": "the head neither keeps nor recomputes logits",
    }

    objective: Literal["entropy_regularised", "adaptive_gate"] = "entropy_regularised"
    weights: Literal["gate", "last", "uniform"] = "gate"
    beta: float = at_least(0, 0.1)
    regularizer: Literal["token", "batch"] = "token"
    prior: Literal["uniform", "geometric", "given"] = "uniform"
    geometric_rate: float = positive(0.5, below=1)
    prior_shares: tuple[float, ...] = positive(())
    ponder_cost: float = at_least(0, 0.0)
    stability: float = at_least(0, 0.0)
    backward_loops: int | None = positive(None)
    loop_onset: float = at_least(0, 0.0, below=1)
    onset_loops: int = positive(1)
    sampled_loops: Literal["none", "uniform", "poisson"] = "none"
    slope: float = positive(50.0)
    threshold: float = 0.005
    target: Literal["paper", "next"] = "next"

    def __post_init__(self) -> None:
        check_bounds(self, "loss")
        stage1 = self.objective == "entropy_regularised" or self.weights == "gate"
        require(stage1, "loss.weights", self.weights, "the gate stage trains the gate; leave it out")
        for key, plain in (("regularizer", "token"), ("ponder_cost", 0.0)):
            value, fix = getattr(self, key), "it needs stage 1 with loss.weights=gate; leave it out"
            require(self.regularizes or value == plain, f"loss.{key}", value, fix)
        fix = "it needs loss.weights=gate; leave it out"
        require(self.weights == "gate" or self.prior == "uniform", "loss.prior", self.prior, fix)
        for key in ("stability", "backward_loops"):
            value, fix = getattr(self, key), "the gate stage trains the gate alone; leave it out"
            require(not self.frozen_trunk or not value, f"loss.{key}", value, fix)
        require(not self.frozen_trunk or not self.varies_loops, "loss.objective", self.objective, _ALL_LOOPS)
        fix = "it needs loss.loop_onset above 0; leave it out"
        require(self.loop_onset > 0 or self.onset_loops == 1, "loss.onset_loops", self.onset_loops, fix)
        rate, fix = self.geometric_rate, "only loss.prior=geometric has it; leave it out"
        require(self.prior == "geometric" or rate == LossConfig.geometric_rate, "loss.geometric_rate", rate, fix)
        fix = "give it with loss.prior=given, and only then"
        require(bool(self.prior_shares) == (self.prior == "given"), "loss.prior_shares", self.prior_shares, fix)

    @property
    def regularizes(self) -> bool:
        """True if the exit distribution weighs the losses and is held to a prior."""
        return self.weights == "gate" and not self.frozen_trunk

    @property
    def trains_gate(self) -> bool:
        """True if the gate is among the trained parameters."""
        return self.frozen_trunk or self.weights == "gate"

    @property
    def frozen_trunk(self) -> bool:
        """True if only the gate is trained (stage 2)."""
        return self.objective == "adaptive_gate"

    @property
    def varies_loops(self) -> bool:
        """True if some training steps run fewer loops than the model has."""
        return self.loop_onset > 0 or self.sampled_loops != "none"

    def check(self, model: ModelConfig, layout: ParallelConfig) -> None:
        """Raise a :class:`UserError` if this model in this layout cannot be trained so."""
        loops, shares = model.num_loops, self.prior_shares
        fix = f"give one number for each of model.num_loops={loops}"
        require(len(shares) in (0, loops), "loss.prior_shares", shares, fix)
        last, fix = self.backward_loops or 1, f"it must not exceed model.num_loops={loops}"
        require(last <= loops, "loss.backward_loops", last, fix)
        fix = "with loss.weights=last no gradient would reach the embedding; take uniform or gate, or a model.injection"
        truncated = self.weights == "last" and self.backward_loops not in (None, loops)
        reached = not truncated or model.injection != "none" or self.sampled_loops != "none"
        require(reached, "loss.backward_loops", last, fix)
        weight = self.stability
        fix = "the loops' states are never together on a rank of a pipeline; take parallel.pipeline=1"
        require(not weight or layout.pipeline == 1, "loss.stability", weight, fix)
        fix = "it would hold the coda's output, not the loops' states; take model.coda_layers=0"
        require(not weight or not model.coda_layers, "loss.stability", weight, fix)
        fix = "with one loop there is no change of the state; leave it out"
        require(not weight or loops > 1, "loss.stability", weight, fix)
        key = "loop_onset" if self.loop_onset > 0 else "sampled_loops"
        fix = "with model.num_loops=1 there are no fewer loops; leave it out"
        require(loops > 1 or not self.varies_loops, f"loss.{key}", getattr(self, key), fix)
        fix = f"give fewer than model.num_loops={loops}"
        require(not self.loop_onset or self.onset_loops < loops, "loss.onset_loops", self.onset_loops, fix)
        fix = "weights of loops that do not run have no gradients to wait for; take parallel.overlap_grad_reduce=false"
        require(not (layout.overlap_grad_reduce and self.varies_loops), f"loss.{key}", getattr(self, key), fix)
        fix = "the gate stage needs at least 2 loops to choose from"
        require(not self.frozen_trunk or loops > 1, "model.num_loops", loops, fix)
