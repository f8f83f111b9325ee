"""Latent reasoning: a GRU that refines MLA's latent. This file travels inside an export.

Shapes: C latent, T iterations; a latent is [..., C].

Sources: the idea: ZeroModel. GRU: arXiv 1406.1078. The weighed states: PonderNet (2107.05407).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_looplm import LoopLMConfig
from .gates_looplm import LoopLMGateLinear, exit_log_probs, uniform_offset
from .norm_looplm import LoopLMRMSNorm


class LoopLMRefiningCell(nn.GRUCell):
    """A GRU cell that starts slowly: untrained, T steps keep (1 - 1 / 2T)^T of the latent, about 0.6 for any T."""

    def __init__(self, width: int, iterations: int) -> None:
        super().__init__(width, width)
        self.iterations = iterations

    def start(self) -> None:
        self.reset_parameters()
        nn.init.constant_(self.bias_ih[self.hidden_size : 2 * self.hidden_size], math.log(2 * self.iterations - 1))

    def forward(self, latent: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Return the state after each step."""
        state, states = latent, list[Tensor]()
        input_reset, input_update, input_new = F.linear(latent, self.weight_ih, self.bias_ih).chunk(3, -1)
        for _ in range(self.iterations):
            reset, update, new = F.linear(state, self.weight_hh, self.bias_hh).chunk(3, -1)
            new = torch.tanh(input_new + torch.sigmoid(input_reset + reset) * new)
            state = torch.lerp(new, state, torch.sigmoid(input_update + update))
            states.append(state)
        return states


class LoopLMLatentReasoning(nn.Module):
    """The latent's norm, and T steps of a GRU cell that reads it; keys and values grow from what comes out.

    ::

        z_0 = c        z_t = GRUCell(c, z_{t-1}),  t = 1..T        z_T comes out

    With ``latent_halting`` a mean of the states z_1 .. z_T comes out, weighed by the probability of stopping at each.
    """

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()
        width, self.iterations = config.kv_lora_rank, config.latent_iterations
        self.norm = LoopLMRMSNorm(width, config.rms_norm_eps) if config.kv_latent_norm else None
        self.cell = LoopLMRefiningCell(width, self.iterations)
        self.halt = LoopLMGateLinear(width, 1) if config.latent_halting else None

    def forward(self, latent: Tensor) -> Tensor:
        if self.norm is not None:
            latent = self.norm(latent)
        states = self.cell(latent)
        if self.halt is None:
            return states[-1]
        logits = [self.halt(z) + uniform_offset(step, self.iterations) for step, z in enumerate(states)]
        stop = exit_log_probs(torch.stack(logits)).exp().to(states[-1].dtype)
        return (stop * torch.stack(states)).sum(0)
