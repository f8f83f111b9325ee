"""The head: each token's cross-entropy after a loop, and its gradients, in bounded memory.

Stage 1 minimizes ``sum_r p_r ce_r``, and p_r is known when loop r ends: it depends on the gates of loops up to r alone.
So the gradient of each cross-entropy is known before the logits are, and :func:`weighted_losses` computes loss and
gradients in one pass over chunks of tokens. For a chunk with labels Y (one-hot) and weights w = p_r::

    logits = h Wᵀ      E = exp(logits - shift)      z = sum(E)
    G = E - z Y        grad_h = w / z (G W)         grad_W += Gᵀ (w / z h)

G is z times the gradient of the logits, P - Y: dividing by z later, in D columns, saves a pass over V of them. These
are three matrix products: no logits are kept and none are recomputed. What is kept until backward has the size of the
hidden state. :func:`token_losses` is the same head where the weights are not known first.

Shapes: S sequence, B batch, D hidden, V vocabulary (of this tensor-parallel rank), N = S * B tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

# Bytes of a chunk's logits, counted in fp32. Each chunk reads and writes the whole weight gradient, so small ones are
# slow: on a CPU the head takes 1.2x its time with 64 MiB with 16, and a whole step 1.02x its time with 128 with 64 or
# 256 (docs/LOG.md). The number for CUDA is computed, not measured.
LOGIT_BYTES = {"cpu": 2**27, "cuda": 2**29}
BLOCK_BYTES = 2**21  # what a CPU's core keeps in its cache, counted in fp32


class HeadLosses(NamedTuple):
    """Losses after one loop."""

    token_loss_SB: Tensor  # cross-entropy in nats, fp32
    expected: Tensor | None  # sum of p_r times the cross-entropy; None if the objective is not an expectation


class DirectGradient(NamedTuple):
    """A gradient buffer to which :func:`weighted_losses` adds the head's weight gradient during the forward pass."""

    into_VD: Tensor  # the buffer
    scale: Tensor | None  # derivative of what backward starts from with respect to the expected loss; None for 1
    signals: bool  # in backward, call the hook on the weight that starts the reduction over the replicas


def token_losses(
    hidden_SBD: Tensor,
    weight_VD: Tensor,
    labels_SB: Tensor,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
) -> Tensor:
    """Return the cross-entropy of each token in nats: [S, B] in fp32, equal on every rank of ``group``.

    Backward recomputes the logits chunk by chunk.

    Args:
        hidden_SBD: the head's input; this rank's part of the sequence under sequence parallelism.
        weight_VD: the head's matrix, or this rank's rows of it.
        labels_SB: token ids over the whole vocabulary.
        group: tensor-parallel group that splits the vocabulary; None or a group of one if it is whole.
        sequence_parallel: True if the ranks of ``group`` hold consecutive parts of the sequence.
    """
    group = _splitting(group)
    if group is not None:  # backward sums the hidden state's gradients over the ranks' parts of the vocabulary
        gather = gather_from_sequence_parallel_region if sequence_parallel else copy_to_tensor_model_parallel_region
        hidden_SBD = gather(hidden_SBD, group=group)
    loss_N: Tensor = _TokenLosses.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden_SBD.flatten(0, 1), weight_VD, labels_SB.flatten(), group
    )
    return loss_N.view(labels_SB.shape)


def weighted_losses(
    hidden_SBD: Tensor,
    weight_VD: Tensor,
    labels_SB: Tensor,
    share_SB: Tensor,
    group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    direct: DirectGradient | None = None,
) -> HeadLosses:
    """Return the cross-entropies and their sum weighted by ``share_SB``, whose gradients are computed at once.

    Only the sum has gradients: those of the hidden state, of the weight, and of the share.

    Args:
        hidden_SBD: as for :func:`token_losses`, like the arguments that are not listed here.
        share_SB: weight of each token's cross-entropy in fp32, such as its probability of leaving after this loop, and
            0 where it does not count.
        direct: where the weight's gradient goes; None returns it in backward like any other. With it, backward fails
            unless the sum's gradient is ``direct.scale``.
    """
    if not torch.is_grad_enabled():
        loss_SB = token_losses(hidden_SBD, weight_VD, labels_SB, group, sequence_parallel)
        return HeadLosses(loss_SB, (share_SB * loss_SB).sum())
    if direct is not None and direct.signals:
        weight_VD.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's hook then adds nothing
    elif direct is not None:  # autograd runs the weight's hook for every call in its graph, also without a gradient
        weight_VD = weight_VD.detach()
    expected, loss_N = _WeightedLosses.apply(  # type: ignore[no-untyped-call]  # torch's
        hidden_SBD,
        weight_VD,
        labels_SB.flatten(),
        share_SB.flatten(),
        _splitting(group),
        sequence_parallel,
        direct,
    )
    return HeadLosses(loss_N.view(labels_SB.shape), expected)


