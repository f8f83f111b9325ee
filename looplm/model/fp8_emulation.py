"""FP8 linear layers on a machine without FP8: operands are rounded, products are computed in fp32.

A linear layer is three products: ``y = x W^T``, and in backward ``dx = g W`` and ``dW = g^T x``. A tensor core reads
both operands of each in FP8 and accumulates in fp32. Here x, W and g are rounded to FP8 values and multiplied in fp32,
so that the loss of a looped model under FP8 can be studied on a CPU. Results keep the model's dtype; on a GPU they
would be bf16.

::

    x ──round──┐                      W ──round──┐
               ├── x W^T ──▶ y                   ├── g W ──▶ dx          g ──round──┐
    W ──round──┘                      g ──round──┘                                  ├── g^T x ──▶ dW
                                                                          x ──round──┘

Formats: e4m3 (4 exponent bits, largest value 448) for x and W; e4m3 or, under ``hybrid``, e5m2 (largest value 57,344)
for g; or unscaled bf16 for all, as the baseline. Scaling, as in Transformer Engine 2:

- ``tensorwise``: a tensor is scaled so that its largest value becomes the format's largest.
- ``delayed``: the scale comes from the largest value of the last ``amax_history`` calls; values beyond the range are
  clipped. There is one history per linear layer and operand, so loops share it (:mod:`looplm.config.engine`). The first
  call is unscaled. The maximum is taken over all ranks, as over Transformer Engine's tensor, context and data ranks.
- ``blockwise``: each 1 x 128 block of x and g along the product's sum, and each 128 x 128 block of W, is scaled by a
  power of two.
- ``mxfp8``: each 32 values along the sum are scaled by a power of two.

Under tensor parallelism a rank rounds what it multiplies: its own part of W by that part's largest value, and the
tensor that sequence parallelism has gathered by the largest value of all ranks, as Transformer Engine does. Unlike
there, W is rounded again in each loop. This makes a difference under ``delayed`` only, whose first loop lags behind the
optimizer's step.

Shapes: N tokens, K inputs, M outputs.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from looplm.config import EngineConfig, Recipe
from looplm.model.local_layers import ReplicatedLinear

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
FORMATS = {"emulate-bf16": (BF16, BF16), "emulate-e4m3": (E4M3, E4M3), "emulate-hybrid": (E4M3, E5M2)}  # of x, W; of g
TILES = {"blockwise": 128, "mxfp8": 32}


def emulate(layer: nn.Module, engine: EngineConfig, in_bf16: bool) -> None:
    """Make every linear layer in ``layer`` round as ``engine`` says, or to bf16 (``engine.first_layers_bf16``)."""
    formats = FORMATS["emulate-bf16"] if in_bf16 else FORMATS[engine.fp8 or ""]
    for linear in list(layer.modules()):
        if isinstance(linear, ReplicatedLinear):
            linear.product = Emulation(formats, engine.fp8_recipe, engine.amax_history)
        elif isinstance(linear, (ColumnParallelLinear, RowParallelLinear)):
            linear.emulation = Emulation(formats, engine.fp8_recipe, engine.amax_history)
            linear._forward_impl = linear.emulation.between_ranks


class Emulation(nn.Module):
    """The three products of one linear layer, with rounded operands."""

    def __init__(self, formats: tuple[torch.dtype, torch.dtype], recipe: Recipe, history: int) -> None:
        super().__init__()
        forward, backward = formats
        self.x = Rounding(forward, recipe, history)
        self.weight = Rounding(forward, recipe, history, weight=True)
        self.gradient = Rounding(backward, recipe, history)

    def forward(self, x: Tensor, weight_MK: Tensor) -> Tensor:
        """Return ``x W^T``: [..., K] to [..., M]."""
        return _Products.apply(x, weight_MK, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]  # torch's

    def between_ranks(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        tp_group: dist.ProcessGroup | None,
        **_: Any,
    ) -> Tensor:
        """Replace the product inside Megatron's parallel linear layers, with the messages between ranks around it."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        product = self(input, weight)
        return product if bias is None else product + bias


class Rounded(NamedTuple):
    """A rounded matrix ``values * factor``; a factor common to all values is applied after the product."""

    values: Tensor
    factor: Tensor | float = 1.0


