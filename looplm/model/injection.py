"""Injection of the loops' first input into each later loop, besides the state (``model.injection``).

    additive   h + e
    diagonal   a h + b e      vectors a, b
    linear     W [h; e]       matrix W [D, 2 D]

e is the embedding, or the prelude's output. ``diagonal`` and ``linear`` start as the identity on h (a = 1, b = 0,
W = [I, 0]): the untrained model is the one without injection, and training decides how much of e returns.

Sources: additive: deep equilibrium models (arXiv 1909.01377); diagonal: Parcae (2604.12946), here without its
discretization; linear: the adapter of Huginn (2502.05171), which starts from random weights.

Shapes: S sequence, B batch, D hidden.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.megatron.settings import mark_replicated


class AdditiveInjection(MegatronModule):
    """``h + e``."""

    def forward(self, h_SBD: Tensor, entered_SBD: Tensor) -> Tensor:
        """Return the input of a loop, from the state and what entered the first loop."""
        return h_SBD + entered_SBD


class DiagonalInjection(MegatronModule):
    """``a h + b e``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width, dtype = config.hidden_size, config.params_dtype
        self.state_gain = nn.Parameter(torch.ones(width, dtype=dtype))
        self.input_gain = nn.Parameter(torch.zeros(width, dtype=dtype))
        mark_replicated(self, config)

    def forward(self, h_SBD: Tensor, entered_SBD: Tensor) -> Tensor:
        """Return the input of a loop, from the state and what entered the first loop."""
        return torch.addcmul(self.state_gain * h_SBD, self.input_gain, entered_SBD)


class LinearInjection(MegatronModule):
    """``W [h; e]``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.weight = nn.Parameter(torch.eye(width, 2 * width, dtype=config.params_dtype))
        mark_replicated(self, config)

    def forward(self, h_SBD: Tensor, entered_SBD: Tensor) -> Tensor:
        """Return the input of a loop, from the state and what entered the first loop."""
        return F.linear(torch.cat((h_SBD, entered_SBD), -1), self.weight)


INJECTIONS: dict[str, type[MegatronModule]] = {
    "additive": AdditiveInjection,
    "diagonal": DiagonalInjection,
    "linear": LinearInjection,
}
