"""Loss and statistics of one micro-batch, as Megatron's schedules ask for them.

Shapes: S sequence, B micro-batch, R loops.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from looplm.config import LossConfig
from looplm.model import LoopLM
from looplm.model.exit_gate import exit_entropy, exit_log_probs
from looplm.model.losses import adaptive_gate_loss, entropy_regularised_loss, geometric_prior, token_losses
from looplm.model.pipeline import LoopView
from pretrain.data import Batch
from pretrain.norms import LoopNorms


@dataclass(frozen=True)
class StepStats:
    """Means over the unmasked tokens of a step; lists have one entry per loop."""

    tokens: int
    loss: float
    loss_per_loop: list[float]
    exit_distribution: list[float]
    mean_depth: float
    entropy: float

    @classmethod
    def of_sums(cls, sums: Tensor) -> "StepStats":
        """Return the statistics of :func:`statistics_sums`, added up over micro-batches and ranks."""
        loss, entropy, *per_loop = (sums[1:] / sums[0].clamp(min=1)).tolist()
        losses, exits = per_loop[: len(per_loop) // 2], per_loop[len(per_loop) // 2 :]
        depth = sum((loop + 1) * share for loop, share in enumerate(exits))
        return cls(int(sums[0]), loss, losses, exits, depth, entropy)


def objective(loss: LossConfig, token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor) -> Tensor:
    """Return the training stage's loss, a mean over the unmasked tokens."""
    if loss.objective == "adaptive_gate":
        return adaptive_gate_loss(
            token_loss_RSB,
            gate_logit_RSB,
            slope=loss.slope,
            threshold=loss.threshold,
            target=loss.target,
            mask_SB=mask_SB,
        )
    prior_R = geometric_prior(token_loss_RSB.size(0), loss.geometric_rate) if loss.prior == "geometric" else None
    return entropy_regularised_loss(token_loss_RSB, gate_logit_RSB, loss.beta, mask_SB, prior_R)


def loop_losses(
    model: LoopLM | DistributedDataParallel,
    batch: Batch,
    loss: LossConfig,
    frozen: bool = False,
    num_loops: int | None = None,
    norms: LoopNorms | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and gate logit of each token after each loop, both [R, S, B].

    ``norms`` takes the norms of the hidden states.
    """
    output = model(batch.ids_BS, num_loops, batch.document_start_SB, frozen)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    head = head_losses(inner, batch, loss)
    if norms is not None:
        for loop, h_SBD in enumerate(output.hidden):
            norms.watch(loop, h_SBD)
    return torch.stack([head(h_SBD) for h_SBD in output.hidden]), output.gate_logit_RSB


def head_losses(model: LoopLM, batch: Batch, loss: LossConfig) -> Callable[[Tensor], Tensor]:
    """Return the function from a hidden state to the cross-entropy [S, B] of the batch's labels."""
    return partial(
        token_losses,
        weight_VD=model.head_weight(),
        labels_SB=batch.labels_SB,
        chunk_tokens=loss.head_chunk_tokens,
        group=model.tp_group,
        recompute=loss.head_recompute,
        sequence_parallel=model.config.sequence_parallel,
    )


def forward_step(
    loss: LossConfig, norms: LoopNorms, batches: Iterator[Batch], model: LoopLM | LoopView
) -> tuple[Tensor, Callable[..., object]]:
    """Run one micro-batch forward; return the output and the function that Megatron's schedules call for its loss."""
    batch, frozen = next(batches), loss.frozen_trunk
    norms.forget_recomputed()
    if isinstance(model, LoopView):
        head = head_losses(model.inner, batch, loss) if model.inner.post_process else None

        def watched_head(h_SBD: Tensor) -> Tensor:
            norms.watch(model.loop, h_SBD)
            assert head is not None
            return head(h_SBD)

        output_SBD, *losses = model(batch.ids_BS, batch.document_start_SB, watched_head, frozen)
    else:
        losses = list(loop_losses(model, batch, loss, frozen, norms=norms))
        output_SBD = losses[0]

    def loss_of(_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        token_loss_RSB, gate_logit_RSB = losses
        tokens = batch.mask_SB.sum()
        total = objective(loss, token_loss_RSB, gate_logit_RSB, batch.mask_SB) * tokens
        if frozen and isinstance(model, LoopView) and torch.is_grad_enabled():
            total.backward()  # only this rank has a graph, the gate's: the schedule runs forward passes only
        return total, tokens.int(), statistics_sums(token_loss_RSB, gate_logit_RSB, batch.mask_SB, total)

    return output_SBD, loss_of


@torch.no_grad()
def statistics_sums(token_loss_RSB: Tensor, gate_logit_RSB: Tensor, mask_SB: Tensor, total: Tensor) -> Tensor:
    """Return [tokens, loss, entropy, loss per loop (R), exit probability per loop (R)], each summed over tokens."""
    log_p_RSB = exit_log_probs(gate_logit_RSB)
    entropy = (exit_entropy(log_p_RSB) * mask_SB).sum()
    per_loop = (token_loss_RSB * mask_SB).flatten(1).sum(1)
    exits = (log_p_RSB.exp() * mask_SB).flatten(1).sum(1)
    return torch.cat((torch.stack((mask_SB.sum(), total.detach(), entropy)), per_loop, exits)).double()
