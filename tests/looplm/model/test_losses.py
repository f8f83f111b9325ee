"""Both losses and the chunked head compared with the reference, values and every gradient; and the memory of chunks."""

import math
import weakref
from functools import partial
from typing import Any, Literal

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looplm import reference
from looplm.model.losses import adaptive_gate_loss, entropy_regularised_loss, geometric_prior, token_losses
from tests.support.parity import assert_close_relative, gradients, oracle_copy

S, B, D, V = 13, 3, 16, 97

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


@pytest.mark.parametrize("mask_kind", MASKS)
@pytest.mark.parametrize("prior", ["entropy", "uniform", "geometric"])
@pytest.mark.parametrize("loops", [1, 2, 4])
def test_stage_1_equals_the_oracle(loops: int, prior: str, mask_kind: str):
    ours, mask_SB = loop_inputs(loops), mask_of(mask_kind)
    theirs = oracle_copy(ours)
    priors = {"entropy": None, "uniform": torch.full((loops,), 1 / loops), "geometric": geometric_prior(loops, 0.4)}
    prior_R = priors[prior]
    loss = entropy_regularised_loss(**rsb(ours), beta=BETA, mask_SB=mask_SB, prior_R=prior_R)
    their_loss = reference.entropy_regularised_loss(**rsb(theirs), beta=BETA, mask_SB=mask_SB, prior_R=prior_R)
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    assert_close_relative(gradients(loss, ours), gradients(their_loss, theirs))


def test_a_uniform_prior_differs_from_the_entropy_by_a_constant():
    inputs = rsb(loop_inputs(4))
    entropy = entropy_regularised_loss(**inputs, beta=BETA)
    uniform = entropy_regularised_loss(**inputs, beta=BETA, prior_R=torch.full((4,), 0.25))
    torch.testing.assert_close(uniform - entropy, torch.tensor(BETA * math.log(4)), rtol=0, atol=1e-5)


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
    partial(entropy_regularised_loss, beta=BETA),
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


# --------------------------------------------------------------------------------------------------------- chunked head


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chunk_tokens", [1, 7, S * B - 1, S * B, 1000])
def test_chunked_head_equals_the_oracle(chunk_tokens: int, recompute: bool):
    ours, labels_SB = head_inputs(), random_labels()
    theirs, mix_SB = oracle_copy(ours), torch.randn(S, B)
    loss_SB = token_losses(**ours, labels_SB=labels_SB, chunk_tokens=chunk_tokens, recompute=recompute)
    their_loss_SB = reference.token_losses(**theirs, labels_SB=labels_SB)
    assert loss_SB.dtype == torch.float32
    assert_close_relative({"loss": loss_SB}, {"loss": their_loss_SB})
    their_grads = gradients((mix_SB * their_loss_SB).sum(), theirs)
    for _ in range(2):  # backward does not use up what forward saved
        assert_close_relative(gradients((mix_SB * loss_SB).sum(), ours), their_grads)


def test_chunked_head_takes_strided_inputs_and_broadcast_gradients():
    ours, labels_BS = head_inputs(), torch.randint(V, (B, S))
    ours["hidden_SBD"] = torch.randn(B, S, D).transpose(0, 1).requires_grad_()
    theirs = oracle_copy(ours)
    loss = token_losses(**ours, labels_SB=labels_BS.T, chunk_tokens=5).mean()
    their_loss = reference.token_losses(**theirs, labels_SB=labels_BS.T).mean()
    assert_close_relative(gradients(loss, ours), gradients(their_loss, theirs))


def test_chunked_head_in_bf16_adds_up_every_chunk():
    """A bf16 sum of equal terms stops growing at 256 of them."""
    tokens = 1024
    hidden_SBD = torch.ones(tokens, 1, D, dtype=torch.bfloat16)
    weight_VD = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    loss_SB = token_losses(hidden_SBD, weight_VD, torch.zeros(tokens, 1, dtype=torch.int64), chunk_tokens=1)
    grad = gradients(loss_SB.sum(), {"weight": weight_VD})["weight"]
    expected_D = torch.full((D,), -tokens * (1 - 1 / V))
    assert_close_relative({"row of the label": grad[0]}, {"row of the label": expected_D}, 1e-2)


