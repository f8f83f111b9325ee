"""When a token leaves the loops: at a fixed depth, or at the first loop whose score reaches a threshold.

    gate        probability by the exit gate that the token has left: Q-exit (Ouro, arXiv 2510.25741)
    confidence  probability of the likeliest next token
    entropy     1 - entropy of the next token / log V
    change      1 - |h_r - h_{r-1}| / |h_r| of the hidden state; 0 in the first loop, which has none before it

The last three need no gate: they are what one compares a gate with. All are in [0, 1], and rise as a token settles.
Tokens that are scored together may be in different loops.

Shapes: S sequence, N tokens side by side, B rows, D hidden, V vocabulary, Z gate state, R loops.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.model.exit_gate import LinearExitGate, LRUExitGate, uniform_offset

ExitSignal = Literal["gate", "confidence", "entropy", "change"]


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """How deep a token may go.

    Args:
        max_depth: every token leaves after this loop at the latest.
        min_depth: no token leaves before this one.
        threshold: that the score must reach; at 1 every token goes to max_depth, however the score rounds.
        signal: which score.
    """

    max_depth: int
    min_depth: int = 1
    threshold: float = 1.0
    signal: ExitSignal = "gate"

    @property
    def decides(self) -> bool:
        """Whether anything depends on the score."""
        return self.threshold < 1.0 and self.min_depth < self.max_depth

    @property
    def reads_head(self) -> bool:
        """Whether the score is made from logits."""
        return self.signal in ("confidence", "entropy")


def confidence(logits_NV: Tensor) -> Tensor:
    """Probability of the likeliest id, [N]."""
    return (logits_NV.amax(-1) - logits_NV.logsumexp(-1)).exp()


def certainty(logits_NV: Tensor) -> Tensor:
    """1 - entropy / log V, [N]: 0 where all ids are equally likely, 1 where one of them is certain."""
    log_p_NV = logits_NV.log_softmax(-1)
    return 1 + (log_p_NV.exp() * log_p_NV).sum(-1) / math.log(max(2, logits_NV.size(-1)))


def steadiness(before_ND: Tensor, after_ND: Tensor, loops: Sequence[int]) -> Tensor:
    """1 - |change| / |state|, not below 0, [N]; 0 in the first loop."""
    before_ND, after_ND = before_ND.float(), after_ND.float()
    score_N = (1 - (after_ND - before_ND).norm(dim=-1) / after_ND.norm(dim=-1)).clamp_min(0)
    return score_N.masked_fill(torch.tensor([loop == 0 for loop in loops], device=score_N.device), 0.0)


class ExitGateReader:
    """Asks the gate after each loop of each token, and keeps what it must know from earlier loops and tokens.

    The gate's state lives through the loops of a token. With ``gate.sequence_level`` there are sums over earlier tokens
    too, one per row and loop: the causal mean at loop r runs over the positions that ran loop r. When all positions run
    all loops this is exactly the training-time mean; a token that left early is missing from the later loops' means.

    Args:
        gate: the model's.
        num_loops: R of its exit distribution, as trained.
        rows: texts side by side (B).
    """

    def __init__(self, gate: LRUExitGate | LinearExitGate, num_loops: int, rows: int) -> None:
        self.gate = gate
        weight = self._weight = gate.readout.weight.detach().float()
        self._bias = gate.readout.bias.detach().float()
        self._offset_R = self._mean_weight = None
        if isinstance(gate, LRUExitGate):
            self._offset_R = torch.tensor(
                [uniform_offset(loop, num_loops) for loop in range(num_loops)], device=weight.device
            )
            if gate.sequence_readout is not None:
                self._mean_weight = gate.sequence_readout.weight.detach().float()
                self._sum_RBZ = weight.new_zeros(num_loops, rows, weight.size(1))
                self._count_RB = weight.new_zeros(num_loops, rows)
        self.begin(0)

    @property
    def sequence_level(self) -> bool:
        """Whether a prompt's earlier positions matter to its last one."""
        return self._mean_weight is not None

    def begin(self, tokens: int, length: int = 1) -> None:
        """Forget the tokens so far: these many new ones enter loop 1 (S of them in a row, in a prompt)."""
        self._log_survival_N = self._weight.new_zeros(tokens)
        self._state_SNZ = (
            self._weight.new_zeros(length, tokens, self._weight.size(1)) if self._offset_R is not None else None
        )

    def regroup(self, order_N: Tensor, new: int) -> None:
        """Set up the next pass: ``new`` tokens join at the end, then this order is taken of all."""
        self._log_survival_N = F.pad(self._log_survival_N, (0, new))[order_N]
        if self._state_SNZ is not None:
            self._state_SNZ = F.pad(self._state_SNZ, (0, 0, 0, new))[:, order_N]

    def score(self, h_SND: Tensor, rows: Sequence[int], loops: Sequence[int], length_N: Tensor | None = None) -> Tensor:
        """Probability [N] that the tokens have left by the end of the loop they are in.

        Args:
            h_SND: hidden states after the loop: one token's, or a prompt's, whose last is asked.
            rows: of the tokens.
            loops: 0-based.
            length_N: of prompts: how many of the S positions are the row's own; the others are padding.
        """
        loop_N, rows_N = torch.tensor([list(loops), list(rows)], device=h_SND.device)
        if length_N is not None and not self.sequence_level:  # a token's logit is its own affair
            h_SND, length_N = last_token(h_SND, length_N).unsqueeze(0), None
        if self._offset_R is None or self._state_SNZ is None:
            logit_N = F.linear(h_SND[0].float(), self._weight, self._bias).squeeze(-1)
        else:
            assert isinstance(self.gate, LRUExitGate)
            self._state_SNZ = self.gate.advance(h_SND, self._state_SNZ)
            state_NZ = self._state_SNZ[0] if length_N is None else last_token(self._state_SNZ, length_N)
            logit_N = F.linear(state_NZ, self._weight, self._bias).squeeze(-1) + self._offset_R[loop_N]
            if self._mean_weight is not None:
                mean_NZ = self._mean(self._state_SNZ, rows_N, loop_N, length_N)
                logit_N = logit_N + F.linear(mean_NZ, self._mean_weight).squeeze(-1)
        self._log_survival_N = self._log_survival_N + F.logsigmoid(-logit_N)
        return -torch.expm1(self._log_survival_N)

    def adopt(self, row: int, other: "ExitGateReader", other_row: int) -> None:
        """Take over a row's sums from another reader, or from another row of this one."""
        if self.sequence_level:
            self._sum_RBZ[:, row] = other._sum_RBZ[:, other_row]
            self._count_RB[:, row] = other._count_RB[:, other_row]

    def _mean(self, state_SNZ: Tensor, rows_N: Tensor, loop_N: Tensor, length_N: Tensor | None) -> Tensor:
        """Count these states too, and return the mean of each token's row and loop."""
        if length_N is None:
            total_NZ, count_N = state_SNZ[0], torch.ones_like(rows_N)
        else:
            own_SN1 = (torch.arange(len(state_SNZ), device=state_SNZ.device)[:, None] < length_N).unsqueeze(-1)
            total_NZ, count_N = (state_SNZ * own_SN1).sum(0), length_N
        place = (loop_N, rows_N)
        total_NZ, count_N = self._sum_RBZ[place] + total_NZ, self._count_RB[place] + count_N
        self._sum_RBZ[place], self._count_RB[place] = total_NZ, count_N
        return total_NZ / count_N.unsqueeze(-1)