class _WeightedLosses(torch.autograd.Function):
    """The weighted sum and its gradients as one node of the autograd graph."""

    @staticmethod
    def forward(ctx, hidden_SBD, weight_VD, labels_N, share_N, group, sequence_parallel, direct):  # type: ignore[no-untyped-def]
        scale = None if direct is None or direct.scale is None else direct.scale.reshape(())
        scattered = group is not None and sequence_parallel
        gathered_SBD = gather_from_sequence_parallel_region(hidden_SBD, group=group) if scattered else hidden_SBD
        hidden_ND = gathered_SBD.flatten(0, 1)
        factor_N1 = (share_N if scale is None else share_N * scale)[:, None]
        local_N, owned_N = _local_labels(labels_N, weight_VD.size(0), group)
        loss_N, grad_ND = torch.empty_like(share_N), torch.empty_like(hidden_ND)
        grad_VD = _accumulator(weight_VD, direct) if direct is not None or ctx.needs_input_grad[1] else None
        for part, logits in _chunks(hidden_ND, weight_VD):
            h = hidden_ND[part]
            loss_N[part], total_N = _losses_and_gradient(logits, local_N[part], owned_N[part], group)
            factor = factor_N1[part] / total_N[:, None]
            torch.mm(logits, weight_VD, out=grad_ND[part]).mul_(factor)
            if grad_VD is not None:
                _add_product(grad_VD, logits, (h * factor).to(h.dtype))
        if direct is not None and grad_VD is not direct.into_VD:
            direct.into_VD.add_(grad_VD)
        if scattered:
            grad_ND = reduce_scatter_to_sequence_parallel_region(grad_ND, group=group)
        elif group is not None:
            dist.all_reduce(grad_ND, group=group)
        ctx.save_for_backward(grad_ND.view_as(hidden_SBD), loss_N, scale, weight_VD, None if direct else grad_VD)
        ctx.is_direct = direct is not None
        ctx.mark_non_differentiable(loss_N)
        return (share_N * loss_N).sum(), loss_N

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        grad_SBD, loss_N, scale, weight_VD, grad_VD = ctx.saved_tensors
        grad_share_N = grad * loss_N if ctx.needs_input_grad[3] else None
        grad_weight = None
        if ctx.is_direct:
            wanted = torch.ones_like(grad) if scale is None else scale
            torch._assert_async(grad == wanted, "the head's gradients were computed for another scale of the loss")
            if ctx.needs_input_grad[1]:  # the hook wants a gradient, and does not read it
                grad_weight = torch.empty_like(weight_VD)
        else:
            grad_SBD = grad_SBD * grad
            grad_weight = None if grad_VD is None else (grad_VD * grad).to(weight_VD.dtype)
        return grad_SBD, grad_weight, None, grad_share_N, None, None, None


class _TokenLosses(torch.autograd.Function):
    """Each token's loss as one node of the autograd graph, which keeps no logits."""

    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, labels_N, group):  # type: ignore[no-untyped-def]
        loss_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        local_N, owned_N = _local_labels(labels_N, weight_VD.size(0), group)
        for part, logits in _chunks(hidden_ND, weight_VD):
            loss_N[part], _ = _losses(logits, local_N[part], owned_N[part], group)
        ctx.save_for_backward(hidden_ND, weight_VD, local_N, owned_N)
        ctx.group = group
        return loss_N

    @staticmethod
    def backward(ctx, grad_N):  # type: ignore[no-untyped-def]
        hidden_ND, weight_VD, local_N, owned_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_ND = torch.empty_like(hidden_ND) if needs_hidden else None
        grad_VD = _accumulator(weight_VD) if needs_weight else None
        for part, logits in _chunks(hidden_ND, weight_VD):
            h = hidden_ND[part]
            _, total_N = _losses_and_gradient(logits, local_N[part], owned_N[part], ctx.group)
            factor = (grad_N[part] / total_N)[:, None]
            if grad_ND is not None:
                torch.mm(logits, weight_VD, out=grad_ND[part]).mul_(factor)
            if grad_VD is not None:
                _add_product(grad_VD, logits, (h * factor).to(h.dtype))
        return grad_ND, None if grad_VD is None else grad_VD.to(weight_VD.dtype), None, None


