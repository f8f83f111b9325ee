"""Sigmoid gate on attention's output, in front of the output projection (``model.attention_gate``).

::

    x ──▶ attention ──▶ context [S, B, H * V] ──×──▶ output projection
    └──▶ linear_gate ──▶ sigmoid ───────────────┘        one number per head, or per channel of a head

x is the normalized input of the block, so a token can decide to take nothing from a head instead of resting its
attention on the first token. Source: arXiv 2505.06708. Megatron-core has such a gate for MHA alone, from 0.16 on, per
channel, and inside the projection of queries, keys and values. This one is a matrix of its own, the same for MLA.

Shapes: S sequence, B batch, D hidden, H heads of this tensor-parallel rank, V value width, G gates: H or H * V.
"""

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn


def gated(context: Tensor, logit: Tensor) -> Tensor:
    """Return contexts [..., H * V] times the sigmoids of logits [..., G]."""
    gate = torch.sigmoid(logit)
    if gate.size(-1) == context.size(-1):
        return context * gate
    by_head: Tensor = context.unflatten(-1, (gate.size(-1), -1))
    return (by_head * gate.unsqueeze(-1)).flatten(-2)


class OutputGate:
    """Mixin in front of one of Megatron's attention classes, which computes all else.

    Args:
        gate_linear: class of the gate's linear layer, split over tensor-parallel ranks by output; None for no gate.
        gate_width: its outputs (G), of all ranks.
    """

    config: Any
    pg_collection: Any
    linear_proj: nn.Module

    def __init__(self, *args: Any, gate_linear: Any, gate_width: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._logit: Tensor | None = None  # of the call in progress
        if gate_linear is None:
            return
        self.linear_gate = gate_linear(
            self.config.hidden_size,
            gate_width,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )
        self.linear_proj.register_forward_pre_hook(self._multiply)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Attend as Megatron's class does; the output projection reads the gated contexts."""
        if hasattr(self, "linear_gate"):
            self._logit, _ = self.linear_gate(hidden_states)
        try:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]  # of Megatron's class
        finally:
            self._logit = None

    def _multiply(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert self._logit is not None
        return gated(inputs[0], self._logit), *inputs[1:]


class HeadAttention(OutputGate, SelfAttention):
    """Megatron's multi-head attention, with a gate on its output if there is one."""
