"""The whole model compared with the reference: hidden states, gate, losses, every gradient; sharing; and attention."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from looplm import reference
from looplm.config import GateConfig, ModelConfig
from looplm.megatron.device import DEVICE
from looplm.model import LoopLM, LoopOutput, loop_lm
from looplm.model.exit_gate import exit_log_probs
from looplm.model.head import token_losses
from looplm.model.losses import adaptive_gate_loss, exit_regularizer, masked_mean
from looplm.model.spans import document_spans
from tests.support.parity import assert_close_relative, gradients, oracle_copy, relative_error

S, B, V = 19, 2, 61
BETA = 1.0  # as large as the losses: the gate's gradient is then more than their small differences
SEED = 12
MLA = ModelConfig(
    vocab_size=V,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_attention_heads=4,
    num_loops=3,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    max_sequence_length=32,
)
MHA = replace(MLA, attention="mha")
LRU = GateConfig(state_size=6)
SEQUENCE = GateConfig(state_size=6, sequence_level=True)
LINEAR = GateConfig(kind="linear")

CASES = {
    "mla": (MLA, LRU),
    "mla-one-loop": (replace(MLA, num_loops=1), LRU),
    "mla-two-loops-linear": (replace(MLA, num_loops=2), LINEAR),
    "mla-query-latent": (replace(MLA, q_lora_rank=14), SEQUENCE),
    "mla-tied": (replace(MLA, tie_embeddings=True), LINEAR),
    "mla-no-sandwich": (replace(MLA, sandwich_norm=False), SEQUENCE),
    "mla-wide-values": (replace(MLA, v_head_dim=20), LRU),
    "mla-long-waves": (replace(MLA, rope_base=1e6, norm_eps=1e-2), LRU),
    "mla-two-rotary-keys": (replace(MLA, qk_rope_head_dim=8, qk_rope_period=4), LRU),
    "mla-mlp-gate": (MLA, GateConfig(kind="mlp", hidden_size=6)),
    "mla-nothing-but-rotary": (replace(MLA, qk_rope_head_dim=12, qk_rope_period=4, qk_nope_head_dim=0), LINEAR),
    "mla-prelude-coda": (replace(MLA, prelude_layers=1, coda_layers=2), SEQUENCE),
    "mla-readout-norm": (replace(MLA, loop_norm="readout"), LRU),
    "mla-plain-latent": (replace(MLA, kv_latent_norm=False, q_lora_rank=14), LRU),
    "mla-latent-reasoning": (replace(MLA, latent_iterations=3), LRU),
    "mla-latent-halting": (
        replace(MLA, latent_iterations=3, latent_halting=True, kv_latent_norm=False, prelude_layers=1),
        LINEAR,
    ),
    "mla-linear-injection": (replace(MLA, injection="linear", prelude_layers=1), LRU),
    "mla-additive-injection": (replace(MLA, injection="additive"), LINEAR),
    "mha-diagonal-injection": (replace(MHA, injection="diagonal", loop_norm="readout"), LRU),
    "mla-step-embedding": (replace(MLA, step_embedding="learned", injection="diagonal"), LRU),
    "mla-head-gate": (replace(MLA, attention_gate="head", q_lora_rank=14), LRU),
    "mla-element-gate": (replace(MLA, attention_gate="element", coda_layers=1), LINEAR),
    "mha-grouped-head-gate": (replace(MHA, attention_gate="head", num_query_groups=2), LRU),
    "mha-element-gate": (replace(MHA, attention_gate="element", head_dim=12), LINEAR),
    "mha": (MHA, LINEAR),
    "mha-grouped": (replace(MHA, num_query_groups=2), SEQUENCE),
    "mha-one-group-wide-heads": (replace(MHA, num_query_groups=1, head_dim=12), LRU),
    "mha-biases-normed-heads": (replace(MHA, num_query_groups=2, qkv_bias=True, qk_norm=True), LRU),
    "mha-coda-readout-norm": (replace(MHA, prelude_layers=2, coda_layers=1, loop_norm="readout"), LINEAR),
    "mha-tied-no-sandwich": (replace(MHA, tie_embeddings=True, sandwich_norm=False, num_loops=2), LRU),
}


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    torch.manual_seed(SEED)
    with DEVICE:
        yield


def test_the_whole_model_is_moved_to_the_device_wherever_its_parts_are_made(single_process, monkeypatch):
    monkeypatch.setattr(loop_lm, "DEVICE", torch.device("meta"))  # stands for another device than that of the parts
    model = LoopLM(MLA, LRU, single_process)
    assert all(parameter.is_meta for parameter in model.parameters())


def build(model: ModelConfig, gate: GateConfig, groups: ProcessGroupCollection, dtype=torch.float32) -> LoopLM:
    """Return a model in which every parameter matters: no norm is 1, and no read-out is 0.

    The values do not depend on how the model initializes itself. If a gradient happens to cancel, as the single number
    of the gate's bias may, rounding alone exceeds 1e-5: the reference in fp32 then differs as much from itself in fp64.
    With this seed no gradient cancels and all errors are near 3e-6, so an error above the tolerance is a mistake.
    """
    built = LoopLM(model, gate, groups, dtype)
    torch.manual_seed(SEED)
    for name, parameter in sorted(built.named_parameters()):
        if name.endswith(("norm.weight", "_gain")):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3 if name.startswith("gate.") else 0.1)
    return built


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, S], labels [S, B] and a mask [S, B] that drops some tokens."""
    ids = torch.randint(V, (B, S + 1))
    return ids[:, :-1], ids[:, 1:].T, (torch.rand(S, B) < 0.8).float()


