"""Loss and statistics of one micro-batch, as Megatron's schedules ask for them.

Shapes: S sequence, B micro-batch, R loops.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from looplm.config import LossConfig
from looplm.model import LoopLM, LoopOutput
from looplm.model.exit_gate import exit_entropy, exit_log_probs
from looplm.model.head import DirectGradient, HeadLosses, token_losses, weighted_losses
from looplm.model.losses import (
    LoopLosses,
    adaptive_gate_loss,
    exit_regularizer,
    geometric_prior,
    mean_depth,
    mean_exit_distribution,
    state_changes,
)
from looplm.model.pipeline import Head, LoopView
from pretrain.data import Batch
from pretrain.norms import LoopNorms


@dataclass(frozen=True)
class StepStats:
    """Means over the unmasked tokens of a step; lists have one entry per loop.

    A loop that the step did not run has the loss NaN and the exit probability 0.
    """

    tokens: int
    loss: float
    loss_per_loop: list[float]
    exit_distribution: list[float]
    mean_depth: float
    entropy: float

    @classmethod
    def of_sums(cls, sums: Tensor, loops: int | None = None) -> "StepStats":
        """Return the statistics of :func:`statistics_sums`, added up over micro-batches and ranks.

        ``loops`` is how many the step ran; None for all.
        """
        loss, entropy, *per_loop = (sums[1:] / sums[0].clamp(min=1)).tolist()
        losses, exits = per_loop[: len(per_loop) // 2], per_loop[len(per_loop) // 2 :]
        losses = [value if loop < (loops or len(losses)) else math.nan for loop, value in enumerate(losses)]
        depth = sum((loop + 1) * share for loop, share in enumerate(exits))
        return cls(int(sums[0]), loss, losses, exits, depth, entropy)


def objective(loss: LossConfig, losses: LoopLosses, mask_SB: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the training stage's loss, summed over the unmasked tokens.

    It is a sum because the head has computed its gradients for the factor 1 (:func:`direct_gradient`). Megatron divides
    the gradients by the number of tokens when those of all micro-batches and ranks are together.

    Args:
        loss: which stage, and its weights.
        losses: of a micro-batch, or of this context-parallel rank's tokens of it.
        mask_SB: 1 for tokens that count.
        group: the ranks that hold the micro-batch's other tokens.
    """
    gate_logit_RSB = losses.gate_logit_RSB
    if losses.expected is None:
        mean = adaptive_gate_loss(
            losses.token_loss_RSB,
            gate_logit_RSB,
            slope=loss.slope,
            threshold=loss.threshold,
            target=loss.target,
            mask_SB=mask_SB,
        )
        return mean * mask_SB.sum()
    total = losses.expected if losses.penalty_SB is None else losses.expected + (losses.penalty_SB * mask_SB).sum()
    if loss.weights != "gate":
        return total
    mean_p_R = mean_exit_distribution(gate_logit_RSB, mask_SB, group) if loss.regularizer == "batch" else None
    added_SB = loss.beta * exit_regularizer(gate_logit_RSB, prior_of(loss, len(gate_logit_RSB)), mean_p_R)
    if loss.ponder_cost:
        added_SB = added_SB + loss.ponder_cost * mean_depth(gate_logit_RSB)
    return total + (added_SB * mask_SB).sum()


def prior_of(loss: LossConfig, num_loops: int) -> Tensor | None:
    """Return the prior over the first ``num_loops`` loops; None for the uniform one."""
    if loss.prior == "geometric":
        return geometric_prior(num_loops, loss.geometric_rate)
    if loss.prior == "given":
        shares_R = torch.tensor(loss.prior_shares[:num_loops])
        return shares_R / shares_R.sum()
    return None


def loop_losses(
    model: LoopLM | DistributedDataParallel,
    batch: Batch,
    loss: LossConfig,
    num_loops: int | None = None,
    norms: LoopNorms | None = None,
    gate_loops: int | None = None,
) -> LoopLosses:
    """Return the losses and gate logits of each token after each loop.

    ``norms`` takes the norms of the loops' states. The gate distributes exits over
    ``gate_loops`` loops, None for the model's.
    With autograd and Megatron's wrapper, the gradient of the head's weight is in its buffer when this returns
    (:func:`head_of`).
    """
    options = loss.frozen_trunk, loss.backward_loops, gate_loops
    output = model(batch.ids_BS, num_loops, batch.document_start_SB, *options)
    head = head_of(model, batch, loss, gate_loops)
    if norms is not None:
        for loop, h_SBD in enumerate(output.state):
            norms.watch(loop, h_SBD)
    exit_RSB, last_loop = exit_log_probs(output.gate_logit_RSB).exp(), len(output.hidden) - 1
    losses = [
        head(h_SBD, exit_SB, loop == last_loop)
        for loop, (h_SBD, exit_SB) in enumerate(zip(output.hidden, exit_RSB, strict=True))
    ]
    return LoopLosses.of(losses, output.gate_logit_RSB, _penalty(model, output, loss))


