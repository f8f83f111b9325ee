"""The head compared with the reference: values, every gradient, where the weight's gradient goes, and memory."""

import weakref
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from looplm import reference
from looplm.model import head
from looplm.model.head import DirectGradient, chunk_tokens, token_losses, weighted_losses
from tests.support.parity import assert_close_relative, grad_of, gradients, oracle_copy

S, B, D, V = 13, 3, 16, 97
CHUNKS = [1, 7, S * B - 1, S * B, 1000]  # tokens
SCALE = 0.375
BLOCK = 3  # tokens of a block


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(11)


@pytest.fixture
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a chunk have at most ``request.param`` tokens, and a block three."""
    monkeypatch.setitem(head.LOGIT_BYTES, "cpu", 4 * V * request.param)
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * V * BLOCK)
    return int(request.param)


def random_labels() -> Tensor:
    return torch.randint(V, (S, B))


def head_inputs() -> dict[str, Any]:
    return {"hidden_SBD": torch.randn(S, B, D, requires_grad=True), "weight_VD": torch.randn(V, D, requires_grad=True)}


def weighted_inputs() -> dict[str, Any]:
    """Return a head's inputs with shares, of which some are 0, as those of masked tokens are."""
    share_SB = torch.rand(S, B) * (torch.rand(S, B) < 0.7)
    return head_inputs() | {"share_SB": share_SB.requires_grad_()}


def their_sum(hidden_SBD: Tensor, weight_VD: Tensor, share_SB: Tensor, labels_SB: Tensor) -> Tensor:
    return (share_SB * reference.token_losses(hidden_SBD, weight_VD, labels_SB)).sum()


def our_sum(**arguments: Any) -> Tensor:
    expected = weighted_losses(**arguments).expected
    assert expected is not None
    return expected


# ------------------------------------------------------------------------------------------- one pass: autograd's rules


@pytest.mark.parametrize("chunk", CHUNKS, indirect=True)
def test_the_weighted_sum_equals_the_oracle(chunk: int):
    ours, labels_SB = weighted_inputs(), random_labels()
    theirs = oracle_copy(ours)
    found = weighted_losses(**ours, labels_SB=labels_SB)
    their_loss_SB = reference.token_losses(theirs["hidden_SBD"], theirs["weight_VD"], labels_SB)
    expected = their_sum(**theirs, labels_SB=labels_SB)
    assert found.expected is not None and found.expected.dtype == found.token_loss_SB.dtype == torch.float32
    assert not found.token_loss_SB.requires_grad
    assert_close_relative(
        {"losses": found.token_loss_SB, "sum": found.expected}, {"losses": their_loss_SB, "sum": expected}
    )
    their_grads = gradients(SCALE * expected, theirs)
    for _ in range(2):  # backward does not use up what forward saved
        assert_close_relative(gradients(SCALE * found.expected, ours), their_grads)


def test_sums_of_several_loops_add_up():
    ours, labels_SB = weighted_inputs(), random_labels()
    theirs = oracle_copy(ours)
    total = sum(our_sum(**{**ours, "hidden_SBD": n * ours["hidden_SBD"]}, labels_SB=labels_SB) for n in (1, 2))
    their_total = sum(
        their_sum(**{**theirs, "hidden_SBD": n * theirs["hidden_SBD"]}, labels_SB=labels_SB) for n in (1, 2)
    )
    assert isinstance(total, Tensor) and isinstance(their_total, Tensor)
    assert_close_relative(gradients(total, ours), gradients(their_total, theirs))


@pytest.mark.parametrize("fixed", ["hidden_SBD", "weight_VD", "share_SB"])
def test_an_input_without_gradient_does_not_change_the_others(fixed: str):
    inputs, labels_SB = weighted_inputs(), random_labels()
    all_grads = gradients(our_sum(**inputs, labels_SB=labels_SB), inputs)
    inputs[fixed] = inputs[fixed].detach()
    trained = {name: t for name, t in inputs.items() if name != fixed}
    found = gradients(our_sum(**inputs, labels_SB=labels_SB), trained)
    assert all(torch.equal(found[name], all_grads[name]) for name in trained)


# ------------------------------------------------------------------------------- one pass: the weight's gradient buffer