@pytest.mark.parametrize("frozen", ["hidden_SBD", "weight_VD"])
def test_freezing_one_input_does_not_change_the_others_gradient(frozen: str):
    inputs, labels_SB = head_inputs(), random_labels()
    both = gradients(token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=5).sum(), inputs)
    inputs[frozen] = inputs[frozen].detach()
    trained = {name: t for name, t in inputs.items() if name != frozen}
    one = gradients(token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=5).sum(), trained)
    assert all(torch.equal(one[name], both[name]) for name in trained)


def test_chunked_head_is_finite_for_huge_logits():
    inputs, labels_SB = head_inputs(), random_labels()
    inputs["hidden_SBD"] = (1e4 * inputs["hidden_SBD"].detach()).requires_grad_()
    loss_SB = token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=5)
    assert loss_SB.isfinite().all()
    assert all(grad.isfinite().all() for grad in gradients(loss_SB.sum(), inputs).values())


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_chunked_head_in_bf16_is_within_its_rounding(chunk_tokens: int):
    ours = {name: t.detach().bfloat16().requires_grad_() for name, t in head_inputs().items()}
    exact, labels_SB = oracle_copy(ours), random_labels()
    loss_SB = token_losses(**ours, labels_SB=labels_SB, chunk_tokens=chunk_tokens)
    their_loss_SB = reference.token_losses(**exact, labels_SB=labels_SB)
    grads, their_grads = gradients(loss_SB.sum(), ours), gradients(their_loss_SB.sum(), exact)
    assert loss_SB.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads.values())
    # bf16 has 8 significant bits: 4e-3 for one rounding, and there are a few.
    assert_close_relative({"loss": loss_SB, **grads}, {"loss": their_loss_SB, **their_grads}, tolerance=1.5e-2)


def test_chunked_head_over_a_group_of_one_equals_the_plain_head(single_process: ProcessGroupCollection):
    inputs, labels_SB = head_inputs(), random_labels()
    alone = token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=7)
    grouped = token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=7, group=single_process.tp)
    assert_close_relative({"loss": grouped}, {"loss": alone})
    assert_close_relative(gradients(grouped.sum(), inputs), gradients(alone.sum(), inputs))


class LogitRows(TorchDispatchMode):
    """Records the largest number of rows of logits, [rows, V], that are alive at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dim() == 2 and t.size(1) == V]
        self.seen += [weakref.ref(t) for t in found if t.size(0) != D]  # [D, V] is the transposed head
        alive = [t for t in (ref() for ref in self.seen) if t is not None]
        self.peak = max(self.peak, sum({t.untyped_storage().data_ptr(): t.size(0) for t in alive}.values()))
        return result


@pytest.mark.parametrize("recompute, trained, saved", [(True, True, 0), (False, True, S * B), (False, False, 0)])
def test_logits_are_kept_only_for_a_backward_pass_that_does_not_recompute(recompute: bool, trained: bool, saved: int):
    """Besides the saved logits, at most three chunks are alive: the logits, a conversion and a result."""
    inputs, labels_SB, chunk_tokens = head_inputs(), torch.randint(V, (S, B)), 5
    with LogitRows() as watch, torch.set_grad_enabled(trained):
        loss = token_losses(**inputs, labels_SB=labels_SB, chunk_tokens=chunk_tokens, recompute=recompute).sum()
        if trained:
            loss.backward()
    assert max(saved, chunk_tokens) <= watch.peak <= saved + 3 * chunk_tokens


def test_the_watch_sees_the_logits_of_an_unchunked_head():
    with LogitRows() as watch:
        reference.token_losses(**head_inputs(), labels_SB=random_labels()).sum().backward()
    assert watch.peak >= S * B


def random_labels() -> Tensor:
    return torch.randint(V, (S, B))


def head_inputs() -> dict[str, Any]:
    return {"hidden_SBD": torch.randn(S, B, D, requires_grad=True), "weight_VD": torch.randn(V, D, requires_grad=True)}


def rsb(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs under the names of the losses' parameters."""
    return {f"{name}_RSB": t for name, t in inputs.items()}
