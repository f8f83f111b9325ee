"""The CPU adapter."""

import pytest
import torch
from megatron.core.tensor_parallel import layers

from looplm.megatron import device, patches
from tests.support.parity import grad_of


@pytest.mark.skipif(device.HAS_CUDA, reason="the adapter changes nothing on CUDA")
def test_calls_for_cuda_mean_the_cpu() -> None:
    patches.install()
    patches.install()
    for made in (
        torch.zeros(1, device="cuda"),
        torch.tensor([0.0], device="cuda:0", pin_memory=True),
        torch.zeros_like(torch.ones(1), device=torch.device("cuda")),
        torch.empty(1, device=torch.cuda.current_device()).zero_(),
        torch.zeros(1).cuda(),
        torch.nn.Linear(1, 1).cuda().weight.detach() * 0,
    ):
        assert made.device.type == "cpu" and not made.is_pinned() and made.sum() == 0
    with torch.device("meta"):
        assert torch.zeros(1).is_meta and torch.empty(1, device="cpu").device.type == "cpu"
    assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
    assert torch.zeros(1).type(torch.int64).dtype == torch.int64
    assert torch.zeros.__name__ == "zeros" and torch.ones(2, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.skipif(device.HAS_CUDA, reason="the adapter changes nothing on CUDA")
@pytest.mark.parametrize("in_buffer", [True, False])
def test_an_embeddings_gradient_for_megatrons_buffer_holds_the_rows_that_were_read(in_buffer: bool) -> None:
    torch.manual_seed(1)
    weight, mix_BSD = torch.nn.Parameter(torch.randn(7, 3)), torch.randn(2, 4, 3)
    ids_BS = torch.tensor([[5, 0, 5, 6], [5, 1, 0, 0]])  # rows are read more than once
    if in_buffer:
        weight.main_grad = torch.ones(7, 3)  # type: ignore[attr-defined]  # as Megatron's wrapper does
    (layers.F.embedding(ids_BS, weight) * mix_BSD).sum().backward()
    grad = grad_of(weight)
    assert grad.is_sparse is in_buffer
    exact_VD = torch.ones(7, 3).index_put_((ids_BS,), mix_BSD, accumulate=True)
    torch.testing.assert_close(torch.ones(7, 3).add_(grad), exact_VD)
