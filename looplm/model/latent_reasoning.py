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
Two switches let it see more, and are refused where that would need more. ``model.latent_mixing`` adds to the state in
front of each step what a causal convolution makes of the last positions, for each of the C numbers on its own.
``model.latent_sequence_halting`` adds ``mean_{j<=i} w' . z_t(j)`` to the logit of position i.

In training, two penalties may hold the unit back (``loss.latent_stability`` and ``loss.latent_ponder_cost``)::

    stability sum_t |z_t - z_{t-1}|^2 / C  +  ponder_cost sum_t t p_t

They arise inside the layers, of which pipeline ranks hold different ones, and far from the loss. So their gradients are
added on the way back, by Megatron's function for the same problem of mixture-of-experts layers.

The idea is ZeroModel's; GRU: arXiv 1406.1078; the weighed states: PonderNet, arXiv 2107.05407.

Shapes: S sequence, B batch, C latent, T iterations.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.config import LossConfig
from looplm.model.exit_gate import (
    causal_document_mean,
    exit_log_probs,
    linear_fp32,
    mark_replicated,
    uniform_offset,
    zero_linear,
)
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
        mixed: positions that a convolution mixes in front of each step; 0 for none.
        halts_by_sequence: the probability of stopping reads the mean over the positions so far, too.

    Attributes:
        stability: weight of its first penalty, in training.
        ponder_cost: weight of its second.
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
        mixed: int,
        halts_by_sequence: bool,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.iterations = iterations
        self.norm = RMSNorm(config, hidden_size, eps) if has_norm else None
        self.cell = nn.GRUCell(hidden_size, hidden_size, dtype=config.params_dtype)
        # Untrained, T steps keep (1 - 1 / 2T)^T of the latent, about 0.6 for any T.
        nn.init.constant_(self.cell.bias_ih[hidden_size : 2 * hidden_size], math.log(2 * iterations - 1))
        self.halt = zero_linear(hidden_size, config) if halts else None
        self.halt_sequence = zero_linear(hidden_size, config, bias=False) if halts_by_sequence else None
        self.mix = _CausalConvolution(hidden_size, mixed, config) if mixed else None
        mark_replicated(self, config)
        self.stability = self.ponder_cost = 0.0

    def forward(self, latent_SBC: Tensor) -> Tensor:
        """Return the refined latent, [S, B, C] as the latent itself. Its gradient has that of the penalties."""
        if self.norm is not None:
            latent_SBC = self.norm(latent_SBC)
        cell, states = self.cell, [latent_SBC]
        input_reset, input_update, input_new = F.linear(latent_SBC, cell.weight_ih, cell.bias_ih).chunk(3, dim=-1)
        for _ in range(self.iterations):
            before = states[-1] if self.mix is None else states[-1] + self.mix(states[-1])
            reset, update, new = F.linear(before, cell.weight_hh, cell.bias_hh).chunk(3, dim=-1)
            new = torch.tanh(torch.addcmul(input_new, torch.sigmoid(input_reset + reset), new))
            states.append(torch.lerp(new, before, torch.sigmoid(input_update + update)))
        stop_TSB = None if self.halt is None else self._stop_probabilities(self.halt, self.halt_sequence, states[1:])
        refined_SBC = states[-1]
        if stop_TSB is not None:
            refined_SBC = torch.einsum("tsb,tsbc->sbc", stop_TSB.to(refined_SBC.dtype), torch.stack(states[1:]))
        if self.training and (self.stability or self.ponder_cost):
            penalty = self._penalty(states, stop_TSB) * self._loss_scale(refined_SBC)
            refined_SBC = MoEAuxLossAutoScaler.apply(refined_SBC, penalty)
        return refined_SBC

    @staticmethod
    def _stop_probabilities(halt: nn.Linear, halt_sequence: nn.Linear | None, states: list[Tensor]) -> Tensor:
        """Return the probability of stopping at each state, [T, S, B]."""
        logits = [
            linear_fp32(z_SBC, halt).squeeze(-1) + uniform_offset(step, len(states))
            for step, z_SBC in enumerate(states)
        ]
        if halt_sequence is not None:
            seen = (causal_document_mean(linear_fp32(z_SBC, halt_sequence).squeeze(-1), None) for z_SBC in states)
            logits = [own_SB + all_SB for own_SB, all_SB in zip(logits, seen, strict=True)]
        return exit_log_probs(torch.stack(logits)).exp()

    def _penalty(self, states: list[Tensor], stop_TSB: Tensor | None) -> Tensor:
        """Return the sum of both penalties over the tokens; the loss too is a sum, until Megatron divides gradients."""
        moved = [(after.float() - before.float()).square().mean(-1).sum() for before, after in pairwise(states)]
        penalty = self.stability * torch.stack(moved).sum()
        if stop_TSB is None:
            return penalty
        step_T = torch.arange(1, len(stop_TSB) + 1, dtype=stop_TSB.dtype, device=stop_TSB.device)
        return penalty + self.ponder_cost * torch.einsum("tsb,t->", stop_TSB, step_T)

    def _loss_scale(self, like: Tensor) -> Tensor:
        """Return what Megatron multiplies the loss with before backward."""
        scale, one = self.config.grad_scale_func, torch.ones((), device=like.device)
        return one if scale is None else scale(one)


class _CausalConvolution(nn.Module):
    """A causal convolution over the last ``size`` positions, of each number on its own; 0 when untrained."""

    def __init__(self, width: int, size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size, dtype=config.params_dtype))

    def forward(self, x_SBC: Tensor) -> Tensor:
        """Return the mixed values, [S, B, C]; the last weight is that of a position itself."""
        past_BCS = F.pad(x_SBC.permute(1, 2, 0), (self.weight.size(1) - 1, 0))
        return F.conv1d(past_BCS, self.weight.unsqueeze(1), groups=self.weight.size(0)).permute(2, 0, 1)


def weigh_penalties(model: nn.Module, loss: LossConfig) -> None:
    """Give the units of a model the weights of their penalties."""
    for module in model.modules():
        if isinstance(module, LatentReasoning):
            module.stability, module.ponder_cost = loss.latent_stability, loss.latent_ponder_cost
