"""The exit gate: after each loop, should this token leave?

Two gates, and the pure functions that turn their logits into an exit distribution (Ouro, arXiv 2510.25741, section 3).

Shapes: S sequence, T the whole one where S is a rank's part, B batch, D hidden, Z gate state, R loops. Loops are counted
from 0 in code, depth from 1 in words.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.config import GateConfig
from looplm.megatron import context_parallel


class LinearExitGate(MegatronModule):
    """Ouro's gate: ``lambda_r = sigmoid(w . h_r + b)``, no state."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.readout = nn.Linear(config.hidden_size, 1, dtype=config.params_dtype)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        mark_replicated(self, config)

    def forward(
        self,
        h_SBD: Tensor,
        state_SBZ: Tensor | None = None,
        loop: int = 0,
        num_loops: int = 1,
        document_start_SB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The logit of leaving after this loop, [S, B] in fp32; there is no state to pass on."""
        return _linear_fp32(h_SBD, self.readout).squeeze(-1), None


class LRUExitGate(MegatronModule):
    """A latent reasoning unit: a GRU state carried over the loops, so the gate sees how a token's thought develops.

    ::

        u_r = W_u h_r        z_r = GRUCell(u_r, z_{r-1}),  z_0 = 0
        a_r = w . z_r + b  (+ w_s . mean_{j<=i} z_r[j])  + logit(1 / (R - r + 1))        lambda_r = sigmoid(a_r)

    The last constant makes an untrained gate (w = b = 0) exactly the uniform prior p_r = 1/R. The mean in brackets is
    the optional sequence-level signal; it runs over positions up to and including the token's own, inside its document:
    a plain mean would leak the future.
    """

    def __init__(
        self, config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config)
        self.groups = groups
        width, dtype = gate.state_size, config.params_dtype
        self.input_proj = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype)
        self.cell = nn.GRUCell(width, width, dtype=dtype)
        self.readout = nn.Linear(width, 1, dtype=dtype)
        self.sequence_readout = nn.Linear(width, 1, bias=False, dtype=dtype) if gate.sequence_level else None
        nn.init.normal_(self.input_proj.weight, std=config.hidden_size**-0.5)
        nn.init.zeros_(self.readout.weight)
        nn.init.zeros_(self.readout.bias)
        if self.sequence_readout is not None:
            nn.init.zeros_(self.sequence_readout.weight)
        mark_replicated(self, config)

    def forward(
        self,
        h_SBD: Tensor,
        state_SBZ: Tensor | None = None,
        loop: int = 0,
        num_loops: int = 1,
        document_start_SB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One loop's logit of leaving, and the state for the next loop, both in fp32.

        Args:
            h_SBD: hidden state after loop ``loop`` (after the loop-end norm).
            state_SBZ: state after the loop before; None before the first.
            loop: 0-based loop index r - 1.
            num_loops: R of the exit distribution. In loops from R on the offset is that of the last loop.
            document_start_SB: sequence level only: index, in the whole sequence, of the first position of each token's
                document, for the tokens of this context-parallel rank; None if every sample is one document.

        Returns:
            logit [S, B] and state [S, B, Z].
        """
        state_SBZ = self.advance(h_SBD, state_SBZ)
        logit_SB = _linear_fp32(state_SBZ, self.readout).squeeze(-1)
        if self.sequence_readout is not None:
            # The read-out of a mean is the mean of read-outs, and those are one number per token to gather and sum.
            signal_SB = _linear_fp32(state_SBZ, self.sequence_readout).squeeze(-1)
            logit_SB = logit_SB + self._document_mean(signal_SB, document_start_SB)
        return logit_SB + uniform_offset(loop, num_loops), state_SBZ

    def _document_mean(self, signal_SB: Tensor, document_start_SB: Tensor | None) -> Tensor:
        """The running mean at this rank's positions; what it runs over may lie on other ranks."""
        groups = self.groups
        if groups is None:
            return causal_document_mean(signal_SB, document_start_SB)
        if self.config.sequence_parallel:
            signal_SB = gather_from_sequence_parallel_region(signal_SB, group=groups.tp)
        mean_SB = causal_document_mean(signal_SB, document_start_SB, groups.cp)
        return mean_SB.chunk(groups.tp.size())[groups.tp.rank()] if self.config.sequence_parallel else mean_SB

    def advance(self, h: Tensor, state: Tensor | None) -> Tensor:
        """``z_r`` from ``h_r`` [..., D] and ``z_{r-1}`` [..., Z] (None is zero), in fp32."""
        cell = self.cell
        u = _linear_fp32(h, self.input_proj)
        state = torch.zeros_like(u) if state is None else state
        weights = (cell.weight_ih.float(), cell.weight_hh.float(), cell.bias_ih.float(), cell.bias_hh.float())
        flat = torch.gru_cell(u.flatten(0, -2), state.flatten(0, -2), *weights)
        return flat.view(u.shape)


def build_exit_gate(
    config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None = None
) -> LRUExitGate | LinearExitGate:
    """The gate that ``gate.kind`` names; ``groups`` are those that split a sequence, None if none does."""
    return LRUExitGate(config, gate, groups) if gate.kind == "lru" else LinearExitGate(config)


def mark_replicated(module: nn.Module, config: TransformerConfig) -> None:
    """Every tensor-parallel rank holds these weights whole; under sequence parallelism each sees some positions only,
    so Megatron must sum their gradients over the ranks."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _linear_fp32(x: Tensor, linear: nn.Linear) -> Tensor:
    """Gate math is fp32 whatever the weights are stored in: exit probabilities are products of R small numbers."""
    return F.linear(x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float())


def uniform_offset(loop: int, num_loops: int) -> float:
    """``logit(1 / (R - r + 1))`` for r = loop + 1; the last loop takes the rest, its logit is never used: 0."""
    remaining = num_loops - loop
    return -math.log(remaining - 1) if remaining > 1 else 0.0


def causal_document_mean(
    x_SB: Tensor, document_start_SB: Tensor | None, group: context_parallel.Group = None
) -> Tensor:
    """Mean over positions ``start..i`` of each position i's document: [S, B] in, [S, B] out.

    Sums run in double: a short document late in a long sample is the small difference of two large sums.

    Args:
        x_SB: values at this context-parallel rank's positions.
        document_start_SB: index, in the whole sequence, at which their documents start; None if it is one document.
        group: the context-parallel ranks; None if S is the whole sequence.
    """
    whole_TB = context_parallel.restore(x_SB, group)
    before_TB = F.pad(whole_TB.double().cumsum(0), (0, 0, 1, 0))  # the sum before each position, and at the end of all
    end_S = context_parallel.positions(len(whole_TB), group, x_SB.device) + 1
    total_SB, count_SB = before_TB[end_S], end_S.unsqueeze(-1)
    if document_start_SB is not None:
        total_SB, count_SB = total_SB - before_TB.gather(0, document_start_SB), count_SB - document_start_SB
    return (total_SB / count_SB).to(x_SB.dtype)


def exit_log_probs(logit_RSB: Tensor) -> Tensor:
    """``log p_r = logsigmoid(a_r) + sum_{j<r} logsigmoid(-a_j)``; the last loop takes what is left. [R, ...] both ways."""
    stay = F.logsigmoid(-logit_RSB[:-1]).cumsum(0)
    survival = torch.cat((torch.zeros_like(logit_RSB[:1]), stay))
    return torch.cat((F.logsigmoid(logit_RSB[:-1]), torch.zeros_like(logit_RSB[:1]))) + survival


def exit_entropy(log_p_RSB: Tensor) -> Tensor:
    """Entropy of the exit distribution, in nats. [R, ...] in, [...] out."""
    return -(log_p_RSB.exp() * log_p_RSB).sum(0)


def q_exit(log_p_RSB: Tensor, threshold: float) -> Tensor:
    """Depth at which a token leaves: the first r whose cumulative probability reaches ``threshold``.

    Args:
        log_p_RSB: log exit probabilities, [R, ...].
        threshold: q in [0, 1]; at 1 every token runs all R loops.

    Returns:
        1-based depth, int64, [...].
    """
    if threshold >= 1.0:
        return torch.full_like(log_p_RSB[0], log_p_RSB.size(0), dtype=torch.int64)
    reached = log_p_RSB.exp().cumsum(0)[:-1] < threshold
    return 1 + reached.sum(0)