@pytest.mark.parametrize("chunk", CHUNKS, indirect=True)
def test_the_weights_gradient_is_added_to_its_buffer_once(chunk: int):
    """It is there after the forward pass, on top of what was there, and backward adds nothing."""
    ours, labels_SB, before_VD = weighted_inputs(), random_labels(), torch.randn(V, D)
    theirs, into_VD = oracle_copy(ours), before_VD.clone()
    their_grads = gradients(their_sum(**theirs, labels_SB=labels_SB), theirs)
    expected = our_sum(**ours, labels_SB=labels_SB, direct=DirectGradient(into_VD, None, signals=False))
    for backward in (False, True):
        if backward:
            expected.backward()
        assert_close_relative({"weight": into_VD - before_VD}, {"weight": their_grads["weight_VD"]})
    assert ours["weight_VD"].grad is None
    others = ("hidden_SBD", "share_SB")
    assert_close_relative({name: grad_of(ours[name]) for name in others}, {name: their_grads[name] for name in others})


def test_a_known_scale_of_the_loss_is_in_all_gradients():
    inputs, labels_SB, found = weighted_inputs(), random_labels(), list[dict[str, Tensor]]()
    for scale in (None, torch.tensor([1024.0])):
        into_VD = torch.zeros(V, D)
        expected = our_sum(**inputs, labels_SB=labels_SB, direct=DirectGradient(into_VD, scale, signals=False))
        names = {name: inputs[name] for name in ("hidden_SBD", "share_SB")}
        found.append({"weight": into_VD, **gradients(expected * (1 if scale is None else scale), names)})
    assert all(torch.equal(found[1][name], 1024 * value) for name, value in found[0].items())


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_another_scale_than_the_known_one_is_an_error(scale: float | None):
    inputs, known = weighted_inputs(), None if scale is None else torch.tensor(scale)
    direct = DirectGradient(torch.zeros(V, D), known, signals=False)
    expected = our_sum(**inputs, labels_SB=random_labels(), direct=direct)
    with pytest.raises(RuntimeError, match="another scale of the loss"):
        (expected / 2).backward()


@pytest.mark.parametrize("signals", [False, True])
def test_the_weights_hook_is_called_if_the_call_signals(signals: bool):
    """Autograd calls a hook on the gradient accumulation even for a gradient that is None."""
    inputs, calls = weighted_inputs(), list[bool]()
    weight_VD: Any = inputs["weight_VD"]
    accumulate = weight_VD.expand_as(weight_VD).grad_fn.next_functions[0][0]  # as Megatron's wrapper finds it
    accumulate.register_hook(lambda *_: calls.append(weight_VD.grad is not None))
    weight_VD.grad_added_to_main_grad = False
    direct = DirectGradient(torch.zeros(V, D), None, signals)
    our_sum(**inputs, labels_SB=random_labels(), direct=direct).backward()
    assert calls == [True] * signals and weight_VD.grad_added_to_main_grad is signals


def test_without_autograd_nothing_is_added_to_the_buffer():
    inputs, labels_SB, into_VD = weighted_inputs(), random_labels(), torch.zeros(V, D)
    trained = weighted_losses(**inputs, labels_SB=labels_SB)
    with torch.no_grad():
        found = weighted_losses(**inputs, labels_SB=labels_SB, direct=DirectGradient(into_VD, None, signals=True))
    assert not into_VD.any() and found.expected is not None and trained.expected is not None
    assert torch.equal(found.token_loss_SB, trained.token_loss_SB) and torch.equal(found.expected, trained.expected)


