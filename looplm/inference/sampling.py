"""From logits to ids: pure functions, one row as good as another, randomness handed in; and who hands it in.

One uniform number per row decides its token by the inverse of the cumulative distribution, so a row draws the same
token alone and in a batch, on CPU and GPU.

Shapes: N rows side by side, B rows in all, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from looplm.inference.request import Running
from looplm.inference.settings import GenerationConfig


def penalise(logits_NV: Tensor, seen_NV: Tensor, penalty: float) -> Tensor:
    """Make ids that a row has seen less likely: positive logits over, negative ones times ``penalty`` (CTRL, 1909.05858)."""
    return torch.where(seen_NV, torch.where(logits_NV > 0, logits_NV / penalty, logits_NV * penalty), logits_NV)


def probabilities(logits_NV: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """What tokens are drawn from, [N, V] in fp64.

    Args:
        logits_NV: any floating type.
        temperature: 0 gives all to the likeliest.
        top_k: only the k likeliest ids; 0 for all.
        top_p: of those, the fewest likeliest ids whose probability reaches p (nucleus, 1904.09751); 1 for all.
    """
    if temperature == 0:
        certain_NV = torch.zeros_like(logits_NV, dtype=torch.float64)
        return certain_NV.scatter_(-1, logits_NV.argmax(-1, keepdim=True), 1.0)
    scaled_NV = logits_NV.double() / temperature
    if top_k == 0 and top_p == 1:
        return scaled_NV.softmax(-1)
    vocab_size = logits_NV.size(-1)
    ranked_NK, ids_NK = scaled_NV.topk(min(top_k or vocab_size, vocab_size))
    probability_NK = ranked_NK.softmax(-1)
    before_NK = probability_NK.cumsum(-1) - probability_NK
    probability_NK = probability_NK.masked_fill(before_NK >= top_p, 0.0)  # the first always stays: nothing is before it
    return torch.zeros_like(scaled_NV).scatter_(-1, ids_NK, probability_NK / probability_NK.sum(-1, keepdim=True))


def draw(probability_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """One id per row, int64 [N], by numbers in [0, 1) in fp64."""
    cumulative_NV = probability_NV.cumsum(-1)
    goal_N1 = (uniform_N * cumulative_NV[:, -1]).unsqueeze(-1)  # in fp64 below the total, so what is drawn has a chance
    return torch.searchsorted(cumulative_NV, goal_N1, right=True).squeeze(-1)


def choose(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """One id per row; see :func:`probabilities` and :func:`draw`."""
    if temperature == 0:
        return logits_NV.argmax(-1)
    return draw(probabilities(logits_NV, temperature, top_k, top_p), uniform_N)


class Drawn(NamedTuple):
    """Next ids of some rows, and for each whether its logits were numbers."""

    ids: list[int]
    sound: list[bool]


class Sampler:
    """Draws for the rows of a batch, each with the random numbers of the request that has it.

    Args:
        config: temperature, cut-offs and penalty.
        rows: texts side by side (B).
        vocab_size: V.
        device: of the logits.
    """

    def __init__(self, config: GenerationConfig, rows: int, vocab_size: int, device: torch.device) -> None:
        self._config, self._device = config, device
        self._requests: list[Running | None] = [None] * rows
        self._seen_BV: Tensor | None = None
        if config.repetition_penalty != 1:
            self._seen_BV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def seat(self, row: int, request: Running) -> None:
        """A request's prompt has been read."""
        self._requests[row] = request
        if self._seen_BV is not None:
            self._seen_BV[row] = False
            self._seen_BV[row, torch.tensor(request.ids, device=self._device)] = True

    def move(self, source: int, target: int) -> None:
        """A request goes on in another row."""
        self._requests[target] = self._requests[source]
        if self._seen_BV is not None:
            self._seen_BV[target] = self._seen_BV[source]

    def saw(self, rows: Sequence[int], ids: Sequence[int]) -> None:
        """These ids are now in these rows' texts."""
        if self._seen_BV is not None:
            self._seen_BV[list(rows), list(ids)] = True

    def draw(self, rows: Sequence[int], logits_NV: Tensor) -> Drawn:
        """The rows' next ids."""
        logits_NV = self._penalised(rows, logits_NV, ())
        most_N, ids_N = logits_NV.max(-1)  # a row with a NaN has no other maximum
        sound = most_N.isfinite().tolist()
        if self._config.temperature > 0:
            if not all(sound):
                logits_NV = logits_NV.masked_fill(~most_N.isfinite()[:, None], 0.0)
            ids_N = draw(self._law(logits_NV), self.uniform(rows))
        return Drawn(ids_N.tolist(), sound)

    def law(self, rows: Sequence[int], logits_NV: Tensor, since: Sequence[Sequence[int]]) -> Tensor:
        """What the rows' next ids are drawn from, [N, V], if first each took the ids of ``since``, [..., N]."""
        return self._law(self._penalised(rows, logits_NV, since))

    def _law(self, logits_NV: Tensor) -> Tensor:
        config = self._config
        return probabilities(logits_NV, config.temperature, config.top_k, config.top_p)

    def _penalised(self, rows: Sequence[int], logits_NV: Tensor, since: Sequence[Sequence[int]]) -> Tensor:
        if self._seen_BV is None:
            return logits_NV
        seen_NV = self._seen_BV[list(rows)]  # a copy
        for ids in since:
            seen_NV[range(len(rows)), list(ids)] = True
        return penalise(logits_NV, seen_NV, self._config.repetition_penalty)

    def uniform(self, rows: Sequence[int]) -> Tensor:
        """The next random number of each row, [N] in fp64."""
        numbers = [self.random(row) for row in rows]
        return torch.tensor(numbers, dtype=torch.float64, device=self._device)

    def random(self, row: int) -> float:
        """The next random number of a row."""
        request = self._requests[row]
        assert request is not None
        return request.random.random()
