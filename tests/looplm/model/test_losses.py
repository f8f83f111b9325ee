"""Both objectives compared with the reference, values and every gradient."""

import math
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from looplm import reference
from looplm.model.exit_gate import exit_log_prob
from looplm.model.losses import (
    adaptive_gate_loss,
    exit_regularizer,
    geometric_prior,
    masked_mean,
    mean_depth,
    mean_exit_distribution,
)
from tests.support.parity import assert_close_relative, gradients, oracle_copy

S, B = 13, 3

MASKS = ["none", "float", "bool"]
BETA = 0.3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


def mask_of(kind: str) -> Tensor | None:
    mask_SB = torch.rand(S, B) < 0.6
    return {"none": None, "float": mask_SB.float(), "bool": mask_SB}[kind]


def loop_inputs(loops: int) -> dict[str, Tensor]:
    """Return losses that change by hundredths of a nat from loop to loop, so that stage 2's targets cover (0, 1)."""
    token_loss = 3 + torch.randn(S, B) + 0.03 * torch.randn(loops, S, B)
    return {"token_loss": token_loss.requires_grad_(), "gate_logit": (2 * torch.randn(loops, S, B)).requires_grad_()}


# ------------------------------------------------------------------------------------------------------------- stage 1


def stage_1_loss(
    token_loss_RSB: Tensor,
    gate_logit_RSB: Tensor,
    beta: float,
    mask_SB: Tensor | None = None,
    prior_R: Tensor | None = None,
    of_batch: bool = False,
    ponder_cost: float = 0.0,
) -> Tensor:
    """Return stage 1's loss from its parts, each loop's exit probability computed when that loop ends."""
    loops, logits = len(gate_logit_RSB), gate_logit_RSB.unbind()
    shares = [exit_log_prob(logits[: loop + 1], last=loop == loops - 1).exp() for loop in range(loops)]
    expected_SB = (torch.stack(shares) * token_loss_RSB).sum(0)
    counted_SB = torch.ones(S, B) if mask_SB is None else mask_SB
    mean_p_R = mean_exit_distribution(gate_logit_RSB, counted_SB) if of_batch else None
    expected_SB = expected_SB + ponder_cost * mean_depth(gate_logit_RSB)
    return masked_mean(expected_SB + beta * exit_regularizer(gate_logit_RSB, prior_R, mean_p_R), mask_SB)


@pytest.mark.parametrize(("of_batch", "ponder_cost"), [(False, 0.0), (True, 0.0), (False, 0.2), (True, 0.2)])
@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("prior", ["entropy", "uniform", "geometric"])
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_stage_1_equals_the_oracle(loops: int, prior: str, mask_kind: str, of_batch: bool, ponder_cost: float):
    ours, mask_SB = loop_inputs(loops), mask_of(mask_kind)
    theirs = oracle_copy(ours)
    priors = {"entropy": None, "uniform": torch.full((loops,), 1 / loops), "geometric": geometric_prior(loops, 0.4)}
    prior_R = priors[prior]
    settings: dict[str, Any] = {"beta": BETA, "mask_SB": mask_SB, "prior_R": prior_R}
    settings |= {"of_batch": of_batch, "ponder_cost": ponder_cost}
    loss = stage_1_loss(**rsb(ours), **settings)
    their_loss = reference.entropy_regularised_loss(**rsb(theirs), **settings)
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    assert_close_relative(gradients(loss, ours), gradients(their_loss, theirs))


def test_a_uniform_prior_differs_from_the_entropy_by_a_constant():
    inputs = rsb(loop_inputs(4))
    entropy = stage_1_loss(**inputs, beta=BETA)
    uniform = stage_1_loss(**inputs, beta=BETA, prior_R=torch.full((4,), 0.25))
    torch.testing.assert_close(uniform - entropy, torch.tensor(BETA * math.log(4)), rtol=0, atol=1e-5)


def test_a_loop_that_no_token_leaves_after_has_a_finite_loss_and_gradient():
    gate_logit_RSB = torch.full((3, S, B), -200.0).requires_grad_()
    mean_p_R = mean_exit_distribution(gate_logit_RSB, torch.ones(S, B))
    loss = exit_regularizer(gate_logit_RSB, None, mean_p_R).sum()
    loss.backward()
    assert loss.isfinite() and gate_logit_RSB.grad is not None and gate_logit_RSB.grad.isfinite().all()


def test_the_geometric_prior_equals_the_oracle():
    for loops, rate in ((1, 0.5), (3, 0.2), (4, 0.5), (8, 0.9)):
        theirs = reference.geometric_prior(loops, rate)
        assert_close_relative({"prior": geometric_prior(loops, rate)}, {"prior": theirs})


# ------------------------------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("slope, threshold", [(50.0, 0.005), (10.0, 0.0)])
@pytest.mark.parametrize("target", ["paper", "next"])
@pytest.mark.parametrize("loops", [2, 4])
def test_stage_2_equals_the_oracle(
    loops: int, target: Literal["paper", "next"], slope: float, threshold: float, mask_kind: str
):
    ours, mask_SB = loop_inputs(loops), mask_of(mask_kind)
    theirs = oracle_copy(ours)
    settings: dict[str, Any] = {"slope": slope, "threshold": threshold, "mask_SB": mask_SB, "target": target}
    loss = adaptive_gate_loss(**rsb(ours), **settings)
    their_loss = reference.adaptive_gate_loss(**rsb(theirs), **settings)
    grads = gradients(loss, ours)
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    assert_close_relative(grads, gradients(their_loss, theirs))
    assert not grads["token_loss"].any()  # the target is a constant: the trunk is frozen
    untrained, used = (0, loops - 1) if target == "paper" else (loops - 1, 0)
    assert not grads["gate_logit"][untrained].any()
    assert grads["gate_logit"][used].any()


# ---------------------------------------------------------------------------------------------------------- both stages

LOSSES = [
    partial(stage_1_loss, beta=BETA),
    partial(adaptive_gate_loss, slope=50.0, threshold=0.005, target="paper"),
]


@pytest.mark.parametrize("loops", [1, 4])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=["stage 1", "stage 2"])
def test_a_fully_masked_batch_has_zero_loss_and_gradients(loss_fn: Any, loops: int):
    inputs = loop_inputs(loops)
    loss = loss_fn(**rsb(inputs), mask_SB=torch.zeros(S, B))
    assert loss.item() == 0
    assert all(not grad.any() for grad in gradients(loss, inputs).values())  # any() is also true for NaN


@pytest.mark.parametrize("size", [30.0, 1e4])
@pytest.mark.parametrize("loss_fn", LOSSES, ids=["stage 1", "stage 2"])
def test_saturated_gates_give_finite_losses(loss_fn: Any, size: float):
    inputs = loop_inputs(4)
    inputs["gate_logit"] = (size * inputs["gate_logit"].detach().sign()).requires_grad_()
    loss = loss_fn(**rsb(inputs))
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, inputs).values())


def rsb(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs under the names of the losses' parameters."""
    return {f"{name}_RSB": t for name, t in inputs.items()}
