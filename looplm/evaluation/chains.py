"""Last answers of a task, after a chain of thought that the model has written itself.

The likeliest chain is one answer. Several chains can also be sampled, and their most frequent answer counts: more
compute for each answer, without a deeper model (self-consistency, arXiv 2203.11171). A task without chains is answered
at once; votes are then the likeliest answer, which is what infinitely many of them come to.

Shapes: B samples, K votes, S sequence, V vocabulary, D hidden.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from looplm.evaluation.record import VotedAnswers
from looplm.model import LoopLM


@torch.no_grad()
def voted_answers(
    model: LoopLM,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    votes: Sequence[int],
    writes_chain: bool,
    seed: int,
    group: dist.ProcessGroup,
) -> tuple[VotedAnswers, ...]:
    """Return the share of samples whose last answer is right, for each number of votes.

    Args:
        model: in eval mode.
        batches: ids [B, S], labels [S, B], and whether they count [S, B], at the same positions in all samples of a
            batch.
        votes: chains for each answer; 1 takes the likeliest token at each step, more are sampled.
        writes_chain: whether the labels are the next tokens; the model's own then take their place.
        seed: of the sampled chains.
        group: ranks that read other batches.
    """
    right_N, samples = torch.zeros(len(votes) + 1), 0  # the last is the number of samples
    for ids_BS, labels_SB, counts_SB in batches:
        first, last = _span(counts_SB)
        samples += len(ids_BS)
        if not writes_chain:  # the same answer for every number of votes
            right_N[:-1] += (_logits(model, ids_BS)[last].argmax(-1) == labels_SB[last]).sum().cpu()
            continue
        for index, number in enumerate(votes):
            generator = None if number == 1 else torch.Generator(ids_BS.device).manual_seed(seed + samples)
            answer_KB = torch.stack([_write(model, ids_BS, first, last, generator) for _ in range(number)])
            right_N[index] += (most_frequent(answer_KB) == labels_SB[last]).sum().cpu()
    right_N[-1] = samples
    dist.all_reduce(right_N, group=group)
    *shares, _ = (right_N / right_N[-1].clamp(min=1)).tolist()
    return tuple(VotedAnswers(votes=number, solved=share) for number, share in zip(votes, shares, strict=True))


def most_frequent(answer_KB: Tensor) -> Tensor:
    """Return the most frequent of K answers, [B]; of those that are equally frequent, the one that was given first."""
    votes_KB = (answer_KB[:, None] == answer_KB).sum(1)
    return answer_KB.gather(0, votes_KB.argmax(0, keepdim=True))[0]


def _span(counts_SB: Tensor) -> tuple[int, int]:
    """Return the first and the last position that has a label."""
    assert bool((counts_SB == counts_SB[:, :1]).all()), "labels are at other positions in other samples"
    places = counts_SB[:, 0].nonzero().flatten().tolist()
    return places[0], places[-1]


def _write(model: LoopLM, ids_BS: Tensor, first: int, last: int, generator: torch.Generator | None) -> Tensor:
    """Return the token [B] that the model puts after position ``last`` if it writes everything after ``first``."""
    written_BS = ids_BS[:, : first + 1]
    for _ in range(first, last + 1):
        logits_BV = _logits(model, written_BS)[-1]
        if generator is None:
            next_B1 = logits_BV.argmax(-1, keepdim=True)
        else:
            next_B1 = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        written_BS = torch.cat((written_BS, next_B1), dim=1)
    return written_BS[:, -1]


def _logits(model: LoopLM, ids_BS: Tensor) -> Tensor:
    """Return the logits [S, B, V] after all loops."""
    return model(ids_BS).hidden[-1].float() @ model.head_weight().float().t()
