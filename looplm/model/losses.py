"""The losses: a cross-entropy per loop in bounded memory, and the training objectives of stage 1 and stage 2.

Shapes: S sequence, B batch, D hidden, V vocabulary (of this tensor-parallel rank), R loops, N = S * B tokens.
"""

from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from looplm.model.exit_gate import exit_entropy, exit_log_probs


def token_losses(
    hidden_SBD: Tensor,
    weight_VD: Tensor,
    labels_SB: Tensor,
    chunk_tokens: int,
    group: dist.ProcessGroup | None = None,
    recompute: bool = True,
    sequence_parallel: bool = False,
) -> Tensor:
    """Return the cross-entropy of each token in nats, computed for ``chunk_tokens`` rows of logits at a time.

    With ``recompute`` only the loss and the log-sum-exp are kept, and backward recomputes the logits chunk by chunk.
    Otherwise R loops over a 49K vocabulary would hold ``[R * S * B, V]``.

    Args:
        hidden_SBD: the head's input; this rank's part of the sequence under sequence parallelism.
        weight_VD: the head's matrix, or this rank's rows of it.
        labels_SB: token ids over the whole vocabulary.
        chunk_tokens: rows of logits computed at once.
        group: tensor-parallel group that splits the vocabulary; None or a group of one if it is whole.
        recompute: keep no logits for backward; False keeps all, which saves a third of the head's forward work.
        sequence_parallel: True if the ranks of ``group`` hold consecutive parts of the sequence.

    Returns:
        loss [S, B] in fp32, equal on every rank of ``group``.
    """
    group = None if group is None or group.size() == 1 else group
    if group is not None:  # backward sums the hidden state's gradients over the ranks' parts of the vocabulary
        gather = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
        hidden_SBD = gather(hidden_SBD, group=group)
    keep = not recompute and torch.is_grad_enabled()
    loss_N = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden_SBD.flatten(0, 1), weight_VD, labels_SB.flatten(), chunk_tokens, group, keep
    )
    return loss_N.view(labels_SB.shape)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Linear head and softmax cross-entropy as one node of the autograd graph."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, chunk_tokens, group, keep):  # type: ignore[no-untyped-def]
        loss_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(loss_N)
        local_N, owned_N = _local_labels(labels_N, weight_VD.size(0), group)
        ctx.kept = []
        for part in _parts(labels_N.numel(), chunk_tokens):
            logits = _logits(hidden_ND[part], weight_VD)
            target = logits.gather(1, local_N[part, None]).squeeze(1) * owned_N[part]
            lse = logits.logsumexp(1)
            if group is not None:
                dist.all_reduce(target, group=group)
                lse = _all_logsumexp(lse, group)
            lse_N[part] = lse
            loss_N[part] = lse - target
            if keep:
                ctx.kept.append(logits)
        ctx.save_for_backward(hidden_ND, weight_VD, local_N, owned_N, lse_N)
        ctx.chunk_tokens = chunk_tokens
        return loss_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, local_N, owned_N, lse_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_ND) if needs_hidden else None
        # Chunks are summed in fp32: bf16 sums of hundreds of chunks would lose small contributions.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for index, part in enumerate(_parts(grad_N.numel(), ctx.chunk_tokens)):
            logits = ctx.kept[index] if ctx.kept else _logits(hidden_ND[part], weight_VD)
            probs = logits.sub_(lse_N[part, None]).exp_()
            probs.scatter_add_(1, local_N[part, None], -owned_N[part, None])
            grad_logits = probs.mul_(grad_N[part, None]).to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[part])
            if grad_weight is not None and grad_weight.dtype == grad_logits.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden_ND[part])
            elif grad_weight is not None:
                grad_weight += grad_logits.t() @ hidden_ND[part]
        ctx.kept = []
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None, None, None, None


def _parts(tokens: int, chunk_tokens: int) -> list[slice]:
    return [slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens)]


def _logits(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return (hidden_ND @ weight_VD.t()).float()


def _local_labels(labels_N: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return each label's row in this rank's part of the head, and 1.0 where this rank has the label."""
    offset = 0 if group is None else dist.get_rank(group) * rows
    local_N = labels_N - offset
    owned_N = (local_N >= 0) & (local_N < rows)
    return local_N.clamp(0, rows - 1), owned_N.float()


def _all_logsumexp(lse_N: Tensor, group: dist.ProcessGroup) -> Tensor:
    largest_N = lse_N.clone()
    dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
    total_N = (lse_N - largest_N).exp()
    dist.all_reduce(total_N, group=group)
    return largest_N + total_N.log()


def masked_mean(value_SB: Tensor, mask_SB: Tensor | None) -> Tensor:
    """Return the mean over the tokens with mask 1; 0 if there are no such tokens."""
    if mask_SB is None:
        return value_SB.mean()
    mask_SB = mask_SB.to(value_SB.dtype)
    return (value_SB * mask_SB).sum() / mask_SB.sum().clamp(min=1.0)


def entropy_regularised_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    beta: float,
    mask_SB: Tensor | None = None,
    prior_R: Tensor | None = None,
) -> Tensor:
    """Return stage 1's loss (Ouro eq. 4): the mean over tokens of ``sum_r p_r L_r - beta H(p)``.

    It is the expectation of the losses, not the loss of the mixed predictions. With ``prior_R`` the regularizer is
    ``+ beta KL(p || prior)``; a uniform prior differs from the entropy form only by the constant ``beta log R``.

    Args:
        token_loss_RSB: cross-entropy after each loop.
        gate_logit_RSB: the gate's logit after each loop.
        beta: weight of the regularizer.
        mask_SB: 1 for tokens that count.
        prior_R: prior of the exit distribution; None means uniform.
    """
    log_p_RSB = exit_log_probs(gate_logit_RSB)
    expected_SB = (log_p_RSB.exp() * token_loss_RSB).sum(0)
    regularizer_SB = -exit_entropy(log_p_RSB)
    if prior_R is not None:
        regularizer_SB = regularizer_SB - torch.einsum("rsb,r->sb", log_p_RSB.exp(), prior_R.to(log_p_RSB).log())
    return masked_mean(expected_SB + beta * regularizer_SB, mask_SB)


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
