"""Self-speculation: the first loops draft some tokens, all loops check them in one pass each, side by side.

::

    x0 --d loops--> x1 --d loops--> x2 ... --d loops--> xk       draft, one token after another
    h_0 ... h_{k-1} --loops d+1 to R, k tokens a lane-->         check: what would all loops have drawn after each?

With a cache per loop, loop r of a token depends on loop r of the tokens before it alone, so the draft's loops are the
check's own first loops: nothing is computed twice, and entries of rejected tokens are overwritten by those that follow.
A drafted x is kept with probability min(1, p(x) / q(x)), else the token is drawn from max(0, p - q), and the draft ends
there: the text is distributed as without a draft (Leviathan et al., arXiv 2211.17192). Greedy text is the same text.

Shapes: k drafted tokens of a row, N rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from looplm.inference.depth_batch import run_cached
from looplm.inference.kv_cache import KVCache
from looplm.inference.prefill import Prefill
from looplm.inference.sampling import Sampler, draw
from looplm.inference.stack import LoopedStack


@dataclass(frozen=True)
class Emission:
    """New ids of a row, in order, at least one; ``sound`` unless logits were no numbers."""

    row: int
    ids: list[int]
    depth: int
    sound: bool = True
    drafted: int = 0
    accepted: int = 0


class Speculation:
    """The texts of ``rows`` rows, which grow by one to k tokens a round.

    Args:
        stack: of the model.
        depth: loops that check (R).
        draft_depth: loops that draft (d), fewer.
        length: tokens to draft (k).
        rows: texts side by side.
        sampler: draws.
    """

    def __init__(
        self, stack: LoopedStack, depth: int, draft_depth: int, length: int, rows: int, sampler: Sampler
    ) -> None:
        self._stack, self._depth, self._draft_depth, self._length = stack, depth, draft_depth, length
        self._sampler = sampler
        self.cache = KVCache(stack.model_config, "per_loop", rows, depth, stack.dtype, stack.device)
        self._next = [0] * rows  # position of each row's next token
        self._ids: dict[int, int] = {}  # the token that each row goes on from

    def seat(self, row: int, prefill: Prefill, prefill_row: int) -> None:
        """Put a prompt that has been read into a row."""
        self._next[row] = prefill.lengths[prefill_row]
        self.cache.adopt(row, prefill.cache, prefill_row, self._next[row])

    def start(self, rows: Sequence[int], ids: Sequence[int]) -> None:
        """These tokens are the last of these rows' texts."""
        self._ids.update(zip(rows, ids, strict=True))

    def release(self, row: int, broken: bool = False) -> None:
        """A row's text has ended; ``broken`` if its numbers are none."""
        self._ids.pop(row, None)
        if broken:
            self.cache.clear(row)

    def move(self, source: int, target: int) -> None:
        """A text goes on in another row."""
        self.cache.move(source, target, self._next[source])
        self._next[target] = self._next[source]
        self._ids[target] = self._ids.pop(source)

    def round(self) -> list[Emission]:
        """Draft and check in every row."""
        rows = sorted(self._ids)
        start = [self._next[row] for row in rows]
        drafts, q_kNV, h_kND = self._draft(rows, start)
        for loop in range(self._draft_depth, self._depth):
            places = self.cache.places(rows, [loop] * len(rows), start, self._length)
            h_kND = run_cached(self._stack, self.cache, places, h_kND)
        logits_kNV = self._stack.head(h_kND)
        sound_N = logits_kNV.amax(-1).isfinite().all(0)
        logits_kNV = logits_kNV.masked_fill(~sound_N[:, None], 0.0)
        laws = [self._sampler.law(rows, logits_kNV[place], drafts[:place]) for place in range(self._length)]
        emissions = self._check(rows, drafts, torch.stack(laws), q_kNV, sound_N.tolist())
        for emission in emissions:
            self._next[emission.row] += len(emission.ids)
        return emissions

    def _draft(self, rows: list[int], start: list[int]) -> tuple[list[list[int]], Tensor, Tensor]:
        """For k places: ids [N], what they were drawn from [N, V], and the hidden states it was read from [N, D]."""
        ids, drafts, laws, hidden = [self._ids[row] for row in rows], list[list[int]](), list[Tensor](), list[Tensor]()
        for place in range(self._length):
            h_1ND = self._stack.embed(torch.tensor([ids], device=self._stack.device))
            for loop in range(self._draft_depth):
                places = self.cache.places(rows, [loop] * len(rows), [first + place for first in start])
                h_1ND = run_cached(self._stack, self.cache, places, h_1ND)
            logits_NV = self._stack.head(h_1ND[0])
            logits_NV = logits_NV.masked_fill(
                ~logits_NV.amax(-1, keepdim=True).isfinite(), 0.0
            )  # the check will see it
            laws.append(self._sampler.law(rows, logits_NV, drafts))
            ids = draw(laws[-1], self._sampler.uniform(rows)).tolist()
            drafts.append(ids)
            hidden.append(h_1ND)
        return drafts, torch.stack(laws), torch.cat(hidden)

    def _check(
        self, rows: list[int], drafts: list[list[int]], p_kNV: Tensor, q_kNV: Tensor, sound: list[bool]
    ) -> list[Emission]:
        """Keep what stands, and draw anew what does not."""
        drafted_kN1 = torch.tensor(drafts, device=p_kNV.device).unsqueeze(-1)
        p, q = (law_kNV.gather(-1, drafted_kN1).squeeze(-1).tolist() for law_kNV in (p_kNV, q_kNV))
        emissions = []
        for index, row in enumerate(rows):
            ids, accepted = list[int](), 0
            for place in range(self._length):
                if self._sampler.random(row) * q[place][index] < p[place][index]:
                    ids.append(drafts[place][index])
                    accepted += 1
                    continue
                rest_1V = (p_kNV[place, index] - q_kNV[place, index]).clamp_min(0).unsqueeze(0)
                ids.append(int(draw(rest_1V, self._sampler.uniform([row]))))
                break
            emissions.append(Emission(row, ids, self._depth, sound[index], self._length, accepted))
        return emissions
