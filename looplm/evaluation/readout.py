"""A head fitted to each depth, all else frozen: the control without which "loss at depth r" misleads.

A model trained to answer after R loops may be wrong after r < R of them because its head does not read that state, and
not because the state lacks the answer (arXiv 2609.19934). What a head of its own reads from it tells the two apart.

Shapes: R loops, S sequence, B batch, D hidden, V vocabulary, N labels.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from looplm.model import LoopLM

RATE = 1e-2  # of Adam, falling to 0 along a cosine


def fit_heads(
    model: LoopLM, batches: Iterator[tuple[Tensor, Tensor, Tensor]], steps: int, loops: int, rate: float = RATE
) -> Tensor:
    """Return a head per depth, each from the model's own by ``steps`` steps of Adam: [R, V, D].

    Args:
        model: in eval mode; not changed.
        batches: ids [B, S], labels [S, B], and whether they count [S, B]; of the training split.
        steps: batches that are read.
        loops: depths.
        rate: learning rate of the first step.
    """
    weight_RVD = model.head_weight().detach().float().expand(loops, -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([weight_RVD], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        ids_BS, labels_SB, counts_SB = next(batches)
        state_RND = _states(model, ids_BS, counts_SB, loops)
        logits_RNV = torch.einsum("rnd,rvd->rnv", state_RND, weight_RVD)
        label_RN = labels_SB[counts_SB].expand(loops, -1)
        loss = F.cross_entropy(logits_RNV.flatten(0, 1), label_RN.flatten()) * loops  # each head's own mean
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight_RVD.detach()


@torch.no_grad()
def accuracies(
    model: LoopLM, weight_RVD: Tensor, batches: Iterable[tuple[Tensor, Tensor, Tensor]], group: dist.ProcessGroup
) -> tuple[float, ...]:
    """Return the share of labels that the head of each depth gets right, over the batches of every rank of a group."""
    right_R, labels = torch.zeros(len(weight_RVD), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for ids_BS, labels_SB, counts_SB in batches:
        state_RND = _states(model, ids_BS, counts_SB, len(weight_RVD))
        answer_RN = torch.einsum("rnd,rvd->rnv", state_RND, weight_RVD).argmax(-1)
        right_R += (answer_RN == labels_SB[counts_SB]).double().sum(-1).cpu()
        labels += counts_SB.sum().cpu()
    for total in (right_R, labels):
        dist.all_reduce(total, group=group)
    return tuple((right_R / labels.clamp(min=1)).tolist())


@torch.no_grad()
def _states(model: LoopLM, ids_BS: Tensor, counts_SB: Tensor, loops: int) -> Tensor:
    return torch.stack([h_SBD[counts_SB].float() for h_SBD in model(ids_BS, loops).hidden])
