"""The table of parameters compared with the reference and with real modules, for every kind of model."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import reference
from looplm.accounting import forward_flops_per_token, parameter_counts, training_flops_per_token
from looplm.config import GateConfig, LossConfig, ModelConfig
from looplm.config.model import ATTENTION_KEYS, GATE_KEYS, foreign_keys
from looplm.model import LoopLM
from looplm.model.exit_gate import build_exit_gate
from looplm.parameters import ATTENTIONS, GATES, decayed_names, layer_parameters, parameters, tensor_parallel_units

SIZES: dict[str, Any] = {"vocab_size": 320, "hidden_size": 32, "ffn_hidden_size": 48, "num_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_loops": 3}
MLA: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12}
MODELS = {
    "mla": ModelConfig(**SIZES, **MLA),
    "query latent, tied": ModelConfig(**SIZES, **MLA, q_lora_rank=20, tie_embeddings=True),
    "prelude and coda": ModelConfig(**SIZES, **MLA, prelude_layers=1, coda_layers=2),
    "plain latent": ModelConfig(**SIZES, **MLA, kv_latent_norm=False),
    "latent reasoning": ModelConfig(**SIZES, **MLA, latent_iterations=2, latent_halting=True),
    "plain latent reasoning": ModelConfig(**SIZES, **MLA, latent_iterations=1, kv_latent_norm=False),
    "linear injection": ModelConfig(**SIZES, **MLA, injection="linear"),
    "step embedding": ModelConfig(**SIZES, **MLA, step_embedding="learned"),
    "mla, head gate": ModelConfig(**SIZES, **MLA, attention_gate="head"),
    "mla, element gate": ModelConfig(**SIZES, **MLA, attention_gate="element"),
    "gqa, element gate": ModelConfig(**SIZES, attention="mha", num_query_groups=2, attention_gate="element"),
    "diagonal injection": ModelConfig(**SIZES, **MLA, injection="diagonal"),
    "mha": ModelConfig(**SIZES, attention="mha", sandwich_norm=False),
    "gqa, biases, norms": ModelConfig(
        **SIZES, attention="mha", num_query_groups=2, head_dim=10, qkv_bias=True, qk_norm=True
    ),
}
EXIT_GATES = {
    "lru": GateConfig(state_size=6),
    "sequence": GateConfig(state_size=6, sequence_level=True),
    "linear": GateConfig(kind="linear"),
    "mlp": GateConfig(kind="mlp", hidden_size=5),
}
CASES = list(itertools.product(MODELS, EXIT_GATES))


@pytest.mark.parametrize(("model", "gate"), CASES)
def test_names_and_shapes_equal_the_reference(model: str, gate: str) -> None:
    shapes = {row.name: row.shape for row in parameters(MODELS[model], EXIT_GATES[gate])}
    assert shapes == reference.parameter_shapes(MODELS[model], EXIT_GATES[gate])


@pytest.mark.parametrize(("model", "gate"), CASES)
def test_names_and_shapes_equal_the_built_model(model: str, gate: str, single_process) -> None:
    built = LoopLM(MODELS[model], EXIT_GATES[gate], single_process)
    shapes = {row.name: row.shape for row in parameters(MODELS[model], EXIT_GATES[gate])}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in built.named_parameters()}


@pytest.mark.parametrize(("model", "gate"), CASES)
def test_a_row_has_as_many_values_as_its_hugging_face_parts(model: str, gate: str) -> None:
    for row in parameters(MODELS[model], EXIT_GATES[gate]):
        parts = sum(torch.Size(shape).numel() for shape in row.hugging_face_parts.values())
        assert row.size == parts == torch.Size(row.shape).numel(), row.name


@pytest.mark.parametrize("model", MODELS)
def test_a_tensor_split_divides_its_dimension(model: str) -> None:
    for row in parameters(MODELS[model], GateConfig()):
        if row.tensor_split is not None:
            assert row.shape[row.tensor_split.dim] % row.tensor_split.units == 0, row.name


@pytest.mark.parametrize("model", MODELS)
def test_splits_are_those_of_megatrons_layers(model: str, single_process: ProcessGroupCollection) -> None:
    built = dict(LoopLM(MODELS[model], GateConfig(), single_process).named_parameters())
    for row in parameters(MODELS[model], GateConfig()):
        split = getattr(built[row.name], "tensor_model_parallel", False)
        assert split == (row.tensor_split is not None), row.name
        if row.tensor_split is not None:
            assert built[row.name].partition_dim == row.tensor_split.dim, row.name


def test_every_key_of_a_variant_is_listed_and_shapes_that_variant_alone() -> None:
    """GATE_KEYS and ATTENTION_KEYS decide which differences between a checkpoint and a run are ignored."""
    listed = {key for keys in GATE_KEYS.values() for key in keys}
    assert listed == {field.name for field in dataclasses.fields(GateConfig)} - {"kind"}
    for gate in EXIT_GATES.values():
        before = parameters(MODELS["mla"], gate)
        for key in listed - ({"sequence_level"} if gate.kind != "lru" else set()):  # refused for other gates
            other: Any = not gate.sequence_level if key == "sequence_level" else getattr(gate, key) + 1
            changed = parameters(MODELS["mla"], dataclasses.replace(gate, **{key: other}))
            assert (changed != before) == (key in GATE_KEYS[gate.kind]), (gate.kind, key)
    mla, mha = MODELS["mla"], MODELS["mha"]
    assert foreign_keys(mla) == set(ATTENTION_KEYS["mha"]) and foreign_keys(mha) == set(ATTENTION_KEYS["mla"])
    refused = {"latent_iterations", "latent_halting"}
    for key in foreign_keys(mha) - refused - {"q_lora_rank", "qk_rope_period"}:  # these are null by default
        changed = parameters(dataclasses.replace(mha, **{key: getattr(mha, key) + 8}), GateConfig())
        assert changed == parameters(mha, GateConfig()), key


def test_the_tensor_parallel_size_must_divide_heads_groups_widths_and_vocabulary() -> None:
    heads = {"model.num_attention_heads": 4, "model.ffn_hidden_size": 48, "model.vocab_size": 320}
    assert tensor_parallel_units(MODELS["mla"]) == heads
    assert tensor_parallel_units(MODELS["gqa, biases, norms"]) == heads | {"model.num_query_groups": 2}


@pytest.mark.parametrize(("model", "gate"), CASES)
def test_weight_decay_excludes_vectors_and_the_gate(model: str, gate: str, single_process) -> None:
    built = LoopLM(MODELS[model], EXIT_GATES[gate], single_process)
    spared = ("gate.", "injection.", "step_embedding.")
    matrices = {name for name, tensor in built.named_parameters() if tensor.dim() > 1 and not name.startswith(spared)}
    assert decayed_names(MODELS[model], EXIT_GATES[gate]) == matrices


def test_the_number_of_loops_changes_no_parameter_but_the_step_embedding() -> None:
    model, gate = MODELS["mla"], GateConfig()
    assert parameters(model, gate) == parameters(dataclasses.replace(model, num_loops=9), gate)
    for loops in (3, 9):
        counts = parameter_counts(dataclasses.replace(MODELS["step embedding"], num_loops=loops), gate)
        assert counts == {**parameter_counts(model, gate), "step_embedding": 32 * loops}
    assert forward_flops_per_token(MODELS["step embedding"], gate, 64, 3) == forward_flops_per_token(model, gate, 64, 3)


def test_a_tied_head_has_no_parameters_but_as_many_flops() -> None:
    tied, gate = MODELS["query latent, tied"], GateConfig()
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert forward_flops_per_token(tied, gate, 64, 2) == forward_flops_per_token(untied, gate, 64, 2)
    assert parameter_counts(tied, gate)["head"] == 0


def test_an_unknown_kind_is_refused_everywhere(single_process) -> None:
    model, gate = MODELS["mla"], GateConfig()
    with pytest.raises(ValueError, match=r"model\.attention: 'none' is unknown here; known are mla, mha"):
        layer_parameters(dataclasses.replace(model, attention="none"))  # type: ignore[arg-type]  # no such kind
    unknown = dataclasses.replace(gate, kind="none")  # type: ignore[arg-type]  # no such kind
    with pytest.raises(ValueError, match=r"gate\.kind: 'none' is unknown here; known are lru, linear"):
        parameters(model, unknown)
    config = LoopLM(model, gate, single_process).config
    with pytest.raises(ValueError, match=r"gate\.kind: 'none' is unknown here"):
        build_exit_gate(config, unknown)
    assert set(ATTENTIONS) == {"mla", "mha"} and {"lru", "linear"} <= set(GATES)


def test_what_is_not_trained_has_no_backward(single_process):
    model, gate, loops = ModelConfig(**SIZES, attention="mha", coda_layers=1), GateConfig(kind="mlp", hidden_size=8), 3
    forward = forward_flops_per_token(model, gate, 16, loops)
    made = LoopLM(model, gate, single_process).gate
    matrices = sum(weight.numel() for weight in made.parameters() if weight.dim() == 2)

    def training(**loss: Any) -> float:
        return training_flops_per_token(model, gate, LossConfig(**loss), 16, loops)

    no_coda = dataclasses.replace(model, coda_layers=0)
    coda = forward_flops_per_token(model, gate, 16, 1) - forward_flops_per_token(no_coda, gate, 16, 1)
    read_out = coda + 2 * model.vocab_size * model.hidden_size
    assert coda > 0 and training() == 3 * forward
    assert training(objective="adaptive_gate") == forward + 4 * loops * matrices
    assert training(weights="uniform") == 3 * forward - 4 * loops * matrices
    assert training(weights="last") == training(weights="uniform") - 2 * (loops - 1) * read_out
