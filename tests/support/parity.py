"""What the parity tests share: the measure of agreement with the oracle, and gradients by name."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOLERANCE = 1e-5


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|actual - expected| / max|expected|. Where all of `expected` is zero, all but zeros is infinitely wrong."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def assert_close_relative(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """Both sides name the same tensors, and each pair agrees to the tolerance; the message names those that do not."""
    assert set(actual) == set(expected), f"only on one side: {sorted(set(actual) ^ set(expected))}"
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    bad = [f"{name}: {error:.2e}" for name, error in errors.items() if not error < tolerance]  # NaN is bad too
    assert not bad, f"relative error not below {tolerance:g} in {len(bad)} of {len(errors)} tensors:\n" + "\n".join(bad)


def gradients(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradient of each tensor by name; zeros where the loss does not depend on it."""
    loss = loss + 0 * sum(tensor.sum() for tensor in tensors.values())  # a constant loss has gradients too: zeros
    found = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    return dict(zip(tensors, found, strict=True))


def oracle_copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values in double precision, as leaves of their own: the oracle's rounding is then never the question."""
    return {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
