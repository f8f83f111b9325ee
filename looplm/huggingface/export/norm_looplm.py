"""The norm of a LoopLM. This file travels inside an export."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoopLMRMSNorm(nn.Module):
    """``x / rms(x) * weight``, with an initial weight of ``start``."""

    def __init__(self, width: int, eps: float, start: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))
        self.eps, self.start = eps, start

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)
