"""SwiGLU on a CPU against its definition in double precision, and what it keeps for backward."""

import pytest
import torch
from torch import Tensor

from looplm.megatron.swiglu import swiglu
from tests.support.parity import assert_close_relative, gradients


def definition(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_value_and_gradient_equal_the_definition(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(1)
    x, weight = (3 * torch.randn(5, 2, 22)).to(dtype).requires_grad_(), torch.randn(5, 2, 11).to(dtype)
    exact = x.detach().double().requires_grad_()
    ours, theirs = swiglu(x), definition(exact)
    assert ours.dtype == dtype
    assert_close_relative({"value": ours}, {"value": theirs}, tolerance)
    found = gradients((ours * weight).sum(), {"x": x})
    assert_close_relative(found, gradients((theirs * weight.double()).sum(), {"x": exact}), tolerance)


def test_backward_keeps_the_input_alone() -> None:
    kept = list[Tensor]()
    x = torch.randn(3, 8, requires_grad=True)

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        swiglu(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]
