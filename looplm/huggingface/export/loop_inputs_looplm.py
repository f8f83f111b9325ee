"""Inputs of a loop besides the state: injections, and the step embedding. This file travels inside an export.

Shapes: B batch, S tokens of this call, D hidden, R loops. Loops count from 0.

Sources: injections: additive: deep equilibrium models (1909.01377), diagonal: Parcae (2604.12946), linear: Huginn
(2502.05171). Step embedding: Universal Transformer (1807.03819).
"""

import torch
from torch import Tensor, nn

from .configuration_looplm import LoopLMConfig


class LoopLMAdditiveInjection(nn.Module):
    """``h + e``: what a later loop reads, from the state and what entered the first loop."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()

    def forward(self, h_BSD: Tensor, entered_BSD: Tensor) -> Tensor:
        return h_BSD + entered_BSD


class LoopLMDiagonalInjection(nn.Module):
    """``a h + b e``; it starts as h."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__()
        self.state_gain = nn.Parameter(torch.ones(config.hidden_size))
        self.input_gain = nn.Parameter(torch.zeros(config.hidden_size))

    def start(self) -> None:
        nn.init.ones_(self.state_gain)
        nn.init.zeros_(self.input_gain)

    def forward(self, h_BSD: Tensor, entered_BSD: Tensor) -> Tensor:
        return torch.addcmul(self.state_gain * h_BSD, self.input_gain, entered_BSD)


class LoopLMLinearInjection(nn.Linear):
    """``W [h; e]``; it starts as h."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__(2 * config.hidden_size, config.hidden_size, bias=False)

    def start(self) -> None:
        nn.init.eye_(self.weight)

    def forward(self, h_BSD: Tensor, entered_BSD: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat((h_BSD, entered_BSD), -1))


INJECTIONS: dict[str, type[nn.Module]] = {
    "additive": LoopLMAdditiveInjection,
    "diagonal": LoopLMDiagonalInjection,
    "linear": LoopLMLinearInjection,
}


class LoopLMStepEmbedding(nn.Embedding):
    """A vector of each loop that is added to the state before it, zero at first; later loops read the last one."""

    def __init__(self, config: LoopLMConfig) -> None:
        super().__init__(config.total_ut_steps, config.hidden_size)

    def start(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, h_BSD: Tensor, loop: int) -> Tensor:  # type: ignore[override]
        return h_BSD + self.weight[min(loop, self.num_embeddings - 1)]
