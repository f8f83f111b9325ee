"""RMSNorm against its definition in double precision, and what it keeps for backward."""

import pytest
import torch
from torch import Tensor

from looplm.config import ModelConfig
from looplm.megatron.settings import transformer_config
from looplm.megatron.swiglu import swiglu
from looplm.model.norms import RMSNorm
from tests.support.parity import assert_close_relative, gradients
from tests.support.tiny import MODEL

EPS = 1e-2  # large enough to show


def norm(dtype: torch.dtype, model: ModelConfig = MODEL) -> RMSNorm:
    module = RMSNorm(transformer_config(model, dtype), 12, EPS)
    with torch.no_grad():
        module.weight.normal_()
    return module


def definition(x: Tensor, weight_D: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight_D


@pytest.mark.parametrize("sizes", [(12,), (5, 12), (5, 2, 3, 12)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_value_and_gradients_equal_the_definition(
    sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float, single_process: object
) -> None:
    torch.manual_seed(2)
    module, weight = norm(dtype), torch.randn(sizes).to(dtype)
    x = (torch.randn(sizes) * 3).to(dtype).requires_grad_()
    inputs = {"x": x, "weight": module.weight}
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    ours, theirs = module(x), definition(exact["x"], exact["weight"])
    assert ours.dtype == dtype
    assert_close_relative({"value": ours}, {"value": theirs}, tolerance)
    found = gradients((ours * weight).sum(), inputs)
    assert_close_relative(found, gradients((theirs * weight.double()).sum(), exact), tolerance)


def test_a_view_of_a_wider_tensor_is_normalized(single_process: object) -> None:
    """MLA's latents and heads are parts of one product."""
    torch.manual_seed(3)
    module, wide = norm(torch.float32), torch.randn(4, 2, 20, requires_grad=True)
    grad = gradients(module(wide[..., :12]).square().sum(), {"wide": wide})
    exact = wide.detach().double().requires_grad_()
    theirs = definition(exact[..., :12], module.weight.double()).square().sum()
    assert_close_relative(grad, gradients(theirs, {"wide": exact}), 1e-5)


def test_rows_of_zeros_have_finite_gradients(single_process: object) -> None:
    module, x = norm(torch.float32), torch.zeros(3, 12, requires_grad=True)
    found = gradients(module(x).sum(), {"x": x})
    assert found["x"].isfinite().all() and found["x"].any()


def test_fused_functions_run_in_inference_mode_even_if_autograd_is_on_again() -> None:
    """Megatron enables autograd around residual adds, and inference mode's tensors cannot be saved for backward."""
    module, x = norm(torch.float32), torch.randn(3, 12)
    with torch.inference_mode(), torch.enable_grad():
        found = module(x.clone()), swiglu(x.clone())
    assert torch.equal(found[0], module(x)) and torch.equal(found[1], swiglu(x))