@pytest.mark.parametrize("buffer", [torch.float32, torch.bfloat16])
def test_one_pass_in_bf16_is_within_its_rounding(buffer: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(head.LOGIT_BYTES, "cpu", 4 * V * 7)
    monkeypatch.setattr(head, "BLOCK_BYTES", 4 * V * BLOCK)
    exact = weighted_inputs()
    ours = {name: (t if name == "share_SB" else t.bfloat16()).detach().requires_grad_() for name, t in exact.items()}
    theirs, labels_SB, into_VD = oracle_copy(ours), random_labels(), torch.zeros(V, D, dtype=buffer)
    expected = our_sum(**ours, labels_SB=labels_SB, direct=DirectGradient(into_VD, None, signals=False))
    expected.backward()
    their_grads = gradients(their_sum(**theirs, labels_SB=labels_SB), theirs)
    found = {"weight_VD": into_VD} | {name: grad_of(ours[name]) for name in ("hidden_SBD", "share_SB")}
    assert found["hidden_SBD"].dtype == torch.bfloat16 and found["share_SB"].dtype == torch.float32
    # bf16 has 8 significant bits: 4e-3 for one rounding, and there are a few.
    assert_close_relative(found, their_grads, tolerance=1.5e-2)


def test_bf16_does_not_lose_the_gradient_of_a_label_that_is_almost_certain():
    """With p = 0.9995, the difference p - 1 of numbers rounded to bf16 would be 0."""
    hidden_SBD = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.tensor([[7.625], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    into_VD, labels_SB = torch.zeros(2, 1), torch.zeros(1, 1, dtype=torch.int64)
    direct = DirectGradient(into_VD, None, signals=False)
    weighted_losses(hidden_SBD, weight_VD, labels_SB, torch.ones(1, 1), direct=direct)
    p = torch.sigmoid(torch.tensor(7.625))
    torch.testing.assert_close(into_VD.flatten(), torch.stack((p - 1, 1 - p)), rtol=4e-3, atol=0)


# ------------------------------------------------------------------------------------------------- recomputed gradients


@pytest.mark.parametrize("chunk", CHUNKS, indirect=True)
def test_each_tokens_loss_equals_the_oracle(chunk: int):
    ours, labels_SB = head_inputs(), random_labels()
    theirs, mix_SB = oracle_copy(ours), torch.randn(S, B)
    loss_SB = token_losses(**ours, labels_SB=labels_SB)
    their_loss_SB = reference.token_losses(**theirs, labels_SB=labels_SB)
    assert loss_SB.dtype == torch.float32
    assert_close_relative({"loss": loss_SB}, {"loss": their_loss_SB})
    their_grads = gradients((mix_SB * their_loss_SB).sum(), theirs)
    for _ in range(2):  # backward does not use up what forward saved
        assert_close_relative(gradients((mix_SB * loss_SB).sum(), ours), their_grads)


@pytest.mark.parametrize("one_pass", [True, False])
def test_logits_whose_exponential_overflows_keep_their_losses_and_gradients(one_pass: bool):
    ours, labels_SB = head_inputs(), random_labels()
    ours["weight_VD"] = (200 * ours["weight_VD"]).detach().requires_grad_()  # logits of some 800, and exp(89) overflows
    theirs = oracle_copy(ours)
    loss = mean_loss(one_pass, **ours, labels_SB=labels_SB)
    their_loss = reference.token_losses(**theirs, labels_SB=labels_SB).mean()
    assert their_loss > 89
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    assert_close_relative(gradients(loss, ours), gradients(their_loss, theirs))


@pytest.mark.parametrize("chunk", [1, 7, 1000], indirect=True)
def test_token_losses_in_bf16_are_within_their_rounding(chunk: int):
    ours = {name: t.detach().bfloat16().requires_grad_() for name, t in head_inputs().items()}
    exact, labels_SB = oracle_copy(ours), random_labels()
    loss_SB = token_losses(**ours, labels_SB=labels_SB)
    their_loss_SB = reference.token_losses(**exact, labels_SB=labels_SB)
    grads, their_grads = gradients(loss_SB.sum(), ours), gradients(their_loss_SB.sum(), exact)
    assert loss_SB.dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in grads.values())
    assert_close_relative({"loss": loss_SB, **grads}, {"loss": their_loss_SB, **their_grads}, tolerance=1.5e-2)


@pytest.mark.parametrize("frozen", ["hidden_SBD", "weight_VD"])
def test_freezing_one_input_does_not_change_the_others_gradient(frozen: str):
    inputs, labels_SB = head_inputs(), random_labels()
    both = gradients(token_losses(**inputs, labels_SB=labels_SB).sum(), inputs)
    inputs[frozen] = inputs[frozen].detach()
    trained = {name: t for name, t in inputs.items() if name != frozen}
    one = gradients(token_losses(**inputs, labels_SB=labels_SB).sum(), trained)
    assert all(torch.equal(one[name], both[name]) for name in trained)


# ------------------------------------------------------------------------------------------------------------ both ways


def mean_loss(one_pass: bool, **inputs: Any) -> Tensor:
    """Return the mean of all token losses, whose gradients both ways can compute."""
    labels_SB = inputs["labels_SB"]
    if one_pass:
        return our_sum(**inputs, share_SB=torch.full(labels_SB.shape, 1 / labels_SB.numel()))
    return token_losses(**inputs).mean()


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_head_takes_strided_inputs(one_pass: bool):
    ours, labels_BS = head_inputs(), torch.randint(V, (B, S))
    ours["hidden_SBD"] = torch.randn(B, S, D).transpose(0, 1).requires_grad_()
    theirs = oracle_copy(ours)
    loss = mean_loss(one_pass, **ours, labels_SB=labels_BS.T)
    their_loss = reference.token_losses(**theirs, labels_SB=labels_BS.T).mean()
    assert_close_relative(gradients(loss, ours), gradients(their_loss, theirs))


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("chunk", [1], indirect=True)
def test_the_head_in_bf16_adds_up_every_chunk(chunk: int, one_pass: bool):
    """A bf16 sum of equal terms stops growing at 256 of them."""
    tokens = 1024
    hidden_SBD = torch.ones(tokens, 1, D, dtype=torch.bfloat16)
    weight_VD = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
    labels_SB = torch.zeros(tokens, 1, dtype=torch.int64)
    loss = tokens * mean_loss(one_pass, hidden_SBD=hidden_SBD, weight_VD=weight_VD, labels_SB=labels_SB)
    grad = gradients(loss, {"weight": weight_VD})["weight"]
    expected_D = torch.full((D,), -tokens * (1 - 1 / V))
    assert_close_relative({"row of the label": grad[0]}, {"row of the label": expected_D}, 1e-2)


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_head_is_finite_for_huge_logits(one_pass: bool):
    inputs, labels_SB = head_inputs(), random_labels()
    inputs["hidden_SBD"] = (1e4 * inputs["hidden_SBD"].detach()).requires_grad_()
    loss = mean_loss(one_pass, **inputs, labels_SB=labels_SB)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(loss, inputs).values())


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_head_over_a_group_of_one_equals_the_plain_head(one_pass: bool, single_process: ProcessGroupCollection):
    inputs, labels_SB = head_inputs(), random_labels()
    alone = mean_loss(one_pass, **inputs, labels_SB=labels_SB)
    grouped = mean_loss(one_pass, **inputs, labels_SB=labels_SB, group=single_process.tp)
    assert_close_relative({"loss": grouped}, {"loss": alone})
    assert_close_relative(gradients(grouped, inputs), gradients(alone, inputs))


# -------------------------------------------------------------------------------------------------------------- memory


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


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize(("dtype", "blocks"), [(torch.float32, 1), (torch.bfloat16, 2)])
@pytest.mark.parametrize("chunk", [5], indirect=True)
def test_one_chunk_of_logits_is_alive_at_once(chunk: int, dtype: torch.dtype, blocks: int, one_pass: bool):
    """Besides it there is a block of log-probabilities, and in bf16 the block's fp32 copy."""
    inputs = {name: t.detach().to(dtype).requires_grad_() for name, t in head_inputs().items()}
    with LogitRows() as watch:
        mean_loss(one_pass, **inputs, labels_SB=random_labels()).backward()
    assert chunk <= watch.peak <= chunk + blocks * BLOCK


def test_the_watch_sees_the_logits_of_an_unchunked_head():
    with LogitRows() as watch:
        reference.token_losses(**head_inputs(), labels_SB=random_labels()).sum().backward()
    assert watch.peak >= S * B


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1024, 49_152), (1025, 49_152), (10, 97), (1, 1), (7, 2**40)])
def test_chunks_are_as_large_as_allowed_and_even(tokens: int, vocabulary: int):
    size = chunk_tokens(tokens, vocabulary, "cpu")
    largest = max(1, head.LOGIT_BYTES["cpu"] // (4 * vocabulary))
    count = -(-tokens // size)
    assert 1 <= size <= min(largest, tokens)
    assert count == -(-tokens // largest)  # no more chunks than necessary
