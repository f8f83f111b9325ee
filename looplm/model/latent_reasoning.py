"""Latent reasoning: a GRU refines MLA's latent of keys and values before they are projected from it.

It is the other way to iterate: a loop runs whole layers again, this unit runs a small cell inside each layer's
attention, on the compressed latent alone (``model.latent_iterations``, T). With c the latent after its norm::

    z_0 = c        z_t = GRUCell(c, z_{t-1}),  t = 1..T        keys and values grow from z_T

With ``model.latent_halting`` they grow from a mean of the states instead, weighed by the probability of stopping at
each, as the exit gate's distribution is (:mod:`looplm.model.exit_gate`)::

    lambda_t = sigmoid(w . z_t + b + logit(1 / (T - t + 1)))        p_t = lambda_t prod_{s<t} (1 - lambda_s)
    keys and values grow from sum_t p_t z_t

The unit sees one position at a time; attention and the loops mix positions. So a cache holds its result, and decoding
needs no other state. The rotary key is projected from the hidden state and passes it by, as it passes the latent by,
unless ``model.latent_rotary_key`` projects it from what the unit returns.
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
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.config import LossConfig
from looplm.megatron.settings import mark_replicated
from looplm.model.exit_gate import (
    causal_document_mean,
    exit_log_probs,
    linear_fp32,
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
        latent_SBC = self._normalized(latent_SBC)
        states = self._states(latent_SBC)
        penalized = self.training and (self.stability or self.ponder_cost)
        if self.halt is None and not penalized:
            return states[-1]
        refined_SBC, state_TSBC, stop_TSB = states[-1], torch.stack(states), None
        if self.halt is not None:
            stop_TSB = self._stop_probabilities(self.halt, state_TSBC)
            refined_SBC = (stop_TSB.to(state_TSBC.dtype).unsqueeze(-1) * state_TSBC).sum(0)
        if penalized:
            penalty = self._penalty(latent_SBC, state_TSBC, stop_TSB) * self._loss_scale(refined_SBC)
            refined_SBC = MoEAuxLossAutoScaler.apply(refined_SBC, penalty)
        return refined_SBC

    def expected_steps(self, latent_SBC: Tensor) -> Tensor:
        """Return after how many steps each position stops on average, 1 to T, [S, B]; of a unit that halts."""
        assert self.halt is not None
        stop_TSB = self._stop_probabilities(self.halt, torch.stack(self._states(self._normalized(latent_SBC))))
        return _mean_step(stop_TSB)

    def _normalized(self, latent_SBC: Tensor) -> Tensor:
        return latent_SBC if self.norm is None else self.norm(latent_SBC)

    def _states(self, latent_SBC: Tensor) -> list[Tensor]:
        """Return the state after each step, [S, B, C]."""
        cell, state_SBC, states = self.cell, latent_SBC, list[Tensor]()
        input_reset, input_update, input_new = F.linear(latent_SBC, cell.weight_ih, cell.bias_ih).chunk(3, dim=-1)
        for _ in range(self.iterations):
            before = state_SBC if self.mix is None else state_SBC + self.mix(state_SBC)
            reset, update, new = F.linear(before, cell.weight_hh, cell.bias_hh).chunk(3, dim=-1)
            new = torch.tanh(torch.addcmul(input_new, torch.sigmoid(input_reset + reset), new))
            state_SBC = torch.lerp(new, before, torch.sigmoid(input_update + update))
            states.append(state_SBC)
        return states

    def _stop_probabilities(self, halt: nn.Linear, state_TSBC: Tensor) -> Tensor:
        """Return the probability of stopping at each state, [T, S, B]."""
        steps = len(state_TSBC)
        step_T11 = torch.arange(steps, device=state_TSBC.device).view(-1, 1, 1)
        logit_TSB = linear_fp32(state_TSBC, halt).squeeze(-1) + uniform_offset(step_T11, steps)
        if self.halt_sequence is not None:
            heard_TSB = linear_fp32(state_TSBC, self.halt_sequence).squeeze(-1)
            mean_STB = causal_document_mean(heard_TSB.transpose(0, 1).flatten(1), None).view(-1, *heard_TSB[:, 0].shape)
            logit_TSB = logit_TSB + mean_STB.transpose(0, 1)
        return exit_log_probs(logit_TSB).exp()

    def _penalty(self, latent_SBC: Tensor, state_TSBC: Tensor, stop_TSB: Tensor | None) -> Tensor:
        """Return the sum of both penalties over the tokens; the loss too is a sum, until Megatron divides gradients."""
        state_TSBC = state_TSBC.float()
        moved_TSBC = state_TSBC - torch.cat((latent_SBC.float().unsqueeze(0), state_TSBC[:-1]))
        penalty = self.stability * moved_TSBC.square().mean(-1).sum()
        if stop_TSB is None:
            return penalty
        return penalty + self.ponder_cost * _mean_step(stop_TSB).sum()

    def _loss_scale(self, like: Tensor) -> Tensor:
        """Return what Megatron multiplies the loss with before backward."""
        scale, one = self.config.grad_scale_func, torch.ones((), device=like.device)
        return one if scale is None else scale(one)


def _mean_step(stop_TSB: Tensor) -> Tensor:
    """Return the mean number of steps of each position, [S, B]."""
    step_T = torch.arange(1, len(stop_TSB) + 1, dtype=stop_TSB.dtype, device=stop_TSB.device)
    return torch.einsum("tsb,t->sb", stop_TSB, step_T)


class _CausalConvolution(nn.Module):
    """A causal convolution over the last ``size`` positions, of each number on its own; 0 when untrained."""

    def __init__(self, width: int, size: int, config: TransformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, size, dtype=config.params_dtype))

    def forward(self, x_SBC: Tensor) -> Tensor:
        """Return the mixed values, [S, B, C]; the last weight is that of a position itself.

        A convolution of torch's would want the positions last: this is twice as fast on a CPU.
        """
        length, size = len(x_SBC), self.weight.size(1)
        past_SBC = F.pad(x_SBC, (0, 0, 0, 0, size - 1, 0))
        mixed_SBC = past_SBC[:length] * self.weight[:, 0]
        for tap in range(1, size):
            mixed_SBC = torch.addcmul(mixed_SBC, past_SBC[tap : tap + length], self.weight[:, tap])
        return mixed_SBC


class RefinedDownProjection(MegatronModule):
    """MLA's down projection with the unit inside, so that the rotary key can be projected from the refined latent.

    Args:
        config: Megatron's, of MLA; every tensor-parallel rank holds the weights whole.
        unit: refines the latent.
    """

    def __init__(self, config: TransformerConfig, unit: LatentReasoning) -> None:
        super().__init__(config)
        latent, key = config.kv_lora_rank, config.qk_pos_emb_head_dim
        self.weight = nn.Parameter(torch.empty(latent, config.hidden_size, dtype=config.params_dtype))
        self.rotary_key = nn.Linear(latent, key, bias=False, dtype=config.params_dtype)
        for weight in (self.weight, self.rotary_key.weight):
            config.init_method(weight)
        self.unit = unit
        mark_replicated(self, config)

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, None]:
        """Return refined latent and rotary key side by side, [S, B, C + K], as Megatron expects of the projection."""
        refined_SBC = self.unit(F.linear(x_SBD, self.weight))
        return torch.cat((refined_SBC, self.rotary_key(refined_SBC)), dim=-1), None


def weigh_penalties(model: nn.Module, loss: LossConfig) -> None:
    """Give the units of a model the weights of their penalties."""
    for module in model.modules():
        if isinstance(module, LatentReasoning):
            module.stability, module.ponder_cost = loss.latent_stability, loss.latent_ponder_cost
