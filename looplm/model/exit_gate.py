"""The exit gate: after each loop, should this token leave?

The gates, and the pure functions that turn their logits into an exit distribution (Ouro, arXiv 2510.25741, section 3).

Shapes: S sequence, T the whole sequence if S is one rank's part of it, B batch, D hidden, Z state, R loops. Loops count
from 0 in code, depth from 1 in words.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.config import GateConfig
from looplm.megatron import context_parallel
from looplm.megatron.settings import mark_replicated
from looplm.parameters import chosen

CausalMean = Callable[[Tensor], Tensor]


class ExitGate(MegatronModule):
    """Base class of the gates. A gate defines :meth:`step` and, if it carries a state, ``state_size``.

    Args:
        config: Megatron's; weights are stored in its ``params_dtype`` and marked as replicated over tensor parallelism.
        gate: the gate's configuration.
        groups: process groups that split a sequence; None if none does.
    """

    state_size = 0  # width of the state that a token carries from loop to loop
    reads_sequence = False  # True if step() asks for a causal mean

    def __init__(
        self, config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None = None
    ) -> None:
        super().__init__(config)
        self.groups = groups

    def step(
        self, h: Tensor, state: Tensor | None, loop: int | Tensor, num_loops: int, causal_mean: CausalMean
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logit of leaving after a loop, and the state for the next loop, both in fp32.

        Args:
            h: [..., D], hidden states after the loop (after the loop-end norm).
            state: [..., Z], the state after the loop before. In the first loop None or zeros.
            loop: 0-based; a tensor [N] for tokens [..., N, D] that are in different loops.
            num_loops: R of the exit distribution. Later loops than R count as the last one.
            causal_mean: maps a value per token [...] to its mean over the token's document so far.

        Returns:
            logit [...] and state [..., Z].
        """
        raise NotImplementedError

    def forward(
        self,
        h_SBD: Tensor,
        state_SBZ: Tensor | None,
        loop: int,
        num_loops: int,
        document_start_SB: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take one :meth:`step` with all tokens of a batch in the same loop.

        Args:
            h_SBD: hidden states; this rank's part under sequence and context parallelism.
            state_SBZ: state after the loop before; None before the first.
            loop: 0-based.
            num_loops: R of the exit distribution.
            document_start_SB: index, in the whole sequence, of the first position of each token's document, for the
                tokens of this context-parallel rank; None if every sample is one document.
        """

        def causal_mean(value_SB: Tensor) -> Tensor:
            return self._document_mean(value_SB, document_start_SB)

        return self.step(h_SBD, state_SBZ, loop, num_loops, causal_mean)

    def _document_mean(self, value_SB: Tensor, document_start_SB: Tensor | None) -> Tensor:
        """Return the running mean at this rank's positions; other ranks may hold positions that it runs over."""
        groups = self.groups
        if groups is None:
            return causal_document_mean(value_SB, document_start_SB)
        if self.config.sequence_parallel:
            value_SB = gather_from_sequence_parallel_region(value_SB, group=groups.tp)
        mean_SB = causal_document_mean(value_SB, document_start_SB, groups.cp)
        return mean_SB.chunk(groups.tp.size())[groups.tp.rank()] if self.config.sequence_parallel else mean_SB


class LinearExitGate(ExitGate):
    """Ouro's gate: ``lambda_r = sigmoid(w . h_r + b)``, no state."""

    def __init__(self, config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None) -> None:
        super().__init__(config, gate, groups)
        self.readout = zero_linear(config.hidden_size, config)
        mark_replicated(self, config)

    def step(
        self, h: Tensor, state: Tensor | None, loop: int | Tensor, num_loops: int, causal_mean: CausalMean
    ) -> tuple[Tensor, Tensor | None]:
        return linear_fp32(h, self.readout).squeeze(-1), state


class LRUExitGate(ExitGate):
    """A recurrent gate: a GRU carries a state over the loops, so the gate sees how a token's hidden state develops.

    ::

        u_r = W_u h_r        z_r = GRUCell(u_r, z_{r-1}),  z_0 = 0
        a_r = w . z_r + b  (+ w_s . mean_{j<=i} z_r[j])  + logit(1 / (R - r + 1))        lambda_r = sigmoid(a_r)

    The last constant makes an untrained gate (w = b = 0) exactly the uniform prior p_r = 1/R. The mean in brackets is
    the optional sequence-level signal. It runs over positions up to and including the token's own, inside its document:
    a plain mean would leak the future.
    """

    def __init__(self, config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None) -> None:
        super().__init__(config, gate, groups)
        width, dtype = gate.state_size, config.params_dtype
        self.state_size = width
        self.input_proj = nn.Linear(config.hidden_size, width, bias=False, dtype=dtype)
        self.cell = nn.GRUCell(width, width, dtype=dtype)
        self.readout = zero_linear(width, config)
        self.sequence_readout = zero_linear(width, config, bias=False) if gate.sequence_level else None
        self.reads_sequence = gate.sequence_level
        nn.init.normal_(self.input_proj.weight, std=config.hidden_size**-0.5)
        mark_replicated(self, config)

    def step(
        self, h: Tensor, state: Tensor | None, loop: int | Tensor, num_loops: int, causal_mean: CausalMean
    ) -> tuple[Tensor, Tensor]:
        cell, u = self.cell, linear_fp32(h, self.input_proj)
        state = torch.zeros_like(u) if state is None else state
        weights = (cell.weight_ih.float(), cell.weight_hh.float(), cell.bias_ih.float(), cell.bias_hh.float())
        state = torch.gru_cell(u.flatten(0, -2), state.flatten(0, -2), *weights).view(u.shape)
        logit = linear_fp32(state, self.readout).squeeze(-1)
        if self.sequence_readout is not None:
            # The readout of a mean is the mean of readouts, and those are one number per token to gather and sum.
            logit = logit + causal_mean(linear_fp32(state, self.sequence_readout).squeeze(-1))
        return logit + uniform_offset(loop, num_loops), state


class MLPExitGate(ExitGate):
    """A two-layer readout of the hidden state and of how much the loop changed it. It has no recurrent state.

    ::

        c_r = |h_r - h_{r-1}| / |h_{r-1}|,  c_1 = 1
        a_r = w . silu(W h_r + v c_r + b_1) + b_2  + logit(1 / (R - r + 1))        lambda_r = sigmoid(a_r)

    What it carries to the next loop is h_r itself. Untrained (w = b_2 = 0) it is the uniform prior, like the LRU gate.
    """

    def __init__(self, config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None) -> None:
        super().__init__(config, gate, groups)
        self.state_size = config.hidden_size
        self.hidden = nn.Linear(config.hidden_size, gate.hidden_size, dtype=config.params_dtype)
        self.change = nn.Linear(1, gate.hidden_size, bias=False, dtype=config.params_dtype)
        self.readout = zero_linear(gate.hidden_size, config)
        nn.init.normal_(self.hidden.weight, std=config.hidden_size**-0.5)
        nn.init.normal_(self.change.weight, std=1.0)
        nn.init.zeros_(self.hidden.bias)
        mark_replicated(self, config)

    def step(
        self, h: Tensor, state: Tensor | None, loop: int | Tensor, num_loops: int, causal_mean: CausalMean
    ) -> tuple[Tensor, Tensor]:
        h = h.float()
        change = torch.ones_like(h[..., :1])
        if state is not None:
            before = state.norm(dim=-1, keepdim=True)  # zero for a token in its first loop
            moved = (h - state).norm(dim=-1, keepdim=True) / before.masked_fill(before == 0, 1.0)
            change = torch.where(before > 0, moved, change)
        inner = F.silu(linear_fp32(h, self.hidden) + linear_fp32(change, self.change))
        return linear_fp32(inner, self.readout).squeeze(-1) + uniform_offset(loop, num_loops), h


GATES: dict[str, type[ExitGate]] = {"lru": LRUExitGate, "linear": LinearExitGate, "mlp": MLPExitGate}


def build_exit_gate(
    config: TransformerConfig, gate: GateConfig, groups: ProcessGroupCollection | None = None
) -> ExitGate:
    """Return the gate that ``gate.kind`` names; ``groups`` are those that split a sequence, None if none does.

    Raises:
        ValueError: there is no gate of that kind.
    """
    return chosen(GATES, "gate.kind", gate.kind)(config, gate, groups)


def zero_linear(inputs: int, config: TransformerConfig, bias: bool = True) -> nn.Linear:
    """Return a readout to one number that starts at zero, so that an untrained gate has no opinion."""
    linear = nn.Linear(inputs, 1, bias=bias, dtype=config.params_dtype)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def linear_fp32(x: Tensor, linear: nn.Linear) -> Tensor:
    """Return ``linear(x)`` in fp32 whatever its weights are stored in: exit probabilities multiply R small numbers."""
    return F.linear(x.float(), linear.weight.float(), None if linear.bias is None else linear.bias.float())


def uniform_offset(loop: int | Tensor, num_loops: int) -> float | Tensor:
    """Return ``logit(1 / (R - r + 1))`` for r = loop + 1, and 0 from the last loop on, whose logit is never used."""
    if isinstance(loop, Tensor):
        return -(num_loops - loop - 1).clamp(min=1).float().log()
    remaining = num_loops - loop
    return -math.log(remaining - 1) if remaining > 1 else 0.0


def causal_document_mean(
    x_SB: Tensor, document_start_SB: Tensor | None, group: context_parallel.Group = None
) -> Tensor:
    """Return the mean over positions ``start..i`` of each position i's document: [S, B] in, [S, B] out.

    Sums run in double: a short document late in a long sample is the small difference of two large sums.

    Args:
        x_SB: values at this context-parallel rank's positions.
        document_start_SB: index, in the whole sequence, at which their documents start; None if it is one document.
        group: the context-parallel ranks; None if S is the whole sequence.
    """
    whole_TB = context_parallel.gather(x_SB, group)
    before_TB = F.pad(whole_TB.double().cumsum(0), (0, 0, 1, 0))  # the sum before each position, and the total
    end_S = context_parallel.positions(len(whole_TB), group, x_SB.device) + 1
    total_SB, count_SB = before_TB[end_S], end_S.unsqueeze(-1)
    if document_start_SB is not None:
        document_start_SB = document_start_SB.to(x_SB.device, non_blocking=True)
        total_SB, count_SB = total_SB - before_TB.gather(0, document_start_SB), count_SB - document_start_SB
    return (total_SB / count_SB).to(x_SB.dtype)


def exit_log_probs(logit_RSB: Tensor) -> Tensor:
    """Return ``log p_r = logsigmoid(a_r) + sum_{j<r} logsigmoid(-a_j)``, [R, ...]; the last loop takes the rest."""
    stay = F.logsigmoid(-logit_RSB[:-1]).cumsum(0)
    survival = torch.cat((torch.zeros_like(logit_RSB[:1]), stay))
    return torch.cat((F.logsigmoid(logit_RSB[:-1]), torch.zeros_like(logit_RSB[:1]))) + survival


def exit_log_prob(logits: Sequence[Tensor], last: bool) -> Tensor:
    """Return log p_r of loop r, one row of :func:`exit_log_probs`, from the logits of the loops up to it.

    Args:
        logits: the gate's after each loop so far; r is the last of them.
        last: True if there is no later loop, so that this one takes the rest.
    """
    *before, own = logits
    log_p = torch.zeros_like(own) if last else F.logsigmoid(own)
    for logit in before:
        log_p = log_p + F.logsigmoid(-logit)
    return log_p


def exit_entropy(log_p_RSB: Tensor) -> Tensor:
    """Return the entropy of the exit distribution in nats, [...]."""
    return -(log_p_RSB.exp() * log_p_RSB).sum(0)


def q_exit(log_p_RSB: Tensor, threshold: float) -> Tensor:
    """Return the depth at which a token leaves: the first r whose cumulative probability reaches ``threshold``.

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
