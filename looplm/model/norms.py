"""RMSNorm, and the sandwich norms where Megatron adds a sublayer's output to the residual stream.

Shapes: S sequence, B batch, D hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm.config import ModelConfig
from looplm.megatron.settings import mark_replicated


class RMSNorm(MegatronModule):
    """``x / rms(x) * weight`` (Zhang & Sennrich 2019). Megatron's torch norm refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark_replicated(self, config)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if torch.is_inference_mode_enabled():  # its tensors cannot be saved, even if Megatron re-enables autograd
            return _normed(x, self.weight, self.eps)[0]
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]  # torch's
        return out


class ReadoutNorm(RMSNorm):
    """The norm at the end of a loop where only the read-out is normalized (``model.loop_norm: readout``).

    The stack passes it without a change; :meth:`read` normalizes.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def read(self, h_SBD: Tensor) -> Tensor:
        """Return the normalized hidden state."""
        return super().forward(h_SBD)


def _normed(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm in x's dtype, and 1 / rms(x) in fp32."""
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
    return (wide * scale).mul_(weight_D.float()).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    """The norm on a CPU, where torch composes it, forward and backward, of twice as many passes over memory.

    All of it is computed in fp32, and only ``x`` is kept. With s = 1 / rms(x), the gradients are
    ``s (g w) - x s^3 (g w . x) / D`` and, summed over the rows, ``g x s``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out, scale = _normed(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        grad, wide, wide_D = grad.float(), x.float(), weight_D.float()
        product_ND = (grad * wide).view(-1, x.size(-1))
        grad_D = product_ND.t().mv(scale.flatten())
        along = product_ND.mv(wide_D).view(scale.shape).mul_(scale.pow(3)).div_(x.size(-1))
        grad = (grad * wide_D).mul_(scale).addcmul_(wide, along, value=-1)
        return grad.to(x.dtype), grad_D.to(weight_D.dtype), None


class SandwichNormAdd(MegatronModule):
    """Module for Megatron's bias-dropout-add slot that normalizes the sublayer's output before adding it (norms b, d).

    The norm cancels the usual small initial weights of residual outputs, so its gain starts small instead. At a gain of
    1 the 2 L R sublayers that a token passes would dominate the embedding, and deeper loops would start out worse.

    Args:
        config: Megatron's.
        gain: initial gain (``model.residual_gain``).
    """

    def __init__(self, config: TransformerConfig, gain: float) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        nn.init.constant_(self.norm.weight, gain)

    def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """Return the function that Megatron calls with (output, bias), residual and dropout."""
        return self._add

    def _add(self, output_with_bias: tuple[Tensor, None], residual_SBD: Tensor, dropout: float) -> Tensor:
        return residual_SBD + self.norm(output_with_bias[0])


def residual_add(model: ModelConfig, config: TransformerConfig) -> ModuleSpec | Callable[..., Any]:
    """Return the module for Megatron's bias-dropout-add slot: a plain residual add, or one that normalizes first."""
    if not model.sandwich_norm:
        return get_bias_dropout_add
    return ModuleSpec(module=SandwichNormAdd, params={"config": config, "gain": model.initial_gain})
