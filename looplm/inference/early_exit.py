"""Early exit: a token leaves the loops at a fixed depth, or after the first loop whose score reaches a threshold.

    gate        probability by the exit gate that the token has exited: Q-exit (Ouro, arXiv 2510.25741)
    confidence  probability of the likeliest next token
    entropy     1 - entropy of the next token / log V
    change      1 - |h_r - h_{r-1}| / |h_r| of the hidden state; 0 in the first loop, which has no state before it

The last three need no gate; they are baselines for it. All scores are in [0, 1], and rise as a token settles. Tokens
that are scored together may be in different loops.

Shapes: S sequence, N tokens side by side, B rows, D hidden, V vocabulary, Z gate state, R loops.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.bounds import require
from looplm.config import ModelConfig
from looplm.inference.stack import LoopedStack

ExitSignal = Literal["gate", "confidence", "entropy", "change"]


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """When a token exits.

    Args:
        max_depth: every token exits after this loop at the latest.
        min_depth: no token exits before this loop.
        threshold: the score to reach. At 1 every token runs max_depth loops, however the score is rounded.
        signal: which score.
    """

    max_depth: int
    min_depth: int = 1
    threshold: float = 1.0
    signal: ExitSignal = "gate"

    @property
    def decides(self) -> bool:
        """True if depths depend on the score."""
        return self.threshold < 1.0 and self.min_depth < self.max_depth


def check_signal(signal: ExitSignal, model: ModelConfig) -> None:
    """Raise a :class:`UserError` if the model's tokens cannot be scored so after each loop."""
    fix = f"each loop would need the model's {model.coda_layers} coda layers for its logits; give gate or change"
    require(not model.coda_layers or signal in ("gate", "change"), "exit_signal", signal, fix)


class ExitDecision(NamedTuple):
    """Which of N tokens exit after the loop they are in, and the logits of all N if the score needed them."""

    exits: list[bool]
    logits_NV: Tensor | None = None


class ExitDecider:
    """Decides which tokens of a pass exit, and keeps what the exit gate must know of earlier loops and tokens.

    The gate's state lives through the loops of a token. A gate that reads the sequence also needs sums over earlier
    tokens, one per row and loop: the causal mean at loop r runs over the positions that ran loop r. If all positions
    run all loops, this is exactly the training-time mean. A token that exited early is missing from later loops' means.

    Args:
        stack: whose exit gate and head give the scores.
        rule: when tokens exit.
        rows: texts side by side (B).
    """

    def __init__(self, stack: LoopedStack, rule: ExitRule, rows: int) -> None:
        self._rule, self._stack, self._gate = rule, stack, stack.gate
        self._sum_RB = torch.zeros(stack.model_config.num_loops, rows, device=stack.device)
        self._count_RB = torch.zeros_like(self._sum_RB)
        self.begin(0)

    def begin(self, tokens: int, length: int = 1) -> None:
        """Start over with this many tokens in loop 1, or with this many prompts of ``length`` positions."""
        length = length if self._gate.reads_sequence else 1  # otherwise only a prompt's last token is scored
        self._log_survival_N = self._sum_RB.new_zeros(tokens)
        self._state_SNZ = self._sum_RB.new_zeros(length, tokens, self._gate.state_size)

    def regroup(self, order_N: Tensor, new: int) -> None:
        """Set up the next pass: append ``new`` tokens, then take all in this order."""
        if self._rule.decides:
            self._log_survival_N = F.pad(self._log_survival_N, (0, new))[order_N]
            self._state_SNZ = F.pad(self._state_SNZ, (0, 0, 0, new))[:, order_N]

    def copy_row(self, row: int, source: "ExitDecider", source_row: int) -> None:
        """Copy a row's sums from another decider, or from another row of this one."""
        self._sum_RB[:, row] = source._sum_RB[:, source_row]
        self._count_RB[:, row] = source._count_RB[:, source_row]

    def decide(
        self,
        before_ND: Tensor,
        h_SND: Tensor,
        rows: Sequence[int],
        loops: Sequence[int],
        length_N: Tensor | None = None,
    ) -> ExitDecision:
        """Decide which tokens, or last tokens of prompts, exit after the loop they are in.

        Args:
            before_ND: hidden states before the loop.
            h_SND: hidden states after it: of single tokens (S = 1), or of prompts.
            rows: rows of the tokens.
            loops: 0-based.
            length_N: for prompts: how many of the S positions are the row's own; the others are padding.
        """
        rule, last = self._rule, self._rule.max_depth - 1
        if not rule.decides or min(loops) == last or (rule.signal != "gate" and max(loops) + 1 < rule.min_depth):
            return ExitDecision([loop == last for loop in loops])
        after_ND, logits_NV = h_SND[0] if length_N is None else last_token(h_SND, length_N), None
        if rule.signal == "gate":
            h_SND, after_ND = self._stack.readable(h_SND), self._stack.readable(after_ND)
            if length_N is not None and not self._gate.reads_sequence:
                h_SND, length_N = after_ND.unsqueeze(0), None
            score_N = self._exit_probability(h_SND, rows, loops, length_N)
        elif rule.signal == "change":
            score_N = steadiness(before_ND, after_ND, loops)
        else:
            logits_NV = self._stack.head(self._stack.readable(after_ND))
            score_N = confidence(logits_NV) if rule.signal == "confidence" else certainty(logits_NV)
        settled = zip(loops, (score_N >= rule.threshold).tolist(), strict=True)
        exits = [loop == last or (done and loop + 1 >= rule.min_depth) for loop, done in settled]
        return ExitDecision(exits, logits_NV)

    def _exit_probability(
        self, h_SND: Tensor, rows: Sequence[int], loops: Sequence[int], length_N: Tensor | None
    ) -> Tensor:
        """Return the probability [N] that the tokens have exited by the end of the loop they are in."""
        place = loop_N, _ = torch.tensor([list(loops), list(rows)], device=h_SND.device).unbind()

        def causal_mean(value_SN: Tensor) -> Tensor:
            """Add these values to the sums, and return the mean of each token's row and loop, [N]."""
            if length_N is None:
                total_N, count_N = value_SN[0], torch.ones_like(loop_N)
            else:
                own_SN = torch.arange(len(value_SN), device=value_SN.device)[:, None] < length_N
                total_N, count_N = (value_SN * own_SN).sum(0), length_N
            total_N, count_N = self._sum_RB[place] + total_N, self._count_RB[place] + count_N
            self._sum_RB[place], self._count_RB[place] = total_N, count_N
            return total_N / count_N

        logit_SN, state_SNZ = self._gate.step(h_SND, self._state_SNZ, loop_N, len(self._sum_RB), causal_mean)
        assert state_SNZ is not None  # a gate without a state returns the one of width 0 that it was given
        self._state_SNZ = state_SNZ
        logit_N = logit_SN[0] if length_N is None else last_token(logit_SN, length_N)
        self._log_survival_N = self._log_survival_N + F.logsigmoid(-logit_N)
        return -torch.expm1(self._log_survival_N)


