"""One step: micro-batches through Megatron's schedule, gradients, optimizer; and the statistics that come of it.

Shapes: S sequence, B micro-batch, R loops.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice, tee

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from looplm.config import LossConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_entropy, exit_log_probs
from looplm.model.losses import adaptive_gate_loss, entropy_regularised_loss, geometric_prior, token_losses
from looplm.model.pipeline import LoopStage, loop_stages
from pretrain.data import Batch


@dataclass(frozen=True)
class StepStats:
    """Means over the tokens of a step that count; lists have one entry per loop."""

    tokens: int
    loss: float
    loss_per_loop: list[float]
    exit_distribution: list[float]
    mean_depth: float
    entropy: float


def objective(loss: LossConfig, token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor) -> Tensor:
    """The stage's loss, a mean over the tokens that count."""
    if loss.objective == "adaptive_gate":
        return adaptive_gate_loss(token_loss_RSB, gate_logit_RSB, loss.slope, loss.threshold, mask_SB, loss.target)
    prior_R = geometric_prior(token_loss_RSB.size(0), loss.geometric_rate) if loss.prior == "geometric" else None
    return entropy_regularised_loss(token_loss_RSB, gate_logit_RSB, loss.beta, mask_SB, prior_R)


def loop_losses(
    model: LoopLM, batch: Batch, loss: LossConfig, frozen: bool = False, num_loops: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and gate logit of each token after each loop, both [R, S, B]."""
    output = model(batch.ids_BS, num_loops, batch.document_start_SB, frozen)
    head = head_losses(inner_model(model), batch, loss)
    return torch.stack([head(h_SBD) for h_SBD in output.hidden]), output.gate_logit_RSB


def head_losses(model: LoopLM, batch: Batch, loss: LossConfig) -> Callable[[Tensor], Tensor]:
    """The function from hidden state to the cross-entropy [S, B] of the batch's labels."""
    return partial(
        token_losses,
        weight_VD=model.head_weight(),
        labels_SB=batch.labels_SB,
        chunk_tokens=loss.head_chunk_tokens,
        group=model.tp_group,
        recompute=loss.head_recompute,
        sequence_parallel=model.config.sequence_parallel,
    )


def inner_model(model: LoopLM | DistributedDataParallel) -> LoopLM:
    """The model inside Megatron's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _forward_step(
    loss: LossConfig, batches: Iterator[Batch], model: LoopLM | LoopStage
) -> tuple[Tensor, Callable[..., object]]:
    """What Megatron's schedules call for each micro-batch: an output, and the function that makes a loss of it."""
    batch, frozen = next(batches), loss.frozen_trunk
    if isinstance(model, LoopStage):
        head = head_losses(model.inner, batch, loss) if model.inner.post_process else None
        output_SBD, *losses = model(batch.ids_BS, batch.document_start_SB, head, frozen)
    else:
        losses = list(loop_losses(model, batch, loss, frozen))
        output_SBD = losses[0]

    def loss_of(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token_loss_RSB, gate_logit_RSB = losses
        tokens = batch.mask_SB.sum()
        total = objective(loss, token_loss_RSB, gate_logit_RSB, batch.mask_SB) * tokens
        if frozen and isinstance(model, LoopStage) and torch.is_grad_enabled():
            total.backward()  # the gate's graph lies on this rank alone: the schedule has no backward to run
        return total, tokens.int(), _sums(token_loss_RSB, gate_logit_RSB, batch.mask_SB, total)

    return output_SBD, loss_of


@torch.no_grad()
def _sums(token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor, total: Tensor) -> Tensor:
    """[tokens, loss, entropy, loss per loop (R), exit probability per loop (R)], each summed over tokens."""
    log_p_RSB = exit_log_probs(gate_logit_RSB)
    entropy = (exit_entropy(log_p_RSB) * mask_SB).sum()
    per_loop = (token_loss_RSB * mask_SB).flatten(1).sum(1)
    exits = (log_p_RSB.exp() * mask_SB).flatten(1).sum(1)
    return torch.cat((torch.stack((mask_SB.sum(), total.detach(), entropy)), per_loop, exits)).double()


class Stepper:
    """Runs training and validation steps of one model."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        loss: LossConfig,
        groups: ProcessGroupCollection,
        seq_length: int,
        micro_batch_size: int,
    ) -> None:
        self.ddp, self.optimizer, self.scheduler, self.groups = ddp, optimizer, scheduler, groups
        self._forward_step = partial(_forward_step, loss)
        self._frozen = loss.frozen_trunk
        self._num_loops = inner_model(ddp).model_config.num_loops
        self._stages = loop_stages(ddp) if groups.pp.size() > 1 else None
        self._shape = {"seq_length": seq_length, "micro_batch_size": micro_batch_size}

    def train(self, batches: Iterator[Batch], num_microbatches: int) -> tuple[StepStats, float, float]:
        """One optimizer step. Returns its statistics, the gradient norm before clipping, and the learning rate."""
        stats = self.backward(batches, num_microbatches)
        self.scheduler.step(1)
        _, grad_norm, _ = self.optimizer.step()
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        return stats, float(grad_norm or 0.0), learning_rate

    def backward(self, batches: Iterator[Batch], num_microbatches: int) -> StepStats:
        """Forward and backward of a step: afterwards each ``main_grad`` holds the mean gradient over its tokens."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        gate_only = self._stages is not None and self._frozen
        sums = self._run(batches, num_microbatches, forward_only=gate_only)
        if gate_only:
            self.ddp.module.config.finalize_model_grads_func(None, sums[0].int(), pg_collection=self.groups)
        return self._mean(sums)

    def evaluate(self, batches: Iterator[Batch], num_microbatches: int) -> StepStats:
        """Statistics of ``num_microbatches`` micro-batches per rank, without gradients."""
        self.ddp.eval()
        with torch.no_grad():
            return self._mean(self._run(batches, num_microbatches, forward_only=True))

    def _run(self, batches: Iterator[Batch], num_microbatches: int, forward_only: bool) -> Tensor:
        """Statistics of this rank's tokens, summed over its micro-batches; zeros off the last pipeline rank."""
        batches = (batch.deal(self.groups.cp) for batch in batches)
        schedule = partial(
            self._forward_backward(),
            forward_step_func=self._forward_step,
            num_microbatches=num_microbatches,
            forward_only=forward_only,
            **self._shape,
        )
        if self._stages is None:
            sums = schedule(data_iterator=batches, model=[self.ddp])
        else:
            for stage in self._stages:
                stage.restart()
            copies = list(tee(islice(batches, num_microbatches), len(self._stages)))
            sums = schedule(data_iterator=copies, model=self._stages)
        return torch.stack(sums).sum(0) if sums else torch.zeros(3 + 2 * self._num_loops, dtype=torch.float64)

    def _forward_backward(self) -> Callable[..., list[Tensor]]:
        return get_forward_backward_func(self.groups.pp.size(), None if self._stages is None else len(self._stages))

    def _mean(self, sums: Tensor) -> StepStats:
        sums = sums.to(DEVICE)
        dist.all_reduce(sums, group=self.groups.dp_cp)
        dist.all_reduce(sums, group=self.groups.pp)  # only the last pipeline rank has any
        tokens, means = int(sums[0]), (sums[1:] / sums[0].clamp(min=1)).tolist()
        num_loops = (len(means) - 2) // 2
        exits = means[2 + num_loops :]
        return StepStats(
            tokens=tokens,
            loss=means[0],
            entropy=means[1],
            loss_per_loop=means[2 : 2 + num_loops],
            exit_distribution=exits,
            mean_depth=sum((loop + 1) * share for loop, share in enumerate(exits)),
        )
