"""Helpers of the parity tests: the error relative to the oracle, and gradients by name."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max|actual - expected| / max|expected|. If `expected` is all zeros, any other value gives infinity."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def assert_close_relative(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Raise unless both sides have the same names and each pair of tensors agrees; the message lists the others."""
    assert set(actual) == set(expected), f"only on one side: {sorted(set(actual) ^ set(expected))}"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    bad = [f"{name}: {error:.2e}" for name, error in errors.items() if not error < tolerance]  # NaN is bad too
    assert not bad, f"relative error not below {tolerance:g} in {len(bad)} of {len(errors)} tensors:\n" + "\n".join(bad)


def gradients(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each tensor by name: zeros if the loss does not depend on it."""
    loss = loss + 0 * sum(tensor.sum() for tensor in tensors.values())  # so that a constant loss has gradients too
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    return dict(zip(tensors, found, strict=True))


def grad_of(tensor: Tensor) -> Tensor:
    """Return the gradient that a backward pass has left in a leaf."""
    assert tensor.grad is not None
    return tensor.grad


def oracle_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in double precision that require gradients, so that the oracle's rounding does not matter."""
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
