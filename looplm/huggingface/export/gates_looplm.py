"""The exit gates of a LoopLM, and the exits of the tokens. This file travels inside an export.

Shapes: B batch, N rows of the batch that still run, S tokens of this call, T tokens seen (cached ones and these), D
hidden, R loops, Z gate state. Loops count from 0, depth from 1.

Source: linear gate, Q-exit: Ouro (arXiv 2510.25741).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache_looplm import View
from .configuration_looplm import LoopLMConfig


class LoopLMGateLinear(nn.Linear):
    """A linear layer in fp32, whatever its weights are stored in: exit probabilities are products of R small numbers.

    The initial weight has standard deviation ``start_std``; at 0 an untrained gate ignores its input.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True, start_std: float = 0.0) -> None:
        super().__init__(inputs, outputs, bias)
        self.start_std = start_std

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class LoopLMGateCell(nn.GRUCell):
    """A GRU cell in fp32, whatever its weights are stored in. It is called: offloading loads a module's own weights."""

    def forward(self, x_NZ: Tensor, state_NZ: Tensor) -> Tensor:  # type: ignore[override]
        weights = (weight.float() for weight in (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
        return torch.gru_cell(x_NZ, state_NZ, *weights)


class LoopLMLinearGate(LoopLMGateLinear):
    """Ouro's gate: ``a_r = w . h_r + b``."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__(config.hidden_size, 1)

    def forward(  # type: ignore[override]
        self, h_BSD: Tensor, state_BSZ: Tensor | None, view: View, loop: int
    ) -> tuple[Tensor, Tensor | None]:
        return super().forward(h_BSD).squeeze(-1), None


class LoopLMRecurrentGate(nn.Module):
    """A GRU state carried over the loops.

    ::

        z_r = GRUCell(W_u h_r, z_{r-1}),  z_0 = 0
        a_r = w . z_r + b  (+ w_s . mean_{j<=i} z_r[j])  + logit(1 / (R - r + 1))

    The last constant makes an untrained gate (w = b = 0) leave after each loop with the same probability 1/R.
    """

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()
        width = config.gate_state_size
        self.num_loops = config.total_ut_steps
        self.input_proj = LoopLMGateLinear(config.hidden_size, width, bias=False, start_std=config.hidden_size**-0.5)
        self.cell = LoopLMGateCell(width, width)
        self.readout = LoopLMGateLinear(width, 1)
        self.sequence_readout = LoopLMGateLinear(width, 1, bias=False) if config.gate_sequence_level else None

    def forward(self, h_BSD: Tensor, state_BSZ: Tensor | None, view: View, loop: int) -> tuple[Tensor, Tensor]:
        u_BSZ = self.input_proj(h_BSD)
        state_BSZ = torch.zeros_like(u_BSZ) if state_BSZ is None else state_BSZ
        state_BSZ = self.cell(u_BSZ.flatten(0, 1), state_BSZ.flatten(0, 1)).view_as(u_BSZ)
        logit_BS = self.readout(state_BSZ).squeeze(-1)
        if self.sequence_readout is not None:
            # The readout of a mean is the mean of readouts, and those are one number per token to keep.
            logit_BS = logit_BS + running_mean(self.sequence_readout(state_BSZ).squeeze(-1), view, loop)
        return logit_BS + uniform_offset(loop, self.num_loops), state_BSZ


class LoopLMMLPGate(nn.Module):
    """A two-layer readout of the hidden state and of how much the loop changed it.

    ::

        c_r = |h_r - h_{r-1}| / |h_{r-1}|,  c_1 = 1
        a_r = w . silu(W h_r + v c_r + b_1) + b_2  + logit(1 / (R - r + 1))

    What it carries to the next loop is h_r itself.
    """

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()
        width = config.gate_hidden_size
        self.num_loops = config.total_ut_steps
        self.hidden = LoopLMGateLinear(config.hidden_size, width, start_std=config.hidden_size**-0.5)
        self.change = LoopLMGateLinear(1, width, bias=False, start_std=1.0)
        self.readout = LoopLMGateLinear(width, 1)

    def forward(self, h_BSD: Tensor, state_BSD: Tensor | None, view: View, loop: int) -> tuple[Tensor, Tensor]:
        h_BSD = h_BSD.float()
        change_BS1 = torch.ones_like(h_BSD[..., :1])
        if state_BSD is not None:
            change_BS1 = (h_BSD - state_BSD).norm(dim=-1, keepdim=True) / state_BSD.norm(dim=-1, keepdim=True)
        logit_BS = self.readout(F.silu(self.hidden(h_BSD) + self.change(change_BS1))).squeeze(-1)
        return logit_BS + uniform_offset(loop, self.num_loops), h_BSD


GATES: dict[str, type[nn.Module]] = {"lru": LoopLMRecurrentGate, "linear": LoopLMLinearGate, "mlp": LoopLMMLPGate}


def uniform_offset(loop: int, num_loops: int) -> float:
    """Return ``logit(1 / (R - r + 1))`` for r = loop + 1; the last loop takes the rest, its logit is never used: 0."""
    remaining = num_loops - loop
    return -math.log(remaining - 1) if remaining > 1 else 0.0


def running_mean(signal_BS: Tensor, view: View, loop: int) -> Tensor:
    """Return the mean over each document's tokens up to each one, cached ones included, without padding; in double."""
    counts_BS = view.counts_BS.to(signal_BS.dtype)
    signal_BT, counts_BT = signal_BS, counts_BS
    if view.cache is not None:
        signal_BT, counts_BT = view.cache.store_signal(loop, signal_BS, counts_BS, view.rows)
    total_BT, number_BT = (signal_BT * counts_BT).double().cumsum(-1), counts_BT.double().cumsum(-1)
    if view.first_BS is not None:  # then no tokens are cached
        total_BT, number_BT = (x - F.pad(x, (1, 0)).gather(-1, view.first_BS) for x in (total_BT, number_BT))
    mean_BT = total_BT / number_BT.clamp(min=1)
    return mean_BT[:, -signal_BS.size(1) :].to(signal_BS.dtype)


def exit_log_probs(logit_RBS: Tensor) -> Tensor:
    """Return ``log p_r = logsigmoid(a_r) + sum_{j<r} logsigmoid(-a_j)``; the last loop takes the rest. [R, ...]."""
    stay = F.logsigmoid(-logit_RBS[:-1]).cumsum(0)
    nothing = torch.zeros_like(logit_RBS[:1])
    return torch.cat((F.logsigmoid(logit_RBS[:-1]), nothing)) + torch.cat((nothing, stay))


class Exits:
    """Exits of the tokens: each after the first loop by which its cumulative exit probability reaches the threshold.

    Attributes:
        h_BSD: each token's state at its exit.
        depth_BS: number of loops that each token ran.
    """

    def __init__(self, h_BSD: Tensor, threshold: float, depth: int) -> None:
        self.h_BSD, self.depth_BS = torch.zeros_like(h_BSD), h_BSD.new_zeros(h_BSD.shape[:2], dtype=torch.int64)
        self._threshold, self._depth = threshold, depth
        self._log_survival_BS = h_BSD.new_zeros(h_BSD.shape[:2], dtype=torch.float32)

    def record(self, h_NSD: Tensor, logit_NS: Tensor, loop: int, rows: Tensor | None) -> Tensor:
        """Record the tokens that exit after this loop; return which rows have tokens that do not, [N]."""
        here, device = slice(None) if rows is None else rows, self.h_BSD.device
        h_NSD, logit_NS = h_NSD.to(device), logit_NS.to(device)  # the stack and the gate may be elsewhere
        log_survival_NS = self._log_survival_BS[here] + F.logsigmoid(-logit_NS.detach())
        self._log_survival_BS[here] = log_survival_NS
        exits_NS = -torch.expm1(log_survival_NS) >= self._threshold
        if loop + 1 == self._depth:
            exits_NS = torch.ones_like(exits_NS)
        new_NS = exits_NS & (self.depth_BS[here] == 0)
        self.h_BSD[here] = torch.where(new_NS.unsqueeze(-1), h_NSD, self.h_BSD[here])
        self.depth_BS[here] = self.depth_BS[here].masked_fill(new_NS, loop + 1)
        return ~exits_NS.all(-1)
