"""Exit gates and exit distributions compared with the reference. Later tokens and other documents have no effect."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from looplm import reference
from looplm.config import GateConfig
from looplm.model.exit_gate import ExitGate, build_exit_gate, exit_entropy, exit_log_prob, exit_log_probs, q_exit
from tests.support.parity import assert_close_relative, gradients, oracle_copy, relative_error

S, B, D = 13, 3, 10
GATES = [
    pytest.param(GateConfig(kind="linear"), id="linear"),
    pytest.param(GateConfig(state_size=6), id="lru"),
    pytest.param(GateConfig(state_size=6, sequence_level=True), id="lru-sequence"),
    pytest.param(GateConfig(kind="mlp", hidden_size=6), id="mlp"),
]
GATES_WITH_OFFSET = GATES[1:]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(7)


def fresh_gate(config: GateConfig, dtype: torch.dtype = torch.float32) -> ExitGate:
    return build_exit_gate(
        TransformerConfig(num_layers=1, hidden_size=D, num_attention_heads=1, params_dtype=dtype), config
    )


def trained_gate(config: GateConfig, dtype: torch.dtype = torch.float32) -> ExitGate:
    """Return a gate with random weights: the read-outs of a fresh one are zero and would hide its other weights."""
    gate = fresh_gate(config, dtype)
    for parameter in gate.parameters():
        nn.init.normal_(parameter, std=0.7)
    return gate


def documents(*starts: tuple[int, ...], length: int = S) -> Tensor:
    """Return the first position of each token's document [S, B], from where the documents of each sample start."""
    position_S = torch.arange(length)
    columns = [torch.tensor(s)[(torch.tensor(s) <= position_S[:, None]).sum(1) - 1] for s in starts]
    return torch.stack(columns, dim=1)


PACKED = documents((0, 4, 9), (0,), (0, 1, 12))