def chunk_tokens(tokens: int, vocabulary: int, device: str) -> int:
    """Return the number of tokens whose logits are computed at once; all chunks but the last have as many.

    Args:
        tokens: of the whole pass.
        vocabulary: rows of the head on this rank.
        device: ``cpu`` or ``cuda``.
    """
    largest = max(1, LOGIT_BYTES[device] // (4 * vocabulary))
    count = max(1, -(-tokens // largest))
    return max(1, -(-tokens // count))


def _chunks(hidden_ND: Tensor, weight_VD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield each chunk's tokens and logits [N, V], which the next chunk's overwrite: new memory would cost time."""
    tokens, rows = hidden_ND.size(0), weight_VD.size(0)
    size = chunk_tokens(tokens, rows, weight_VD.device.type)
    buffer_NV = weight_VD.new_empty(min(size, tokens), rows)
    for start in range(0, tokens, size):
        h = hidden_ND[start : start + size]
        yield slice(start, start + size), torch.mm(h, weight_VD.t(), out=buffer_NV[: h.size(0)])


def _splitting(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    return None if group is None or group.size() == 1 else group


def _local_labels(labels_N: Tensor, rows: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Return each label's row in this rank's part of the head, and True where this rank has the label."""
    offset = 0 if group is None else dist.get_rank(group) * rows
    local_N = labels_N - offset
    return local_N.clamp(0, rows - 1), (local_N >= 0) & (local_N < rows)


def _losses_and_gradient(
    logits_NV: Tensor, local_N: Tensor, owned_N: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return the same as :func:`_losses`; the logits become their gradient, P - Y, times the total z.

    The label's entry, p - 1, is computed in fp32 from the loss: in bf16 it would be 0 for a probability close to 1.
    """
    loss_N, total_N = _losses(logits_NV, local_N, owned_N, group)
    row_N = torch.arange(len(loss_N), device=loss_N.device)
    label_N = (total_N * torch.expm1(-loss_N)).to(logits_NV.dtype)
    # By index: scatter_ copies the whole tensor in bf16 on a CPU.
    logits_NV[row_N, local_N] = torch.where(owned_N, label_N, logits_NV[row_N, local_N])
    return loss_N, total_N


def _losses(
    logits_NV: Tensor, local_N: Tensor, owned_N: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Return a chunk's losses in fp32 [N]; the logits become exp(logit - shift), whose totals are returned too."""
    target_N = logits_NV.gather(1, local_N[:, None]).squeeze(1).float()
    shift_N, total_N = _exponentiate(logits_NV, group)
    target_N -= shift_N
    if group is not None:
        dist.all_reduce(total_N, group=group)
        target_N *= owned_N
        dist.all_reduce(target_N, group=group)
    total_N.clamp_(min=1)  # it is, except in a rehearsal (tools/rehearsal), which computes no numbers
    return total_N.log() - target_N, total_N


def _exponentiate(logits_NV: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Replace logits by exp(logit - shift), and return each token's shift and this rank's total over its vocabulary.

    The shift is the largest logit, or the log of the sum of exponentials where torch's kernel does both: the total is
    then 1. It runs over blocks of tokens: a CPU's cache holds a block in fp32, and main memory sees each logit once or
    twice.
    """
    blocks, in_fp32 = _blocks(logits_NV, 4 * logits_NV.size(1)), logits_NV.dtype == torch.float32
    total_N = torch.ones(logits_NV.size(0), dtype=torch.float32, device=logits_NV.device)
    shift_N = torch.empty_like(total_N) if group is None else _largest(logits_NV, group)
    if group is None and not in_fp32:  # fewer passes over them than below
        for part in blocks:
            log_probs = F.log_softmax(logits_NV[part], dim=1, dtype=torch.float32)
            shift_N[part] = logits_NV[part, 0] - log_probs[:, 0]
            logits_NV[part] = log_probs.exp_()
        return shift_N, total_N
    for part in blocks:
        block = logits_NV[part]
        if group is None:
            shift_N[part] = block.amax(dim=1)
        shifted = block.sub_(shift_N[part, None]) if in_fp32 else block - shift_N[part, None]
        total_N[part] = shifted.exp_().sum(dim=1)
        if not in_fp32:
            block.copy_(shifted)
    return shift_N, total_N


def _largest(logits_NV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return each token's largest logit over the ranks' parts of the vocabulary, in fp32."""
    largest_N = logits_NV.amax(dim=1).float()
    dist.all_reduce(largest_N, op=dist.ReduceOp.MAX, group=group)
    return largest_N


def _blocks(x: Tensor, row_bytes: int) -> list[slice]:
    """Return the rows of ``x`` in parts of up to :data:`BLOCK_BYTES` if it is on a CPU, else in one part."""
    size = x.size(0) if x.is_cuda else max(1, BLOCK_BYTES // row_bytes)
    return [slice(start, start + size) for start in range(0, x.size(0), size)]


def _accumulator(weight_VD: Tensor, direct: DirectGradient | None = None) -> Tensor:
    """Return where the chunks' weight gradients are summed, in fp32: a bf16 sum of hundreds would lose small ones."""
    if direct is not None and direct.into_VD.dtype == torch.float32:
        return direct.into_VD
    return torch.zeros_like(weight_VD, dtype=torch.float32)


def _add_product(into_VD: Tensor, grad_NV: Tensor, hidden_ND: Tensor) -> None:
    if grad_NV.dtype == into_VD.dtype:
        into_VD.addmm_(grad_NV.t(), hidden_ND)
        return
    for part in _blocks(into_VD, 4 * into_VD.size(1)):  # the product in another dtype stays in a CPU's cache
        into_VD[part] += grad_NV[:, part].t() @ hidden_ND
