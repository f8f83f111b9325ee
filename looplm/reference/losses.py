"""The exit distribution and the losses of both training stages, from every loop's cross-entropies and gate logits.

Shapes: B batch, S sequence, D hidden, V vocabulary, R loops.

Sources: both losses, Q-exit: Ouro (arXiv 2510.25741).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.reference.model import at_least_fp32


def exit_distribution(gate_logit_RSB: Tensor) -> Tensor:
    """Return p_r = lambda_r * prod_{j<r} (1 - lambda_j), lambda = sigmoid(logit); the last loop takes the rest."""
    survival_SB, p = torch.ones_like(gate_logit_RSB[0]), []
    for logit_SB in gate_logit_RSB[:-1]:
        p.append(survival_SB * torch.sigmoid(logit_SB))
        survival_SB = survival_SB * torch.sigmoid(-logit_SB)
    return torch.stack([*p, survival_SB])


def entropy(p_RSB: Tensor) -> Tensor:
    return -(p_RSB * p_RSB.log()).sum(0)


def q_exit(p_RSB: Tensor, threshold: float) -> Tensor:
    """Return the depth [S, B] from 1: the first loop by which the exit mass reaches the threshold, R at 1. Slow."""
    depths = []
    for p_R in p_RSB.flatten(1).T.tolist():
        reached = [depth for depth, mass in enumerate(accumulate(p_R), start=1) if mass >= threshold]
        depths.append(reached[0] if reached and threshold < 1 else len(p_R))
    return torch.tensor(depths).view(p_RSB.shape[1:])


def token_losses(hidden_SBD: Tensor, weight_VD: Tensor, labels_SB: Tensor) -> Tensor:
    """Return the cross-entropy [S, B] of each token, from the whole matrix of logits [S, B, V]."""
    logits_SBV = F.linear(hidden_SBD, weight_VD)
    logits_SBV = logits_SBV.to(at_least_fp32(logits_SBV))
    return F.cross_entropy(logits_SBV.flatten(0, 1), labels_SB.flatten(), reduction="none").view_as(labels_SB)


def entropy_regularised_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    beta: float,
    mask_SB: Tensor | None = None,
    prior_R: Tensor | None = None,
    of_batch: bool = False,
    ponder_cost: float = 0.0,
) -> Tensor:
    """Return stage 1's loss, sum_r p_r (ce_r + r cost) - beta H(p) or + beta KL(p || prior), or the mean p's."""
    p_RSB = exit_distribution(gate_logit_RSB)
    cost_RSB = token_loss_RSB + ponder_cost * torch.arange(1, len(p_RSB) + 1)[:, None, None]
    held_RSB = torch.stack([masked_mean(p_SB, mask_SB).expand_as(p_SB) for p_SB in p_RSB]) if of_batch else p_RSB
    prior_R11 = 1 if prior_R is None else prior_R.to(p_RSB)[:, None, None]
    penalty_SB = (held_RSB * (held_RSB / prior_R11).log()).sum(0)
    return masked_mean((p_RSB * cost_RSB).sum(0) + beta * penalty_SB, mask_SB)


def state_changes(hidden: Sequence[Tensor]) -> Tensor:
    """Return sum_r |h_r - h_(r-1)|^2 / D of each token, a SB tensor."""
    total_SB = torch.zeros_like(hidden[0][..., 0])
    for before_SBD, after_SBD in pairwise(hidden):
        total_SB = total_SB + torch.linalg.vector_norm(after_SBD - before_SBD, dim=-1) ** 2 / after_SBD.shape[-1]
    return total_SB


def adaptive_gate_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    slope: float = 50.0,
    threshold: float = 0.005,
    mask_SB: Tensor | None = None,
    target: str = "paper",
) -> Tensor:
    """Return stage 2's loss: continue where one more loop still helps.

    w_t, t = 2..R, says how much loop t improved on loop t - 1. "paper" trains lambda_t on it, as printed; "next" trains
    lambda_{t-1}, which decides whether loop t is run at all.
    """
    loops = token_loss_RSB.shape[0]
    total_SB = torch.zeros_like(token_loss_RSB[0])
    for t in range(1, loops):
        improvement_SB = (token_loss_RSB[t - 1] - token_loss_RSB[t]).clamp(min=0).detach()
        w_SB = torch.sigmoid(slope * (improvement_SB - threshold))
        logit_SB = gate_logit_RSB[t if target == "paper" else t - 1]
        # Binary cross-entropy between the continue probability, 1 - lambda = sigmoid(-logit), and w.
        total_SB = total_SB - w_SB * F.logsigmoid(-logit_SB) - (1 - w_SB) * F.logsigmoid(logit_SB)
    return masked_mean(total_SB / loops, mask_SB)


def geometric_prior(num_loops: int, rate: float) -> Tensor:
    p_R = torch.tensor([rate * (1 - rate) ** loop for loop in range(num_loops)], dtype=torch.float64)
    return p_R / p_R.sum()


def masked_mean(x_SB: Tensor, mask_SB: Tensor | None) -> Tensor:
    """Return the mean over the tokens with mask 1; zero if there are no such tokens."""
    mask_SB = torch.ones_like(x_SB) if mask_SB is None else mask_SB.to(x_SB.dtype)
    return (x_SB * mask_SB).sum() / mask_SB.sum().clamp(min=1)
