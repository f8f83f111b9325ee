"""Step embedding: a learned vector of each loop, added to the state before the loop (``model.step_embedding``).

The same weights run in every loop; the vector tells them which one it is. The vectors start at zero, so the untrained
model is the one without them. Loops beyond the trained number read the last vector.

Source: Universal Transformer (arXiv 1807.03819), whose vectors are sinusoids added before every step.

Shapes: S sequence, B batch, N lanes, D hidden, R loops.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.megatron.settings import mark_replicated


class StepEmbedding(MegatronModule):
    """One vector per loop.

    Args:
        config: Megatron's.
        num_loops: number of vectors (R).
    """

    def __init__(self, config: TransformerConfig, num_loops: int) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(num_loops, config.hidden_size, dtype=config.params_dtype))
        mark_replicated(self, config)

    def forward(self, h_SBD: Tensor, loop: int) -> Tensor:
        """Return the input of loop ``loop``, 0-based."""
        return h_SBD + self.weight[min(loop, len(self.weight) - 1)]

    def add_to_lanes(self, h_SND: Tensor, loops: Sequence[int]) -> Tensor:
        """Return the inputs of lanes whose tokens are in different loops, 0-based."""
        loop_N = torch.tensor(loops, device=h_SND.device).clamp_(max=len(self.weight) - 1)
        return h_SND + self.weight[loop_N]
