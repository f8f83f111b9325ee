"""Rows of an embedding on a CPU, whose gradient adds the rows that were read to Megatron's gradient buffer.

Autograd makes a matrix of V rows, all but a few of them 0, which Megatron's hook then adds to the buffer.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup(ids: Tensor, weight: Tensor) -> Tensor:
    """Return ``weight[ids]``.

    If the weight has a buffer, ``main_grad``, its gradient goes there and nowhere else: other gradients of the weight
    must be added to the buffer too.
    """
    if not hasattr(weight, "main_grad"):
        return F.embedding(ids, weight)
    rows: Tensor = _Lookup.apply(ids, weight)  # type: ignore[no-untyped-call]  # torch's
    return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight_VD):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.weight = weight_VD
        return F.embedding(ids, weight_VD)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (ids,), weight_VD = ctx.saved_tensors, ctx.weight
        into_VD = weight_VD.main_grad
        into_VD.index_put_((ids.flatten(),), grad.flatten(0, -2).to(into_VD.dtype), accumulate=True)
        weight_VD.grad_added_to_main_grad = True  # Megatron's hook wants a gradient, and does not read it
        return None, torch.empty_like(weight_VD)