def _penalty(model: LoopLM | DistributedDataParallel, output: LoopOutput, loss: LossConfig) -> Tensor | None:
    """Return the penalty of the states of the whole sequence, if the loss has one."""
    if not loss.stability:
        return None
    inner: LoopLM = model.module if isinstance(model, DistributedDataParallel) else model
    penalty_SB = loss.stability * state_changes(output.hidden)
    if inner.config.sequence_parallel:  # equal on every rank, as the gate's logits are
        penalty_SB = gather_from_sequence_parallel_region(
            penalty_SB, tensor_parallel_output_grad=False, group=inner.tp_group
        )
    return penalty_SB


def head_of(model: LoopLM | DistributedDataParallel, batch: Batch, loss: LossConfig, loops: int | None = None) -> Head:
    """Return the head for the loops of a micro-batch; ``loops`` is their number in a step, None for the model's.

    In stage 1 it weighs each loop's cross-entropies as ``loss.weights`` says, and computes the gradients together with
    the losses. If the model is in Megatron's wrapper, the weight's gradient goes into its buffer at once.
    """
    ddp = model if isinstance(model, DistributedDataParallel) else None
    inner: LoopLM = model if ddp is None else ddp.module
    group, sequence_parallel = inner.tp_group, inner.config.sequence_parallel

    def head(h_SBD: Tensor, exit_SB: Tensor, last: bool) -> HeadLosses:
        inputs = h_SBD, inner.head_weight(), batch.labels_SB
        if loss.frozen_trunk:
            return HeadLosses(token_losses(*inputs, group, sequence_parallel), None)
        if loss.weights == "last" and not last:
            with torch.no_grad():
                return HeadLosses(token_losses(*inputs, group, sequence_parallel), None)
        fixed = 1.0 if loss.weights == "last" else 1 / (loops or inner.model_config.num_loops)
        weight_SB = (exit_SB if loss.weights == "gate" else fixed) * batch.mask_SB
        direct = None if ddp is None else direct_gradient(ddp, last)
        return weighted_losses(*inputs, weight_SB, group, sequence_parallel, direct)

    return head


def direct_gradient(ddp: DistributedDataParallel, last: bool) -> DirectGradient:
    """Return the buffer for the gradient of the head's weight, and how Megatron will scale the loss.

    Megatron starts backward from ``grad_scale_func(loss)``, and divides nothing by the number of micro-batches or
    tokens before (``calculate_per_token_loss``). The last loop's call signals that the gradient is complete: when its
    backward runs, the forward passes of the micro-batch are done. A tied weight's hook is called by the embedding,
    whose backward is the last of all; without overlap the hook has nothing to do.
    """
    inner: LoopLM = ddp.module
    tied, scale = inner.model_config.tie_embeddings, inner.config.grad_scale_func
    into_VD: Tensor = inner.head_weight().main_grad  # type: ignore[attr-defined]
    return DirectGradient(
        into_VD,
        scale=None if scale is None else scale(torch.ones((), device=into_VD.device)),
        signals=last and not tied and ddp.ddp_config.overlap_grad_reduce,
    )


def forward_step(
    loss: LossConfig,
    norms: LoopNorms,
    batches: Iterator[Batch],
    model: DistributedDataParallel | LoopView,
    loops: int | None = None,
) -> tuple[Tensor, Callable[..., object]]:
    """Run one micro-batch forward; return the output and the function that Megatron's schedules call for its loss.

    ``loops`` is how many the step runs, None for all; a view knows it already.
    """
    batch = next(batches)
    norms.forget_recomputed()
    if isinstance(model, LoopView):
        head = head_of(model.ddp, batch, loss, model.loops)
        options = loss.frozen_trunk, loss.backward_loops, partial(norms.watch, model.loop)
        output_SBD, losses = model(batch.ids_BS, batch.document_start_SB, head, *options)
    else:
        losses = loop_losses(model, batch, loss, loops, norms, loops)
        output_SBD = losses.token_loss_RSB

    def loss_of(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner: LoopLM = model.inner if isinstance(model, LoopView) else model.module
        tokens, total = batch.mask_SB.sum(), objective(loss, losses, batch.mask_SB, inner.cp_group)
        if loss.frozen_trunk and isinstance(model, LoopView) and torch.is_grad_enabled():
            total.backward()  # only this rank has a graph, the gate's: the schedule runs forward passes only
        return total, tokens.int(), statistics_sums(losses, batch.mask_SB, total, inner.model_config.num_loops)

    return output_SBD, loss_of


@torch.no_grad()
def statistics_sums(losses: LoopLosses, mask_SB: Tensor, total: Tensor, num_loops: int) -> Tensor:
    """Return [tokens, loss, entropy, loss per loop (R), exit probability per loop (R)], each summed over tokens.

    The sums of those of the R = ``num_loops`` loops that did not run are zeros.
    """
    log_p_RSB = exit_log_probs(losses.gate_logit_RSB)
    entropy = (exit_entropy(log_p_RSB) * mask_SB).sum()
    per_loop = (losses.token_loss_RSB * mask_SB).flatten(1).sum(1)
    exits = (log_p_RSB.exp() * mask_SB).flatten(1).sum(1)
    per_loop, exits = (F.pad(sums, (0, num_loops - len(sums))) for sums in (per_loop, exits))
    return torch.cat((torch.stack((mask_SB.sum(), total.detach(), entropy)), per_loop, exits)).double()
