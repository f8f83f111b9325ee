"""SwiGLU on a CPU in few passes over memory, in the place of Megatron's function, which needs a compiler.

Shapes: F feed-forward width (of this tensor-parallel rank).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, bias: None = None, *_: Any) -> Tensor:
    """Return ``silu(gate) * up`` of ``x`` = [gate, up] (Shazeer 2020, arXiv 2002.05202): [..., 2 F] to [..., F].

    It has the arguments of Megatron's ``bias_swiglu_impl``; the others are for FP8 and offloading.
    """
    assert bias is None, "the feed-forward layers have no bias"
    if torch.is_inference_mode_enabled():  # its tensors cannot be saved, even if Megatron re-enables autograd
        return _gated(x)
    out: Tensor = _SwiGLU.apply(x)  # type: ignore[no-untyped-call]  # torch's
    return out


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps the input alone, and writes both halves of its gradient in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gated(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        grad_x = torch.empty_like(x)
        grad_gate, grad_up = grad_x.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_x