class Verdict(NamedTuple):
    """Which of N tokens leave after the loop they are in; and all N logits, where the score was made from them."""

    leaves: list[bool]
    logits_NV: Tensor | None = None


class ExitMeter:
    """Applies a rule to the tokens of a pass.

    Args:
        rule: when tokens leave.
        gate: asked if the rule's signal is the gate.
        head: hidden states [N, D] to logits [N, V].
    """

    def __init__(self, rule: ExitRule, gate: ExitGateReader, head: Callable[[Tensor], Tensor]) -> None:
        self.rule, self.gate, self._head = rule, gate, head

    def judge(
        self,
        before_ND: Tensor,
        h_SND: Tensor,
        rows: Sequence[int],
        loops: Sequence[int],
        length_N: Tensor | None = None,
    ) -> Verdict:
        """Judge tokens, or the last ones of prompts, after the loop they are in.

        Args:
            before_ND: their hidden states before the loop.
            h_SND: and after it.
            rows: of the tokens.
            loops: 0-based.
            length_N: of prompts: how many of the S positions are the row's own.
        """
        rule, last = self.rule, self.rule.max_depth - 1
        if not rule.decides or min(loops) == last or (rule.signal != "gate" and max(loops) + 1 < rule.min_depth):
            return Verdict([loop == last for loop in loops])
        after_ND = h_SND[0] if length_N is None else last_token(h_SND, length_N)
        logits_NV = self._head(after_ND) if rule.reads_head else None
        if rule.signal == "gate":
            score_N = self.gate.score(h_SND, rows, loops, length_N)
        elif rule.signal == "change":
            score_N = steadiness(before_ND, after_ND, loops)
        else:
            assert logits_NV is not None
            score_N = confidence(logits_NV) if rule.signal == "confidence" else certainty(logits_NV)
        settled = (score_N >= rule.threshold).tolist()
        leaves = [
            loop == last or (enough and loop + 1 >= rule.min_depth) for loop, enough in zip(loops, settled, strict=True)
        ]
        return Verdict(leaves, logits_NV)


def last_token(x_SND: Tensor, length_N: Tensor) -> Tensor:
    """Each row's last position that is not padding, [N, D]."""
    return x_SND[length_N - 1, torch.arange(len(length_N), device=x_SND.device)]
