"""The training objectives of stage 1 and stage 2, from each loop's cross-entropies and gate logits.

Shapes: S sequence, B batch, R loops.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from looplm.model.exit_gate import exit_entropy, exit_log_probs
from looplm.model.head import HeadLosses


class LoopLosses(NamedTuple):
    """Losses and gate logits of all loops, from which an objective is computed."""

    token_loss_RSB: Tensor  # cross-entropy in nats
    gate_logit_RSB: Tensor
    expected: Tensor | None  # sum over loops and tokens of p_r times the cross-entropy; None if the gate alone trains
    penalty_SB: Tensor | None = None  # of the states, if the objective has one (loss.stability)

    @classmethod
    def of(cls, losses: Sequence[HeadLosses], gate_logit_RSB: Tensor, penalty_SB: Tensor | None = None) -> "LoopLosses":
        """Join the losses of each loop."""
        token_loss_RSB = torch.stack([loss.token_loss_SB for loss in losses])
        expected = [loss.expected for loss in losses if loss.expected is not None]
        total = torch.stack(expected).sum() if expected else None
        return cls(token_loss_RSB, gate_logit_RSB, total, penalty_SB)


def masked_mean(value_SB: Tensor, mask_SB: Tensor | None) -> Tensor:
    """Return the mean over the tokens with mask 1; 0 if there are no such tokens."""
    if mask_SB is None:
        return value_SB.mean()
    mask_SB = mask_SB.to(value_SB.dtype)
    return (value_SB * mask_SB).sum() / mask_SB.sum().clamp(min=1.0)


def exit_regularizer(gate_logit_RSB: Tensor, prior_R: Tensor | None = None, mean_p_R: Tensor | None = None) -> Tensor:
    """Return what stage 1 adds to a token's expected loss, before the weight beta (Ouro eq. 4): [S, B].

    It is ``-H(p)``, or ``KL(p || prior)``. A uniform prior differs from the entropy form only by the constant log R.
    The expected loss itself, ``sum_r p_r L_r``, comes from :func:`looplm.model.head.weighted_losses`. It is the
    expectation of the losses, not the loss of the mixed predictions.

    With the mean distribution m of N tokens, it is each token's share of ``N KL(m || prior)``, which is
    ``sum_r p_r log(m_r / prior_r)``. The derivative of ``m_r log m_r`` is ``log m_r + 1``, and the 1 adds nothing,
    because the p_r of a token sum to 1. So m is a constant here, and the gradients are still those of the divergence.

    Args:
        gate_logit_RSB: the gate's logit after each loop.
        prior_R: prior of the exit distribution; None means uniform.
        mean_p_R: from :func:`mean_exit_distribution`; None compares each token's own distribution with the prior.
    """
    log_p_RSB = exit_log_probs(gate_logit_RSB)
    if mean_p_R is None:
        regularizer_SB = -exit_entropy(log_p_RSB)
    else:
        regularizer_SB = torch.einsum("rsb,r->sb", log_p_RSB.exp(), mean_p_R.log())
    if prior_R is not None:
        regularizer_SB = regularizer_SB - torch.einsum("rsb,r->sb", log_p_RSB.exp(), prior_R.to(log_p_RSB).log())
    return regularizer_SB


@torch.no_grad()
def mean_exit_distribution(gate_logit_RSB: Tensor, mask_SB: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return the mean exit distribution [R] of the tokens with mask 1, on all ranks of ``group`` together."""
    p_RSB = exit_log_probs(gate_logit_RSB).exp() * mask_SB
    sums = torch.cat((p_RSB.flatten(1).sum(1), mask_SB.sum().to(p_RSB)[None]))
    if group is not None and group.size() > 1:
        dist.all_reduce(sums, group=group)
    smallest = torch.finfo(sums.dtype).tiny  # a loop that no token leaves after has a finite logarithm
    return (sums[:-1] / sums[-1].clamp(min=1)).clamp(min=smallest)


def mean_depth(gate_logit_RSB: Tensor) -> Tensor:
    """Return the expected number of loops of each token under its exit distribution: [S, B]."""
    p_RSB = exit_log_probs(gate_logit_RSB).exp()
    return torch.einsum("rsb,r->sb", p_RSB, torch.arange(1, len(p_RSB) + 1).to(p_RSB))


def state_changes(hidden: Sequence[Tensor]) -> Tensor:
    """Return how much the loops change each token's state: the sum of |h_r - h_{r-1}|² / D over r > 1, [S, B].

    Args:
        hidden: after each loop [S, B, D], in fp32 or lower; computed in fp32.
    """
    states = [h_SBD.float() for h_SBD in hidden]
    changes = [(after - before).square().mean(-1) for before, after in pairwise(states)]
    return torch.stack(changes).sum(0) if changes else torch.zeros_like(states[0][..., 0])


def adaptive_gate_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    *,
    slope: float,
    threshold: float,
    target: Literal["paper", "next"],
    mask_SB: Tensor | None = None,
) -> Tensor:
    """Return stage 2's loss (Ouro section 3.4): the gate learns to continue exactly where the next loop still helps.

    ``I_t = max(0, L_{t-1} - L_t)`` is detached, and ``w_t = sigmoid(slope (I_t - threshold))`` says how much loop t was
    worth. The loss is the binary cross-entropy between the continue probability ``1 - lambda`` and w_t, summed over
    t = 2..R, times 1/R.

    Args:
        token_loss_RSB: cross-entropy after each loop; no gradient flows into it.
        gate_logit_RSB: the gate's logit after each loop.
        slope: steepness k of w_t.
        threshold: smallest gain, in nats, that is worth a loop.
        target: ``paper``: lambda_t is compared with w_t as printed, which leaves lambda_1 untrained and trains
            lambda_R, which nothing uses. ``next``: lambda_t is compared with w_{t+1}, so that it predicts the gain.
        mask_SB: 1 for tokens that count.
    """
    num_loops = token_loss_RSB.size(0)
    gain = (token_loss_RSB[:-1] - token_loss_RSB[1:]).clamp(min=0).detach()
    worth = torch.sigmoid(slope * (gain - threshold))
    logit = gate_logit_RSB[1:] if target == "paper" else gate_logit_RSB[:-1]
    per_loop = F.binary_cross_entropy_with_logits(-logit, worth, reduction="none")
    return masked_mean(per_loop.sum(0) / num_loops, mask_SB)


def geometric_prior(num_loops: int, rate: float) -> Tensor:
    """Return ``p_r`` proportional to ``rate (1 - rate)^(r-1)``, normalized over R loops: [R]."""
    weight_R = rate * (1 - rate) ** torch.arange(num_loops, dtype=torch.float32)
    return weight_R / weight_R.sum()
