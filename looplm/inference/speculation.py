"""Self-speculation: the first loops draft some tokens, then all loops check them side by side, in one pass per loop.

::

    x0 --d loops--> x1 --d loops--> x2 ... --d loops--> xk       draft, one token after another
    h_0 ... h_{k-1} --loops d+1 to R, k tokens a lane-->         check: which tokens would all loops have sampled?

With a cache per loop, loop r of a token depends only on loop r of the tokens before it. The draft's loops are therefore
the check's own first loops: nothing is computed twice, and later tokens overwrite the entries of rejected ones. A
drafted x is accepted with probability min(1, p(x) / q(x)); otherwise the token is sampled from max(0, p - q), and the
draft ends there. The text is distributed as without a draft (Leviathan et al., arXiv 2211.17192), and greedy text is
the same text.

Shapes: k drafted tokens of a row, N rows, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from looplm.inference.batch import TextBatch
from looplm.inference.early_exit import ExitRule
from looplm.inference.sampling import NewTokens, Sampler, sample
from looplm.inference.stack import LoopedStack


class SpeculativeBatch(TextBatch):
    """Texts that grow by one to k tokens per call of :meth:`decode`.

    Args:
        stack: the model's.
        rule: a fixed depth: the loops that check (R).
        draft_depth: loops that draft (d), fewer.
        length: tokens to draft (k).
        rows: number of texts side by side.
    """

    def __init__(self, stack: LoopedStack, rule: ExitRule, draft_depth: int, length: int, rows: int) -> None:
        super().__init__(stack, rule, "per_loop", rows)
        self._draft_depth, self._draft_length = draft_depth, length

    def decode(self, sampler: Sampler) -> list[NewTokens]:
        """Draft and check tokens in every row."""
        rows, depth, k = sorted(self._pending), self._rule.max_depth, self._draft_length
        start = [self._length[row] for row in rows]
        drafted_kN, q_kNV, h_kND, entered_kND = self._draft(sampler, rows, start)
        for loop in range(self._draft_depth, depth):
            h_kND = self.run_pass(h_kND, entered_kND, rows, [loop] * len(rows), start)
        logits_kNV = self.logits(h_kND, rows, start)
        finite_N = logits_kNV.amax(-1).isfinite().all(0)
        logits_kNV = logits_kNV.masked_fill(~finite_N[:, None], 0.0)
        p_kNV = torch.stack([sampler.distribution(rows, logits_kNV[i], drafted_kN[:i]) for i in range(k)])
        checked = check_drafts(sampler, rows, drafted_kN, p_kNV, q_kNV)
        new = [
            NewTokens(row, ids, depth, finite, k, accepted)
            for row, (ids, accepted), finite in zip(rows, checked, finite_N.tolist(), strict=True)
        ]
        for tokens in new:
            self._length[tokens.row] += len(tokens.ids)
        return new

    def _draft(
        self, sampler: Sampler, rows: list[int], start: list[int]
    ) -> tuple[list[list[int]], Tensor, Tensor, Tensor]:
        """Return the drafted ids [k, N], the distributions q [k, N, V] they were sampled from, and hidden states.

        The hidden states are those after the draft's loops, and those before the first loop.
        """
        ids = [self._pending[row] for row in rows]
        drafted_kN, distributions, hidden, entered = list[list[int]](), list[Tensor](), list[Tensor](), list[Tensor]()
        for place in range(self._draft_length):
            positions = [first + place for first in start]
            h_1ND = entered_1ND = self.enter(torch.tensor([ids], device=self._stack.device), rows, positions)
            for loop in range(self._draft_depth):
                h_1ND = self.run_pass(h_1ND, entered_1ND, rows, [loop] * len(rows), positions)
            logits_NV = self.logits(h_1ND, rows, positions)[0]
            # The check reports rows that are not finite.
            logits_NV = logits_NV.masked_fill(~logits_NV.amax(-1, keepdim=True).isfinite(), 0.0)
            distributions.append(sampler.distribution(rows, logits_NV, drafted_kN))
            ids = sample(distributions[-1], sampler.uniform(rows)).tolist()
            drafted_kN.append(ids)
            hidden.append(h_1ND)
            entered.append(entered_1ND)
        return drafted_kN, torch.stack(distributions), torch.cat(hidden), torch.cat(entered)


def check_drafts(
    sampler: Sampler, rows: Sequence[int], drafted_kN: Sequence[Sequence[int]], p_kNV: Tensor, q_kNV: Tensor
) -> list[tuple[list[int], int]]:
    """Return each row's new ids, and how many of them are accepted drafts; p is by all loops, q by the draft's."""
    drafted_kN1 = torch.tensor(drafted_kN, device=p_kNV.device).unsqueeze(-1)
    p_kN, q_kN = (x_kNV.gather(-1, drafted_kN1).squeeze(-1).tolist() for x_kNV in (p_kNV, q_kNV))
    checked = []
    for n, row in enumerate(rows):
        ids, accepted = list[int](), 0
        for place, drafted_N in enumerate(drafted_kN):
            if float(sampler.uniform([row])) * q_kN[place][n] >= p_kN[place][n]:
                rest_1V = (p_kNV[place, n] - q_kNV[place, n]).clamp_min(0).unsqueeze(0)
                ids.append(int(sample(rest_1V, sampler.uniform([row]))))
                break
            ids.append(drafted_N[n])
            accepted += 1
        checked.append((ids, accepted))
    return checked
