"""From logits to ids: pure functions, one row as good as another, randomness handed in.

One uniform number per row decides its token by the inverse of the cumulative distribution, so a row draws the same
token alone and in a batch, on CPU and GPU.
"""

import torch
from torch import Tensor


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Make ids that a row has seen less likely: positive logits over, negative ones times ``penalty`` (CTRL, 1909.05858)."""
    return torch.where(seen_NV, torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty), logits_NV)


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One id per row.

    Args:
        logits_NV: any floating type.
        uniform_N: numbers in [0, 1) in fp64, one per row; not looked at when greedy.
        temperature: 0 takes the likeliest.
        top_k: only the k likeliest ids; 0 for all.
        top_p: of those, the fewest likeliest ids whose probability reaches p (nucleus, 1904.09751); 1 for all.

    Returns:
        ids, int64 [N].
    """
    if temperature == 0:
        return logits_NV.argmax(-1)
    vocab_size = logits_NV.size(-1)
    ranked_NK, ids_NK = logits_NV.topk(min(top_k or vocab_size, vocab_size))
    probability_NK = (ranked_NK.double() / temperature).softmax(-1)
    before_NK = probability_NK.cumsum(-1) - probability_NK
    probability_NK = probability_NK.masked_fill(before_NK >= top_p, 0.0)  # the first always stays: nothing is before it
    cumulative_NK = probability_NK.cumsum(-1)
    goal_N1 = (uniform_N * cumulative_NK[:, -1]).unsqueeze(-1)  # in fp64 below the total, so what is drawn has a chance
    rank_N1 = torch.searchsorted(cumulative_NK, goal_N1, right=True)
    return ids_NK.gather(-1, rank_N1).squeeze(-1)
