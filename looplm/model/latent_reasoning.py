"""Latent reasoning: a GRU refines MLA's latent of keys and values before they are projected from it.

It is the other way to iterate: a loop runs whole layers again, this unit runs a small cell inside each layer's
attention, on the compressed latent alone (``model.latent_iterations``, T). With c the latent after its norm::

    z_0 = c        z_t = GRUCell(c, z_{t-1}),  t = 1..T        keys and values grow from z_T

With ``model.latent_halting`` they grow from a mean of the states instead, weighed by the probability of stopping at
each, as the exit gate's distribution is (:mod:`looplm.model.exit_gate`)::

    lambda_t = sigmoid(w . z_t + b + logit(1 / (T - t + 1)))        p_t = lambda_t prod_{s<t} (1 - lambda_s)
    keys and values grow from sum_t p_t z_t

The unit sees one position at a time; attention and the loops mix positions. So a cache holds its result, and decoding
needs no other state. The rotary key is projected from the hidden state and passes it by, as it passes the latent by.

The idea is ZeroModel's; GRU: arXiv 1406.1078; the weighed states: PonderNet, arXiv 2107.05407.

Shapes: S sequence, B batch, C latent, T iterations.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.megatron.settings import mark_replicated
from looplm.model.exit_gate import exit_log_probs, linear_fp32, uniform_offset, zero_linear
from looplm.model.norms import RMSNorm


class LatentReasoning(MegatronModule):
    """The latent's norm and T steps of a GRU cell.

    Args:
        config: Megatron's; weights are stored in its ``params_dtype``, and every tensor-parallel rank holds them whole.
        hidden_size: width of the latent (C).
        eps: of the norm.
        iterations: T, at least 1.
        halts: weigh the states by the probability of stopping at each.
        has_norm: normalize the latent first (``model.kv_latent_norm``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        iterations: int,
        halts: bool,
        has_norm: bool,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.iterations = iterations
        self.norm = RMSNorm(config, hidden_size, eps) if has_norm else None
        self.cell = nn.GRUCell(hidden_size, hidden_size, dtype=config.params_dtype)
        # Untrained, T steps keep (1 - 1 / 2T)^T of the latent, about 0.6 for any T.
        nn.init.constant_(self.cell.bias_ih[hidden_size : 2 * hidden_size], math.log(2 * iterations - 1))
        self.halt = zero_linear(hidden_size, config) if halts else None
        mark_replicated(self, config)

    def forward(self, latent_SBC: Tensor) -> Tensor:
        """Return the refined latent, [S, B, C] as the latent itself."""
        states = self._states(latent_SBC)
        if self.halt is None:
            return states[-1]
        state_TSBC = torch.stack(states)
        stop_TSB = _stop_probabilities(self.halt, state_TSBC)
        return (stop_TSB.to(state_TSBC.dtype).unsqueeze(-1) * state_TSBC).sum(0)

    def expected_steps(self, latent_SBC: Tensor) -> Tensor:
        """Return after how many steps each position stops on average, 1 to T, [S, B]; of a unit that halts."""
        assert self.halt is not None
        stop_TSB = _stop_probabilities(self.halt, torch.stack(self._states(latent_SBC)))
        step_T = torch.arange(1, self.iterations + 1, dtype=stop_TSB.dtype, device=stop_TSB.device)
        return torch.einsum("tsb,t->sb", stop_TSB, step_T)

    def _states(self, latent_SBC: Tensor) -> list[Tensor]:
        """Return the state after each step, [S, B, C]."""
        if self.norm is not None:
            latent_SBC = self.norm(latent_SBC)
        cell, state_SBC, states = self.cell, latent_SBC, list[Tensor]()
        input_reset, input_update, input_new = F.linear(latent_SBC, cell.weight_ih, cell.bias_ih).chunk(3, dim=-1)
        for _ in range(self.iterations):
            reset, update, new = F.linear(state_SBC, cell.weight_hh, cell.bias_hh).chunk(3, dim=-1)
            new = torch.tanh(torch.addcmul(input_new, torch.sigmoid(input_reset + reset), new))
            state_SBC = torch.lerp(new, state_SBC, torch.sigmoid(input_update + update))
            states.append(state_SBC)
        return states


def _stop_probabilities(halt: nn.Linear, state_TSBC: Tensor) -> Tensor:
    """Return the probability of stopping at each state, [T, S, B]."""
    steps = len(state_TSBC)
    step_T11 = torch.arange(steps, device=state_TSBC.device).view(-1, 1, 1)
    logit_TSB = linear_fp32(state_TSBC, halt).squeeze(-1) + uniform_offset(step_T11, steps)
    return exit_log_probs(logit_TSB).exp()