class Rounding(nn.Module):
    """Rounding of one operand, for the product that sums over its columns and for the one that sums over its rows.

    Args:
        dtype: format to round to.
        recipe: scaling recipe.
        history: number of calls that ``delayed`` remembers.
        weight: True for W, which ``blockwise`` scales in squares.
    """

    amax_history: Tensor
    scale: Tensor

    def __init__(self, dtype: torch.dtype, recipe: Recipe, history: int, weight: bool = False) -> None:
        super().__init__()
        self.dtype, self.recipe, self.calls = dtype, recipe, 0
        self.squares = weight and recipe == "blockwise"
        self.register_buffer("amax_history", torch.zeros(history), persistent=False)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def forward(self, x: Tensor, learns: bool) -> tuple[Rounded, Rounded]:
        """Return the operand rounded for both products; the second is valid only if backward follows (``learns``)."""
        x = x.float()
        if self.dtype is BF16:
            rounded = Rounded(x.to(BF16).float())
        elif self.recipe == "tensorwise":
            rounded = by_scale(x, self.dtype, scale_of(largest(x), self.dtype))
        elif self.recipe == "delayed":
            rounded = by_scale(x, self.dtype, self._delayed_scale(x, learns))
        else:
            tile = TILES[self.recipe]
            rounded = by_tiles(x, self.dtype, (tile if self.squares else 1, tile))
            if learns and not self.squares:
                return rounded, by_tiles(x, self.dtype, (tile, 1))
        return rounded, rounded

    def _delayed_scale(self, x: Tensor, learns: bool) -> Tensor:
        """Return the current scale, and record this call's largest value for later calls, in training alone."""
        scale = self.scale
        if learns and self.training:
            amax = largest(x)
            if dist.get_world_size() > 1:
                dist.all_reduce(amax, dist.ReduceOp.MAX)
            # A step that is not finite is skipped; it must not spoil the scales of later ones.
            self.amax_history[self.calls % len(self.amax_history)] = torch.where(amax.isfinite(), amax, 0.0)
            self.calls += 1
            self.scale = scale_of(self.amax_history.max(), self.dtype, otherwise=scale)
        return scale


class _Products(torch.autograd.Function):
    """The products ``x W^T``, ``g W`` and ``g^T x`` of the rounded matrices."""

    @staticmethod
    def forward(ctx, x, weight_MK, emulation, learns):  # type: ignore[no-untyped-def]
        x_over_K, x_over_N = emulation.x(x.flatten(0, -2), learns)
        weight_over_K, weight_over_M = emulation.weight(weight_MK, learns)
        ctx.save_for_backward(x_over_N.values, weight_over_M.values)
        ctx.factors, ctx.rounding = (x_over_N.factor, weight_over_M.factor), emulation.gradient
        ctx.x_shape, ctx.x_dtype, ctx.weight_dtype = x.shape, x.dtype, weight_MK.dtype
        y_NM = x_over_K.values @ weight_over_K.values.t()
        return _scaled(y_NM, x_over_K, weight_over_K).to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = map(Rounded, ctx.saved_tensors, ctx.factors)
        gradient_over_M, gradient_over_N = ctx.rounding(gradient.flatten(0, -2), True)
        dx_NK = _scaled(gradient_over_M.values @ weight.values, gradient_over_M, weight)
        dweight_MK = _scaled(gradient_over_N.values.t() @ x.values, gradient_over_N, x)
        return dx_NK.to(ctx.x_dtype).view(ctx.x_shape), dweight_MK.to(ctx.weight_dtype), None, None


def _scaled(product: Tensor, left: Rounded, right: Rounded) -> Tensor:
    factor = left.factor * right.factor
    return product if isinstance(factor, float) else product.mul_(factor)


def largest(x: Tensor) -> Tensor:
    """Return max |x|, computed in one pass."""
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high)


def scale_of(amax: Tensor, dtype: torch.dtype, otherwise: Tensor | float = 1.0) -> Tensor:
    """Return the scale that maps ``amax`` to the format's largest value, or ``otherwise`` where ``amax`` is 0."""
    return torch.where(amax > 0, torch.finfo(dtype).max / amax, otherwise)


def by_scale(x: Tensor, dtype: torch.dtype, scale: Tensor) -> Rounded:
    """Round with one scale; values beyond the format's range are clipped."""
    limit = torch.finfo(dtype).max
    return Rounded(_to_format((x * scale).clamp_(-limit, limit), dtype), 1 / scale)


def by_tiles(x: Tensor, dtype: torch.dtype, tile: tuple[int, int]) -> Rounded:
    """Round each tile with the largest power of two that keeps it in range; tiles at the far edges may be smaller."""
    (rows, columns), (height, width) = x.shape, tile
    whole = F.pad(x, (0, -columns % width, 0, -rows % height))
    tiles = whole.view(-1, height, whole.size(1) // width, width)
    scale = scale_of(tiles.abs().amax((1, 3), keepdim=True), dtype)
    power = scale.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)  # the exponent's bits alone
    limit = torch.finfo(dtype).max
    values = _to_format((tiles * power).clamp_(-limit, limit), dtype).div_(power)
    return Rounded(values.view(whole.shape)[:rows, :columns])


def _to_format(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x.to(dtype).float()``, computed in place.

    Torch widens e4m3 one value at a time. Its bits are also those of a half-precision number that is 2^8 too small,
    which processors widen in vectors.
    """
    low = x.to(dtype)
    if dtype is not E4M3:
        return x.copy_(low)
    half = low.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return x.copy_(half).mul_(256)
