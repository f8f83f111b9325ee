"""When a token leaves the loops: at a fixed depth, or by the exit gate (Q-exit, Ouro, arXiv 2510.25741).

Q-exit leaves at the first loop whose cumulative exit probability reaches a threshold, as
:func:`looplm.exit_gate.q_exit` does on whole sequences; here the loops arrive one by one and tokens one after another.

Shapes: S sequence, N tokens side by side, B rows, D hidden, Z gate state, R loops.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.exit_gate import LinearExitGate, LRUExitGate, uniform_offset


@dataclass(frozen=True, kw_only=True)
class ExitRule:
    """How deep a token may go.

    Args:
        max_depth: every token leaves after this loop at the latest.
        min_depth: no token leaves before this one.
        threshold: q of Q-exit; at 1 every token goes to max_depth, however the gate's sum rounds.
    """

    max_depth: int
    min_depth: int = 1
    threshold: float = 1.0

    @property
    def asks_gate(self) -> bool:
        """Whether anything depends on the gate."""
        return self.threshold < 1.0 and self.min_depth < self.max_depth


class ExitGateReader:
    """Asks the gate after each loop of each token, and keeps what it must know from earlier loops and tokens.

    The gate's state lives through the loops of a token. With ``gate.sequence_level`` there are sums over earlier tokens
    too, one per loop: the causal mean at loop r runs over the positions that ran loop r. When all positions run all
    loops this is exactly the training-time mean; a token that left early is missing from the later loops' means.

    Args:
        gate: the model's.
        num_loops: R of its exit distribution, as trained.
        rows: texts side by side (B).
    """

    def __init__(self, gate: LRUExitGate | LinearExitGate, num_loops: int, rows: int) -> None:
        self.gate, self.num_loops = gate, num_loops
        weight = gate.readout.weight
        self.sequence_level = isinstance(gate, LRUExitGate) and gate.sequence_readout is not None
        if self.sequence_level:
            self._sum_RBZ = weight.new_zeros(num_loops, rows, weight.size(1), dtype=torch.float32)
            self._count_RB = weight.new_zeros(num_loops, rows, dtype=torch.float32)

    def start(self, rows_N: Tensor) -> None:
        """New tokens are about to enter loop 1, one in each of these rows."""
        self._rows_N = rows_N
        self._state_SNZ: Tensor | None = None
        self._log_survival_N = self._cumulative_N = torch.zeros(len(rows_N), device=rows_N.device)

    def cumulative(self, h_SND: Tensor, length_N: Tensor, loop: int) -> Tensor:
        """Probability [N] that a row's last token has left by the end of this loop.

        Args:
            h_SND: hidden states after the loop: a prompt's, or one token's.
            length_N: how many of the S positions are the row's own; the others are padding.
            loop: 0-based; below ``num_loops - 1``, since after the last loop all have left.
        """
        logit_N = self._logit(h_SND, length_N, loop)
        self._cumulative_N = self._cumulative_N + (F.logsigmoid(logit_N) + self._log_survival_N).exp()
        self._log_survival_N = self._log_survival_N + F.logsigmoid(-logit_N)
        return self._cumulative_N

    def keep(self, stay_N: Tensor) -> None:
        """Only these tokens go on to the next loop."""
        self._rows_N, self._cumulative_N = self._rows_N[stay_N], self._cumulative_N[stay_N]
        self._log_survival_N = self._log_survival_N[stay_N]
        if self._state_SNZ is not None:
            self._state_SNZ = self._state_SNZ[:, stay_N]

    def _logit(self, h_SND: Tensor, length_N: Tensor, loop: int) -> Tensor:
        if not self.sequence_level:  # a token's logit is its own affair: only the last one of a prompt is asked
            last_1ND = last_token(h_SND, length_N).unsqueeze(0)
            logit_1N, self._state_SNZ = self.gate(last_1ND, self._state_SNZ, loop, self.num_loops)
            return logit_1N[0]
        gate = self.gate
        assert isinstance(gate, LRUExitGate) and gate.sequence_readout is not None
        self._state_SNZ = gate.advance(h_SND, self._state_SNZ)
        own_SN1 = (torch.arange(len(h_SND), device=h_SND.device)[:, None] < length_N).unsqueeze(-1)
        self._sum_RBZ[loop, self._rows_N] += (self._state_SNZ * own_SN1).sum(0)
        self._count_RB[loop, self._rows_N] += length_N
        mean_NZ = self._sum_RBZ[loop, self._rows_N] / self._count_RB[loop, self._rows_N].unsqueeze(-1)
        state_NZ = last_token(self._state_SNZ, length_N)
        logit_N1 = F.linear(state_NZ, gate.readout.weight.float(), gate.readout.bias.float())
        logit_N1 = logit_N1 + F.linear(mean_NZ, gate.sequence_readout.weight.float())
        return logit_N1.squeeze(-1) + uniform_offset(loop, self.num_loops)


def last_token(x_SND: Tensor, length_N: Tensor) -> Tensor:
    """Each row's last position that is not padding, [N, D]."""
    return x_SND[length_N - 1, torch.arange(len(length_N), device=x_SND.device)]
