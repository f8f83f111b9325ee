"""Sampling: logits to token ids. Row-independent pure functions; the caller supplies the random numbers.

One uniform number per row selects its token by the inverse of the cumulative distribution. A row therefore gets the
same token alone and in a batch, on CPU and GPU.

Shapes: N rows side by side, V vocabulary, k drafted tokens of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.inference.request import ActiveRequest
from looplm.inference.settings import GenerationConfig


class NextLogits(NamedTuple):
    """Logits for the next token of some rows, in fp32, and the depth at which each row's were computed."""

    rows: list[int]
    logits_NV: Tensor
    depths: list[int]


@dataclass(frozen=True)
class NewTokens:
    """Ids that extend a row's text, at least one. ``finite`` is False if their logits were not."""

    row: int
    ids: list[int]
    depth: int
    finite: bool = True
    drafted: int = 0
    accepted: int = 0


def penalize_repetition(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Divide the positive logits of seen ids by ``penalty``, and multiply negative ones by it (CTRL, 1909.05858)."""
    return torch.where(seen_NV, torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty), logits_NV)


def probabilities(logits_NV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Return the distribution that tokens are sampled from, [N, V] in fp64.

    Args:
        logits_NV: any floating type.
        temperature: 0 gives the likeliest id probability 1.
        top_k: keep only the k likeliest ids; 0 for all.
        top_p: of those, keep the fewest likeliest ids whose probability reaches p (nucleus, 1904.09751); 1 for all.
    """
    if temperature == 0:
        certain_NV = torch.zeros_like(logits_NV, dtype=torch.float64)
        return certain_NV.scatter_(-1, logits_NV.argmax(-1, keepdim=True), 1.0)
    scaled_NV = logits_NV.double()
    scaled_NV = (scaled_NV - scaled_NV.amax(-1, keepdim=True)) / temperature  # a tiny one would give inf, and then NaN
    if top_k == 0 and top_p == 1:
        return scaled_NV.softmax(-1)
    vocab_size = logits_NV.size(-1)
    ranked_NK, ids_NK = scaled_NV.topk(min(top_k or vocab_size, vocab_size))
    probability_NK = ranked_NK.softmax(-1)
    before_NK = probability_NK.cumsum(-1) - probability_NK
    probability_NK = probability_NK.masked_fill(before_NK >= top_p, 0.0)  # the first always stays: nothing is before it
    return torch.zeros_like(scaled_NV).scatter_(-1, ids_NK, probability_NK / probability_NK.sum(-1, keepdim=True))


def sample(probability_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """Return one id per row, int64 [N], given numbers in [0, 1) in fp64."""
    cumulative_NV = probability_NV.cumsum(-1)
    # In fp64 the goal is below the total, so the sampled id has a probability above 0.
    goal_N1 = (uniform_N.to(cumulative_NV.device) * cumulative_NV[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative_NV, goal_N1, right=True).squeeze(-1)


class Sampler:
    """Samples the next tokens of a batch's rows, each with the random numbers of the row's request.

    Args:
        config: temperature, cut-offs and penalty.
        requests: the request in each row; the mapping may change between calls.
    """

    def __init__(self, config: GenerationConfig, requests: Mapping[int, ActiveRequest]) -> None:
        self._config, self._requests = config, requests
        self._cutoffs = config.temperature, config.top_k, config.top_p

    def sample(self, next_logits: NextLogits) -> list[NewTokens]:
        """Sample the next token of each row."""
        rows, logits_NV, depths = next_logits
        logits_NV = self._penalized(rows, logits_NV, ())
        largest_N, ids_N = logits_NV.max(-1)
        finite_N = largest_N.isfinite()  # the maximum of a row that contains a NaN is NaN
        if self._config.temperature > 0:
            logits_NV = logits_NV.masked_fill(~finite_N[:, None], 0.0)
            ids_N = sample(probabilities(logits_NV, *self._cutoffs), self.uniform(rows))
        each = zip(rows, ids_N.tolist(), depths, finite_N.tolist(), strict=True)
        return [NewTokens(row, [token_id], depth, finite) for row, token_id, depth, finite in each]

    def distribution(self, rows: Sequence[int], logits_NV: Tensor, drafted_kN: Sequence[Sequence[int]]) -> Tensor:
        """Return the distribution [N, V] of the rows' next ids, as if their texts already contained ``drafted_kN``."""
        return probabilities(self._penalized(rows, logits_NV, drafted_kN), *self._cutoffs)

    def uniform(self, rows: Sequence[int]) -> Tensor:
        """Return the next random number of each row, [N] in fp64."""
        return torch.tensor([self._requests[row].random.random() for row in rows], dtype=torch.float64)

    def _penalized(self, rows: Sequence[int], logits_NV: Tensor, drafted_kN: Sequence[Sequence[int]]) -> Tensor:
        if self._config.repetition_penalty == 1:
            return logits_NV
        seen_NV = torch.zeros_like(logits_NV, dtype=torch.bool)
        for n, row in enumerate(rows):
            seen_NV[n, [*self._requests[row].ids, *(ids_N[n] for ids_N in drafted_kN)]] = True
        return penalize_repetition(logits_NV, seen_NV, self._config.repetition_penalty)
