"""The lookup of an embedding against torch's, and where its gradient goes."""

import pytest
import torch
from megatron.core.tensor_parallel import layers
from torch.nn import Parameter

from looplm.megatron import patches
from looplm.megatron.device import HAS_CUDA
from looplm.megatron.lookup import lookup
from tests.support.parity import grad_of

IDS_BS = torch.tensor([[5, 0, 5, 6], [5, 1, 0, 0]])  # rows are read more than once


@pytest.fixture
def weight() -> Parameter:
    torch.manual_seed(1)
    return Parameter(torch.randn(7, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_buffer_the_rows_that_were_read_are_added_to_it(weight: Parameter, dtype: torch.dtype) -> None:
    weight, mix_BSD, before_VD = Parameter(weight.to(dtype)), torch.randn(2, 4, 3, dtype=dtype), torch.randn(7, 3)
    weight.main_grad = before_VD.clone()  # type: ignore[attr-defined]  # as Megatron's wrapper does
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    rows_BSD = lookup(IDS_BS, weight)
    assert torch.equal(rows_BSD, weight[IDS_BS])
    (rows_BSD * mix_BSD).sum().backward()
    assert weight.grad_added_to_main_grad and grad_of(weight).shape == weight.shape  # type: ignore[attr-defined]
    exact = Parameter(weight.detach().float())
    (exact[IDS_BS] * mix_BSD.float()).sum().backward()
    torch.testing.assert_close(weight.main_grad, before_VD + grad_of(exact))  # type: ignore[attr-defined]


def test_without_a_buffer_the_gradient_is_autograds(weight: Parameter) -> None:
    mix_BSD = torch.randn(2, 4, 3)
    (lookup(IDS_BS, weight) * mix_BSD).sum().backward()
    torch.testing.assert_close(grad_of(weight), torch.zeros(7, 3).index_put_((IDS_BS,), mix_BSD, accumulate=True))


@pytest.mark.skipif(HAS_CUDA, reason="the adapter changes nothing on CUDA")
def test_megatrons_embedding_uses_it() -> None:
    patches.install()
    assert layers.F.embedding is lookup
