"""The CPU adapter, and switching it off."""

import pytest
import torch

from looplm.megatron import device, patches

on_cpu = pytest.mark.skipif(device.HAS_CUDA, reason="the adapter changes nothing on CUDA")


@on_cpu
def test_the_adapter_can_be_switched_off_for_a_while() -> None:
    patches.install()
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    with device.adapter_off():
        with device.adapter_off(), pytest.raises((RuntimeError, AssertionError)):
            torch.zeros(1, device="cuda")
        assert torch.ones(2).sum() == 2
    assert torch.zeros(1, device="cuda").device.type == "cpu"
    with pytest.raises(ZeroDivisionError), device.adapter_off():
        raise ZeroDivisionError
    assert torch.zeros(1, device="cuda").device.type == "cpu"
