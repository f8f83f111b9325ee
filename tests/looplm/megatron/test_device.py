"""The CPU adapter."""

import pytest
import torch

from looplm.megatron import device, patches


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
