"""config.json to our configuration and back: nothing is lost or misread, and unsupported models are refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm.config import GateConfig, ModelConfig
from looplm.failures import UserError
from looplm.huggingface import config_json
from looplm.huggingface.config_json import (
    LOOPLM,
    OURO,
    HFDescription,
    TokenIds,
    from_config_json,
    merge_changes,
    ouro_fault,
    read_json,
    to_config_json,
)
from tests.support.ouro_reference import CONFIG
from tests.test_recipes import GATES, MHA, MODELS

IDS = TokenIds(bos=0, eos=(1,), pad=2)
WHERE = Path("x/config.json")
LINEAR = GateConfig(kind="linear")
LOOPLM_ONLY = ("attention", "qkv_bias", "q_lora_rank", "qk_rope_period", "early_exit_gate", "gate_state_size")
# Keys that a config.json has only if they are set.
LEVERS = {
    "prelude_layers": MHA,
    "coda_layers": MHA,
    "loop_norm": MHA,
    "injection": MHA,
    "step_embedding": MHA,
    "attention_gate": MHA,
    "kv_latent_norm": MODELS["mla"],
    "latent_iterations": MODELS["mla"],
    "latent_halting": dataclasses.replace(MODELS["mla"], latent_iterations=2),
}
SET: dict[str, Any] = {"prelude_layers": 2, "coda_layers": 1, "loop_norm": "readout"}
SET |= {"injection": "linear", "step_embedding": "learned", "attention_gate": "element"}
SET |= {"kv_latent_norm": False, "latent_iterations": 3, "latent_halting": True}
LATENT_KEYS = ("kv_latent_norm", "latent_iterations", "latent_halting")  # mha has no latent
# ByteDance/Ouro-1.4B's config.json, as far as it is known. Its special tokens are one token.
RELEASED = CONFIG | {
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "layer_types": ["full_attention"] * 24,
    "max_position_embeddings": 65536,
    "max_window_layers": 24,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "total_ut_steps": 4,
    "vocab_size": 49152,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
del RELEASED["a_key_of_tomorrow"], RELEASED["transformers_version"]


def test_the_released_config_is_read():
    hf_layout, model, gate, gate_trained, ids = from_config_json(RELEASED, {}, WHERE)
    assert (hf_layout, gate, gate_trained, ids) == (OURO, LINEAR, True, TokenIds(0, (0,), 0))
    assert (model.hidden_size, model.ffn_hidden_size, model.num_layers, model.num_loops) == (2048, 5632, 24, 4)
    assert (model.attention, model.query_groups, model.attention_head_dim) == ("mha", 16, 128)
    assert (model.rope_base, model.max_sequence_length, model.norm_eps) == (1e6, 65536, 1e-6)
    assert model.sandwich_norm and not model.tie_embeddings


def test_ouros_layout_is_written_with_the_released_keys_and_values():
    ours = to_config_json(from_config_json(RELEASED, {}, WHERE), torch.bfloat16)
    classes = {key: f"ByteDance/Ouro-1.4B--{name}" for key, name in RELEASED["auto_map"].items()}
    assert ours == RELEASED | {"auto_map": classes}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("config", MODELS)
def test_our_layout_keeps_everything(config, gate):
    description = HFDescription(LOOPLM, MODELS[config], GATES[gate], False, IDS)
    values = json.loads(json.dumps(to_config_json(description, torch.float32)))
    assert from_config_json(values, {}, WHERE) == description
    assert values["model_type"] == "looplm" and values["architectures"] == ["LoopLMForCausalLM"]
    assert values["auto_map"]["AutoModelForCausalLM"] == "modeling_looplm.LoopLMForCausalLM"
    assert values["head_dim"] == (MODELS[config].attention_head_dim if "mla" not in config else None)
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (0, 1, 2)
    assert not values.keys() & LEVERS.keys()


@pytest.mark.parametrize("key", LEVERS)
def test_a_lever_is_written_where_it_is_set(key):
    model = dataclasses.replace(LEVERS[key], **{key: SET[key]})
    description = HFDescription(LOOPLM, model, LINEAR, False, IDS)
    values = json.loads(json.dumps(to_config_json(description, torch.float32)))
    needed = {"latent_iterations"} if key == "latent_halting" else set()
    assert values[key] == SET[key] and values.keys() & LEVERS.keys() == {key} | needed
    assert from_config_json(values, {}, WHERE) == description
    without = to_config_json(description._replace(model=LEVERS[key]), torch.float32)
    assert merge_changes(values, values, without) == without, "an export of what was changed back"


def test_the_rope_base_and_dtype_keys_of_transformers_5():
    values = {key: value for key, value in RELEASED.items() if key not in ("rope_theta", "torch_dtype")}
    values |= {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}, "dtype": "bfloat16"}
    description = from_config_json(values, {}, WHERE)
    assert description.model.rope_base == 5e4
    now = to_config_json(description._replace(model=from_config_json(RELEASED, {}, WHERE).model), torch.float32)
    after = merge_changes(values, to_config_json(description, torch.bfloat16), now)
    assert after["rope_parameters"]["rope_theta"] == after["rope_theta"] == 1e6 and after["dtype"] == "float32"


def test_no_parameters_of_the_rotary_embedding_stay_none():
    values = RELEASED | {"rope_parameters": None}
    then = from_config_json(values, {}, WHERE)
    now = then._replace(model=dataclasses.replace(then.model, rope_base=4e4))
    after = merge_changes(values, to_config_json(then, torch.float32), to_config_json(now, torch.float32))
    assert after["rope_theta"] == 4e4 and after["rope_parameters"] is None


def test_only_what_has_changed_is_changed():
    then = from_config_json(CONFIG, {}, WHERE)
    written = to_config_json(then, torch.float32)
    assert merge_changes(CONFIG, written, written) == CONFIG
    changed = CONFIG | {"total_ut_steps": 2, "rope_theta": 4e4, "num_hidden_layers": 4}
    changed["layer_types"] = ["full_attention"] * 4
    after = merge_changes(CONFIG, written, to_config_json(from_config_json(changed, {}, WHERE), torch.float32))
    assert after == changed | {"max_window_layers": 4} and list(after) == list(CONFIG)


def test_special_tokens_of_generation_have_precedence():
    description = from_config_json(RELEASED, {"eos_token_id": [2, 0], "pad_token_id": 7}, WHERE)
    assert description.ids == TokenIds(0, (2, 0), 7)
    assert description.ids.to_json() == {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 7}


@pytest.mark.parametrize("value", [None, -1, "missing", [], [-1]])
def test_a_token_that_there_is_none_of(value):
    """Older Llama-style configs say -1 for it."""
    for name in ("bos", "eos", "pad"):
        if value in ([], [-1]) and name != "eos":
            continue
        values = RELEASED | {f"{name}_token_id": value}
        if value == "missing":
            del values[f"{name}_token_id"]
        found = from_config_json(values, {}, WHERE).ids
        assert name not in found.known() and f"{name}_token_id" not in found.to_json()


@pytest.mark.parametrize("value", [49152, -2, 1.0, True, "1", [[1]], {"id": 1}])
@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_impossible_id_is_refused_in_the_file_that_has_it(file, name, value):
    key = f"{name}_token_id"
    config, generation = (RELEASED | {key: value}, {}) if file == "config.json" else (RELEASED, {key: value})
    with pytest.raises(UserError) as raised:
        from_config_json(config, generation, WHERE)
    assert str(raised.value).startswith(f"x/{file}: {key}: {value!r} is not allowed" if value != [[1]] else f"x/{file}")
    assert "or null (or -1) for no such token" in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, "model_type: 'llama' is not supported"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": "2048"}, "hidden_size: '2048' is not allowed; it must be a whole number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is not allowed; it must be true or false"),
        ({"rope_theta": "high"}, "rope_theta: 'high' is not allowed; it must be a number"),
        ({"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers: 0 is not supported"),
        ({"num_hidden_layers": 10**12, "layer_types": None}, "num_hidden_layers: 1000000000000 is not supported"),
        ({"num_hidden_layers": "24"}, "num_hidden_layers: '24' is not supported"),
        ({"model_type": ["ouro"]}, "model_type: ['ouro'] is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan is not allowed"),
        ({"rope_theta": float("inf")}, "rope_theta: inf is not allowed"),
        ({"gate_trained": "no"}, "gate_trained: 'no' is not allowed; it must be true or false"),
        ({"layer_types": 24}, "layer_types: 24 is not supported"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling: {'factor': 8.0} is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "rope_parameters: "),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rope_parameters: "),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported; it must be 'silu'"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"mlp_bias": True}, "mlp_bias: True"),
        ({"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ({"use_sliding_window": True}, "use_sliding_window: True"),
        ({"layer_types": ["full_attention"] * 23 + ["sliding_attention"]}, "layer_types: "),
        ({"layer_types": ["full_attention"]}, "layer_types: "),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling: {'type': 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_parameters: {'rope_type': 'linear'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
        ({"tie_word_embeddings": True}, "model.tie_embeddings is true"),
        ({"head_dim": 64}, "model.head_dim times num_attention_heads=16 is 1024, not model.hidden_size=2048"),
        (
            {"eos_token_id": 50000},
            "eos_token_id: 50000 is not allowed; it must be a whole number below",
        ),
        ({"model_type": "looplm", "attention": "linear"}, "attention: 'linear' is not allowed; it must be mla or mha"),
        ({"model_type": "looplm", "early_exit_gate": "gru"}, "early_exit_gate: 'gru' is not allowed"),
        ({"model_type": "looplm", "injection": "sum"}, "injection: 'sum' is not allowed; it must be none or additive"),
        ({"model_type": "looplm", "coda_layers": -1}, "model.coda_layers: -1 is not allowed"),
        ({"model_type": "looplm", "prelude_layers": 10**9}, "model.prelude_layers: 1000000000 is not allowed"),
        ({"model_type": "looplm", "kv_latent_norm": 0}, "kv_latent_norm: 0 is not allowed; it must be true or false"),
    ],
)
def test_unsupported_models_are_refused(changes, words):
    with pytest.raises(UserError) as raised:
        from_config_json(RELEASED | changes, {}, WHERE)
    assert str(raised.value).startswith("x/config.json: ") and words in str(raised.value)
    assert "\n" not in str(raised.value)


KEYS = sorted({*RELEASED, "layer_types", "rope_parameters", "attention_bias", "quantization_config", "gate_trained"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([-1, 0, 1, 2**70]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*KEYS, "factor"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from([*KEYS, *LOOPLM_ONLY, *LEVERS]), JSON, max_size=3),
    generation=st.dictionaries(st.sampled_from(["bos_token_id", "eos_token_id", "pad_token_id"]), JSON, max_size=2),
    hf_layout=st.sampled_from([OURO, LOOPLM]),
)
def test_any_config_is_read_or_refused_in_one_line(changes, generation, hf_layout):
    try:
        found = from_config_json(RELEASED | {"model_type": hf_layout} | changes, generation, WHERE)
    except UserError as error:
        assert str(error).startswith("x/") and "\n" not in str(error)
    else:
        assert from_config_json(to_config_json(found, torch.float32), {}, WHERE) == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b'{"a": "\xe9"}', "can't decode byte 0xe9"),
        (b"{", "cannot be read as JSON in UTF-8"),
        (b"[]", "holds a list, not a JSON object"),
        (b"[" * 10**5, "recursion"),
        (b'{"a": [{"b": 1, "c": 2, "c": 3}]}', r"has the key 'c' twice; get the file again"),
        (b"", "cannot be read as JSON in UTF-8"),
    ],
    ids=repr,
)
def test_files_that_are_no_json(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*{words}"):
        read_json(path)


def test_which_models_fit_ouros_layout():
    assert ouro_fault(MHA, LINEAR) is None
    assert ouro_fault(MODELS["mla"], LINEAR) == "model.attention=mla is not mha"
    assert ouro_fault(MHA, GateConfig()) == "gate.kind=lru is not linear"
    for key, value in SET.items():
        if key not in LATENT_KEYS:
            assert ouro_fault(dataclasses.replace(MHA, **{key: value}), LINEAR) == f"model.{key}={value} is not in it"
    assert ouro_fault(dataclasses.replace(MHA, kv_latent_norm=False), LINEAR) is None
    assert "head_dim" in str(ouro_fault(MODELS["gqa with wide heads"], LINEAR))


def test_our_layout_holds_every_key_of_the_model():
    every = {field.name for field in dataclasses.fields(ModelConfig)}
    assert every == {*config_json._MODEL_KEYS, *config_json._LOOPLM_KEYS, *SET}