class PromptExits:
    """States with which the tokens of prompts leave the loops, for a coda to read.

    Every token of a prompt runs all loops, because later tokens need its entries. A coda nevertheless reads each as of
    the loop in which it exited, as it does a generated token, so that a prompt is the same text read in any pieces.

    Args:
        stack: whose exit gate gives the scores.
        rule: when tokens exit; its signal is gate or change.
        h_SND: the prompts' hidden states, for their shape.

    Attributes:
        left_SND: state of each token at its exit; undefined for tokens that have not exited yet.
    """

    def __init__(self, stack: LoopedStack, rule: ExitRule, h_SND: Tensor) -> None:
        self._stack, self._rule = stack, rule
        self.left_SND = torch.empty_like(h_SND)
        self._stays_SN = torch.ones(h_SND.shape[:2], dtype=torch.bool, device=h_SND.device)
        self._log_survival_SN = torch.zeros(h_SND.shape[:2], device=h_SND.device)
        self._state_SNZ: Tensor | None = None

    def record(self, before_SND: Tensor, h_SND: Tensor, loop: int) -> None:
        """Record the states of the tokens that exit after a loop, 0-based, given the states before and after it."""
        exits_SN = torch.ones_like(self._stays_SN)
        if loop + 1 < self._rule.max_depth:
            score_SN = self._score(before_SND, h_SND, loop)
            exits_SN = (score_SN >= self._rule.threshold) & (loop + 1 >= self._rule.min_depth)
        self.left_SND = torch.where((exits_SN & self._stays_SN).unsqueeze(-1), h_SND, self.left_SND)
        self._stays_SN = self._stays_SN & ~exits_SN

    def _score(self, before_SND: Tensor, h_SND: Tensor, loop: int) -> Tensor:
        if self._rule.signal == "change":
            return steadiness(before_SND, h_SND, [loop])
        trained_loops = self._stack.model_config.num_loops
        logit_SN, self._state_SNZ = self._stack.gate(self._stack.readable(h_SND), self._state_SNZ, loop, trained_loops)
        self._log_survival_SN = self._log_survival_SN + F.logsigmoid(-logit_SN)
        return -torch.expm1(self._log_survival_SN)


def confidence(logits_NV: Tensor) -> Tensor:
    """Return the probability of the likeliest id, [N]."""
    return (logits_NV.amax(-1) - logits_NV.logsumexp(-1)).exp()


def certainty(logits_NV: Tensor) -> Tensor:
    """Return 1 - entropy / log V, [N]: 0 if all ids are equally likely, 1 if one of them is certain."""
    log_p_NV = logits_NV.log_softmax(-1)
    return 1 + (log_p_NV.exp() * log_p_NV).sum(-1) / math.log(max(2, logits_NV.size(-1)))


def steadiness(before_ND: Tensor, after_ND: Tensor, loops: Sequence[int]) -> Tensor:
    """Return 1 - |change| / |state|, at least 0, [N]; 0 in the first loop."""
    before_ND, after_ND = before_ND.float(), after_ND.float()
    score_N: Tensor = (1 - (after_ND - before_ND).norm(dim=-1) / after_ND.norm(dim=-1)).clamp_min(0)
    return score_N.masked_fill(torch.tensor([loop == 0 for loop in loops], device=score_N.device), 0.0)


def last_token(x_SND: Tensor, length_N: Tensor) -> Tensor:
    """Return each row's last position that is not padding, [N, D]."""
    return x_SND[length_N - 1, torch.arange(len(length_N), device=x_SND.device)]