def run(gate: ExitGate, hidden: list[Tensor], document_start_SB: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Run all loops, each on the state of the previous one, and return the logits [R, S, B] and the states."""
    state, logits, states = None, [], []
    for loop, h_SBD in enumerate(hidden):
        logit_SB, state = gate(h_SBD, state, loop, len(hidden), document_start_SB)
        logits.append(logit_SB)
        states.append(state)
    return torch.stack(logits), states


def run_oracle(params: dict[str, Tensor], config: GateConfig, hidden: list[Tensor], document_start_SB: Tensor | None):
    visible_BSS = reference.visible(torch.arange(S), document_start_SB)
    state, logits, states = None, [], []
    for loop, h_SBD in enumerate(hidden):
        logit_SB, state = reference.exit_gate(params, config, h_SBD, state, loop, len(hidden), visible_BSS)
        logits.append(logit_SB)
        states.append(state)
    return torch.stack(logits), states


@pytest.mark.parametrize("document_start_SB", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("config", GATES)
def test_logits_states_and_gradients_equal_the_oracle(config: GateConfig, loops: int, document_start_SB: Tensor | None):
    gate = trained_gate(config)
    params = dict(gate.named_parameters())
    hidden = {f"hidden.{r}": torch.randn(S, B, D, requires_grad=True) for r in range(loops)}
    their_params, their_hidden = oracle_copy(params), oracle_copy(hidden)

    logits, states = run(gate, list(hidden.values()), document_start_SB)
    their_logits, their_states = run_oracle(their_params, config, list(their_hidden.values()), document_start_SB)
    assert logits.dtype == torch.float32
    assert_close_relative({"logits": logits}, {"logits": their_logits})
    mix_logit = torch.randn_like(logits)
    loss, their_loss = (mix_logit * logits).sum(), (mix_logit * their_logits).sum()
    if gate.state_size:
        pairs = {f"state.{r}": pair for r, pair in enumerate(zip(states, their_states, strict=True))}
        assert_close_relative(
            {n: ours for n, (ours, _) in pairs.items()}, {n: theirs for n, (_, theirs) in pairs.items()}
        )
        mix_state = torch.randn(S, B, gate.state_size)
        loss, their_loss = loss + (mix_state * states[-1]).sum(), their_loss + (mix_state * their_states[-1]).sum()
    assert_close_relative(gradients(loss, params | hidden), gradients(their_loss, their_params | their_hidden))


@pytest.mark.parametrize("config", GATES)
def test_bf16_weights_still_give_fp32_math(config: GateConfig):
    gate = trained_gate(config, torch.bfloat16)
    hidden = [torch.randn(S, B, D, dtype=torch.bfloat16) for _ in range(3)]
    logits, _ = run(gate, hidden)
    params = oracle_copy(dict(gate.named_parameters()))
    their_logits, _ = run_oracle(params, config, [h.double() for h in hidden], None)
    assert logits.dtype == torch.float32
    assert_close_relative({"logits": logits}, {"logits": their_logits})


@pytest.mark.parametrize("document_start_SB", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("config", GATES)
def test_later_tokens_change_no_bit_of_earlier_ones(config: GateConfig, document_start_SB: Tensor | None):
    gate = trained_gate(config)
    hidden = [torch.randn(S, B, D) for _ in range(3)]
    for position in (1, 5, S - 1):
        changed = [torch.cat([h[:position], 9 * torch.randn(S - position, B, D)]) for h in hidden]
        before, states_before = run(gate, hidden, document_start_SB)
        after, states_after = run(gate, changed, document_start_SB)
        assert torch.equal(before[:, :position], after[:, :position])
        assert not torch.equal(before[:, position:], after[:, position:])
        if gate.state_size:
            pairs = zip(states_before, states_after, strict=True)
            assert all(torch.equal(a[:position], b[:position]) for a, b in pairs)


def test_the_sequence_signal_averages_its_own_document_only():
    gate = trained_gate(GateConfig(state_size=6, sequence_level=True))
    hidden = [torch.randn(S, B, D) for _ in range(3)]
    packed, _ = run(gate, hidden, PACKED)
    for sample, starts in enumerate([(0, 4, 9), (0,), (0, 1, 12)]):
        for start, end in zip(starts, (*starts[1:], S), strict=True):
            alone, _ = run(gate, [h[start:end, sample : sample + 1] for h in hidden])
            assert relative_error(packed[:, start:end, sample], alone[:, :, 0]) < 1e-5
    whole, _ = run(gate, hidden)
    assert relative_error(whole[:, 4:, 0], packed[:, 4:, 0]) > 1e-2  # without document starts the others count


def test_a_short_document_after_a_long_one_keeps_its_precision():
    """A mean computed as the difference of two long running sums would lose the short document to fp32 rounding."""
    length = 4096
    gate = trained_gate(GateConfig(state_size=6, sequence_level=True))
    h_SBD = torch.randn(length, 1, D) + 2  # the states have a mean other than zero, so their sum grows
    start = length - 3
    packed, _ = run(gate, [h_SBD, h_SBD], documents((0, start), length=length))
    alone, _ = run(gate, [h_SBD[start:], h_SBD[start:]])
    assert relative_error(packed[:, start:], alone) < 1e-5


@pytest.mark.parametrize("loops", range(1, 9))
@pytest.mark.parametrize("config", GATES_WITH_OFFSET)
def test_an_untrained_gate_with_an_offset_gives_the_uniform_distribution(config: GateConfig, loops: int):
    logits, _ = run(fresh_gate(config), [5 * torch.randn(S, B, D) for _ in range(loops)])
    p_RSB = exit_log_probs(logits).exp()
    assert (p_RSB - 1 / loops).abs().max() < 1e-6


@pytest.mark.parametrize("config", GATES)
def test_a_step_with_tokens_in_different_loops_equals_each_token_alone(config: GateConfig):
    """Decoding needs this: tokens in loop 0 and in loop 2 share a pass."""
    gate, hidden, num_loops = trained_gate(config), torch.randn(3, 5, D), 4
    depths = [0, 2, 1, 0, 2]
    logits, states = torch.zeros(5), torch.zeros(1, 5, gate.state_size)
    for token, depth in enumerate(depths):
        state = None
        for loop in range(depth):
            _, state = gate(hidden[loop, token].view(1, 1, D), state, loop, num_loops)
        logits[token] = gate(hidden[depth, token].view(1, 1, D), state, depth, num_loops)[0]
        if state is not None:
            states[:, token] = state[:, 0]
    h_1ND = torch.stack([hidden[depth, token] for token, depth in enumerate(depths)]).unsqueeze(0)
    together, _ = gate.step(h_1ND, states, torch.tensor(depths), num_loops, lambda value_SN: value_SN[0])
    torch.testing.assert_close(together[0], logits, rtol=1e-5, atol=1e-5)


def test_loops_beyond_the_trained_ones_have_no_offset():
    gate = fresh_gate(GateConfig(state_size=6))
    h_SBD = torch.randn(S, B, D)
    assert all(torch.equal(gate(h_SBD, None, loop, 4)[0], torch.zeros(S, B)) for loop in (3, 4, 7))


# ------------------------------------------------------------------------------------------------ the exit distribution


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_exit_distribution_and_entropy_equal_the_oracle(loops: int):
    logit = torch.randn(loops, S, B).mul(2).requires_grad_()
    theirs = logit.detach().double().requires_grad_()
    log_p, p = exit_log_probs(logit), reference.exit_distribution(theirs)
    mix = torch.randn(loops, S, B)
    results = {"p": log_p.exp(), "entropy": exit_entropy(log_p)}
    their_results = {"p": p, "entropy": reference.entropy(p)}
    results["p gradient"] = gradients((mix * log_p.exp()).sum(), {"": logit})[""]
    their_results["p gradient"] = gradients((mix * p).sum(), {"": theirs})[""]
    results["entropy gradient"] = gradients((mix[0] * exit_entropy(log_p)).sum(), {"": logit})[""]
    their_results["entropy gradient"] = gradients((mix[0] * reference.entropy(p)).sum(), {"": theirs})[""]
    assert_close_relative(results, their_results)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(S, B), rtol=0, atol=1e-6)


@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_one_loops_probability_needs_the_logits_up_to_it(loops: int):
    """Values, and the gradients of every logit."""
    logit, mix = torch.randn(loops, S, B, requires_grad=True), torch.randn(loops, S, B)
    rows = [exit_log_prob(logit.unbind()[: loop + 1], last=loop == loops - 1) for loop in range(loops)]
    one_by_one, together = torch.stack(rows), exit_log_probs(logit)
    assert_close_relative({"log p": one_by_one}, {"log p": together}, 1e-6)
    found, expected = (gradients((mix * log_p.exp()).sum(), {"logit": logit}) for log_p in (one_by_one, together))
    assert_close_relative(found, expected, 1e-6)


@pytest.mark.parametrize("size", [30.0, 1e4, 1e30])
def test_saturated_gates_give_finite_values(size: float):
    logit = size * (torch.randint(0, 2, (4, 64, B)) * 2.0 - 1)
    logit.requires_grad_()
    log_p = exit_log_probs(logit)
    torch.testing.assert_close(log_p.exp().sum(0), torch.ones(64, B), rtol=0, atol=1e-6)
    entropy = exit_entropy(log_p)
    (grad,) = torch.autograd.grad(entropy.sum() + log_p.exp()[0].sum(), logit)
    assert all(t.isfinite().all() for t in (log_p, entropy, grad))
    assert (entropy >= 0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("loops", [1, 2, 4, 8])
def test_q_exit_equals_a_slow_loop(loops: int, threshold: float):
    logit = 2 * torch.randn(loops, 50, B)
    depth = q_exit(exit_log_probs(logit), threshold)
    assert depth.dtype == torch.int64
    assert torch.equal(depth, reference.q_exit(reference.exit_distribution(logit.double()), threshold))


def test_q_exit_reaches_a_threshold_below_1_only():
    half = torch.tensor([0.5, 0.25, 0.25]).log()[:, None, None]
    assert q_exit(half, 0.5).item() == 1  # equality counts as reached
    certain = exit_log_probs(torch.tensor([1e4, 0.0, 0.0]))[:, None, None]
    assert q_exit(certain, 0.999).item() == 1
    assert q_exit(certain, 1.0).item() == 3  # a threshold of 1 disables early exit