def documents() -> Tensor:
    """Return the first position of each token's document [S, B]: three documents in sample 0, two in sample 1."""
    start_SB = torch.zeros(S, B, dtype=torch.int64)
    start_SB[4:, 0], start_SB[11:, 0], start_SB[S - 1 :, 1] = 4, 11, S - 1
    return start_SB


def losses(output: LoopOutput | reference.Output, weight_VD: Tensor, labels_SB: Tensor) -> Tensor:
    """Return each loop's cross-entropies [R, S, B], with our head for our output and the reference's for its own."""
    if isinstance(output, reference.Output):
        return torch.stack([reference.token_losses(h_SBD, weight_VD, labels_SB) for h_SBD in output.hidden])
    return torch.stack([token_losses(h_SBD, weight_VD, labels_SB) for h_SBD in output.hidden])


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_one_block_equals_the_oracle(case: str, packed: bool, single_process: ProcessGroupCollection):
    config, gate = CASES[case]
    model = build(config, gate, single_process)
    block = model.decoder.layers[1]
    tensors = {"input": torch.randn(S, B, config.hidden_size, requires_grad=True), **dict(block.named_parameters())}
    theirs = oracle_copy(tensors)
    start_SB, mix_SBD = documents() if packed else None, torch.randn(S, B, config.hidden_size)
    spans = None if start_SB is None else document_spans(start_SB)
    rotary = None if model.rotary is None else model.rotary(S)

    output_SBD, _ = block(tensors["input"], attention_mask=spans, rotary_pos_emb=rotary)
    view = reference.View.of(config, torch.zeros(B, S), start_SB, fused=False)
    their_output_SBD = reference.block(theirs, config, theirs["input"], view)
    assert_close_relative({"output": output_SBD}, {"output": their_output_SBD})
    assert_close_relative(
        gradients((mix_SBD * output_SBD).sum(), tensors), gradients((mix_SBD * their_output_SBD).sum(), theirs)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_loss_and_gradients_equal_the_oracle(case: str, packed: bool, single_process: ProcessGroupCollection):
    config, gate = CASES[case]
    model = build(config, gate, single_process)
    params = dict(model.named_parameters())
    their_params = oracle_copy(params)
    ids_BS, labels_SB, mask_SB = batch()
    document_start_SB = documents() if packed else None

    output = model(ids_BS, document_start_SB=document_start_SB)
    theirs = reference.forward(their_params, config, gate, ids_BS, document_start_SB=document_start_SB)
    assert len(output.hidden) == config.num_loops
    assert_close_relative(named(output), named(theirs))

    token_loss_RSB = losses(output, model.head_weight(), labels_SB)
    their_token_loss_RSB = losses(theirs, reference.head_weight(their_params, config), labels_SB)
    expected_SB = (exit_log_probs(output.gate_logit_RSB).exp() * token_loss_RSB).sum(0)
    loss = masked_mean(expected_SB + BETA * exit_regularizer(output.gate_logit_RSB), mask_SB)
    their_loss = reference.entropy_regularised_loss(their_token_loss_RSB, theirs.gate_logit_RSB, BETA, mask_SB)
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    their_grads = gradients(their_loss, their_params)
    assert_close_relative(gradients(loss, params), their_grads)
    untrained = {name for name, grad in their_grads.items() if not grad.any()}
    assert untrained == expected_untrained(config, gate), "the comparison above compares zeros for these"


def expected_untrained(config: ModelConfig, gate: GateConfig) -> set[str]:
    """Return the parameters that stage 1 cannot train.

    With one loop the gate decides nothing. With two it decides once, before any state could be carried over.
    """
    names = {name for name in reference.parameter_shapes(config, gate) if name.startswith("gate.")}
    if config.num_loops == 1:
        return names
    return names & {"gate.cell.weight_hh"} if config.num_loops == 2 else set()


@pytest.mark.parametrize("case", ["mla-query-latent", "mha-grouped"])
def test_the_gate_stage_trains_the_gate_and_nothing_else(case: str, single_process: ProcessGroupCollection):
    config, gate = CASES[case]
    model = build(config, gate, single_process)
    params = dict(model.named_parameters())
    their_params = oracle_copy(params)
    ids_BS, labels_SB, mask_SB = batch()
    start_SB = documents()

    output = model(ids_BS, document_start_SB=start_SB, frozen_trunk=True)
    theirs = reference.forward(their_params, config, gate, ids_BS, document_start_SB=start_SB)
    assert not any(h_SBD.requires_grad for h_SBD in output.hidden)
    assert_close_relative(named(output), named(theirs))
    with torch.no_grad():
        token_loss_RSB = losses(output, model.head_weight(), labels_SB)
    # The gate stage depends on small differences of large losses. Both sides get the same losses, to compare the gate.
    settings: dict[str, Any] = {"slope": 50.0, "threshold": 0.005, "target": "next", "mask_SB": mask_SB}
    loss = adaptive_gate_loss(token_loss_RSB, output.gate_logit_RSB, **settings)
    frozen_logit_RSB = reference_gate_alone(their_params, gate, theirs, start_SB)
    their_loss = reference.adaptive_gate_loss(token_loss_RSB.double(), frozen_logit_RSB, **settings)
    grads = gradients(loss, params)
    assert_close_relative({"loss": loss}, {"loss": their_loss})
    assert_close_relative(grads, gradients(their_loss, their_params))
    assert {name for name, grad in grads.items() if grad.any()} == {n for n in params if n.startswith("gate.")}


@pytest.mark.parametrize("case", ["mla-query-latent", "mha-grouped"])
def test_a_frozen_trunk_runs_without_autograd(case: str, single_process: ProcessGroupCollection):
    """Only the gate's activations are saved for backward."""
    model = build(*CASES[case], single_process)
    ids_BS, _, _ = batch()
    saved: dict[bool, int] = {}
    for frozen in (False, True):
        sizes: list[int] = []

        def save(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            model(ids_BS, frozen_trunk=frozen)
        saved[frozen] = sum(sizes)
    assert 0 < saved[True] < saved[False] / 5


def reference_gate_alone(
    params: dict[str, Tensor], gate: GateConfig, output: reference.Output, start_SB: Tensor
) -> Tensor:
    """Return the logits of the reference's gate on detached hidden states."""
    visible_BSS, state, logits = reference.visible(torch.arange(S), start_SB), None, []
    for loop, h_SBD in enumerate(output.hidden):
        logit_SB, state = reference.exit_gate(
            reference.scope(params, "gate."), gate, h_SBD.detach(), state, loop, len(output.hidden), visible_BSS
        )
        logits.append(logit_SB)
    return torch.stack(logits)


@pytest.mark.parametrize("case", ["mla", "mha-grouped"])
def test_bf16_stays_near_the_oracle(case: str, single_process: ProcessGroupCollection):
    config, gate = CASES[case]
    model = build(config, gate, single_process, torch.bfloat16)
    ids_BS, _, _ = batch()
    output = model(ids_BS, document_start_SB=documents())
    params = oracle_copy(dict(model.named_parameters()))
    theirs = reference.forward(params, config, gate, ids_BS, document_start_SB=documents())
    assert output.hidden[0].dtype == torch.bfloat16
    assert output.gate_logit_RSB.dtype == torch.float32
    assert_close_relative(named(output), named(theirs), tolerance=0.1)


@pytest.mark.parametrize("case", ["mla", "mla-wide-values", "mha-grouped"])
def test_the_oracle_computes_the_same_with_fused_attention(case: str, single_process: ProcessGroupCollection):
    """The speed benchmark runs `ReferenceLM` with fused attention."""
    config, gate = CASES[case]
    theirs = reference.ReferenceLM(config, gate, fused_attention=True).to(DEVICE)
    theirs.load_state_dict(dict(build(config, gate, single_process).named_parameters()))
    ids_BS, labels_SB, mask_SB = batch()
    for start_SB in (None, documents()):
        fast = theirs(ids_BS, labels_SB, BETA, mask_SB, start_SB)
        theirs.fused_attention = False
        slow = theirs(ids_BS, labels_SB, BETA, mask_SB, start_SB)
        theirs.fused_attention = True
        params = dict(theirs.named_parameters())
        assert_close_relative({"loss": fast}, {"loss": slow})
        assert_close_relative(gradients(fast, params), gradients(slow, params))


# ------------------------------------------------------------------------------------------------------------ sharing


@pytest.mark.parametrize("case", CASES)
def test_any_number_of_loops_has_the_expected_parameters(case: str, single_process: ProcessGroupCollection):
    config, gate = CASES[case]
    for loops in (1, 4):
        expected = reference.parameter_shapes(config, gate)
        expected |= {name: (loops, config.hidden_size) for name in expected if name.startswith("step_embedding.")}
        model = LoopLM(replace(config, num_loops=loops), gate, single_process)
        assert {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)} == expected
        assert len({p.data_ptr() for p in model.parameters()}) == len(expected)


@pytest.mark.parametrize("case", ["mla", "mla-additive-injection", "mla-step-embedding"])
@pytest.mark.parametrize("loops", [1, 2, 5])
def test_the_first_loops_do_not_depend_on_the_number_of_loops(
    loops: int, case: str, single_process: ProcessGroupCollection
):
    config, gate = CASES[case]
    model = build(config, gate, single_process)
    ids_BS, _, _ = batch()
    other, trained = model(ids_BS, num_loops=loops), model(ids_BS)
    assert len(other.hidden) == loops
    common = min(loops, MLA.num_loops)
    assert all(torch.equal(a, b) for a, b in zip(other.hidden[:common], trained.hidden[:common], strict=True))
    assert torch.equal(other.gate_logit_RSB[:common], trained.gate_logit_RSB[:common])
    theirs = reference.forward(oracle_copy(dict(model.named_parameters())), config, gate, ids_BS, num_loops=loops)
    assert_close_relative(named(other), named(theirs))


def test_a_fresh_step_embedding_changes_no_bit(single_process: ProcessGroupCollection):
    ids_BS, _, _ = batch()
    plain, stepped = (
        named(LoopLM(config, LRU, single_process)(ids_BS)) for config in (MLA, replace(MLA, step_embedding="learned"))
    )
    assert all(torch.equal(value, stepped[name]) for name, value in plain.items())


def test_a_fresh_cell_keeps_as_much_of_the_latent_in_any_number_of_steps(single_process: ProcessGroupCollection):
    model = LoopLM(replace(MLA, latent_iterations=3), LRU, single_process)
    width = MLA.kv_lora_rank
    for layer in model.decoder.layers:
        update_C = layer.self_attention.kv_layernorm.cell.bias_ih[width : 2 * width]
        assert torch.allclose(update_C, torch.full_like(update_C, math.log(5.0))), "(1 - 1 / 6)^3 of it"


def test_a_tied_head_is_the_embeddings_own_tensor(single_process: ProcessGroupCollection):
    tied, gate = CASES["mla-tied"]
    model = build(tied, gate, single_process)
    assert model.head_weight() is model.embedding.word_embeddings.weight
    assert build(MLA, gate, single_process).head_weight().data_ptr() != model.head_weight().data_ptr()


# ------------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("case", ["mla-query-latent", "mla", "mha-grouped"])
def test_later_tokens_change_no_bit_of_earlier_ones(case: str, packed: bool, single_process: ProcessGroupCollection):
    model = build(*CASES[case], single_process)
    ids_BS, _, _ = batch()
    start_SB = documents() if packed else None
    before = named(model(ids_BS, document_start_SB=start_SB))
    for position in (1, 7, S - 1):
        changed_BS = ids_BS.clone()
        changed_BS[:, position:] = (changed_BS[:, position:] + 1) % V
        after = named(model(changed_BS, document_start_SB=start_SB))
        for name in before:
            a, b = (t.movedim(1, 0) if name == "gate logits" else t for t in (before[name], after[name]))
            assert torch.equal(a[:position], b[:position]), name
            assert not torch.equal(a[position:], b[position:]), name


@pytest.mark.parametrize("case", ["mla-query-latent", "mla", "mha-grouped"])
def test_a_packed_document_equals_the_document_alone(case: str, single_process: ProcessGroupCollection):
    """Rotary positions are relative, so a document's place in the sample does not matter."""
    model = build(*CASES[case], single_process)
    ids_BS, _, _ = batch()
    packed, whole = (named(model(ids_BS, document_start_SB=start)) for start in (documents(), None))
    for start, end in ((0, 4), (4, 11), (11, S)):
        alone = named(model(ids_BS[:1, start:end]))
        for name, expected in alone.items():
            span: tuple[slice, ...] = (slice(start, end), slice(0, 1))
            if name == "gate logits":
                span = (slice(None), *span)
            assert relative_error(packed[name][span], expected) < 2e-5, name
            assert start == 0 or relative_error(whole[name][span], expected) > 1e-2, f"{name}: masking changes nothing"


def named(output: LoopOutput | reference.Output) -> dict[str, Tensor]:
    """Return hidden states and gate logits by name."""
    hidden = {f"hidden after loop {loop}": h_SBD for loop, h_SBD in enumerate(output.hidden, start=1)}
    return {**hidden, "gate logits": output.gate_logit_RSB}


def test_no_two_layers_start_alike(single_process):
    model = LoopLM(replace(MLA, prelude_layers=1, coda_layers=1), LRU, single_process)
    blocks: list[Any] = [model.prelude, model.decoder, model.coda]
    layers = [layer for block in blocks for layer in block.layers]
    assert len({tuple(layer.mlp.linear_fc1.weight[0, :4].tolist()) for layer in layers}) == len(layers)


def test_a_state_dict_with_other_names_is_refused(single_process):
    model = LoopLM(MLA, LRU, single_process)
    state = model.state_dict()
    state["decoder.layer.0"] = state.pop("decoder.final_layernorm.weight")
    with pytest.raises(RuntimeError, match=r"decoder\.final_layernorm\.weight, decoder\.layer\.0"):
        model.load_state_dict(state)
