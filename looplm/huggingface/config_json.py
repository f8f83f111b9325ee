"""``config.json`` in our terms, and ours in its: what a Hugging Face directory says of its model.

Two layouts. ``ouro`` is that of the released Ouro models, keys and all: plain or grouped attention, sandwich norms, the
linear gate, a head of its own. ``looplm`` is ours and holds any model; its code travels with it.

A key that would change what the model computes, in a way that ours cannot, is refused. A key that we do not know is
carried: :func:`merge_changes` changes nothing in a ``config.json`` but what has changed since it was read.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from looplm.cli import UserError
from looplm.config import GateConfig, ModelConfig

OURO, LOOPLM = "ouro", "looplm"
CONFIG = "config.json"

# Where a key of ours stands. Both layouts have those of the first table.
_MODEL_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_loops": "total_ut_steps",
    "rope_base": "rope_theta",
    "max_sequence_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "embedding_init_std": "embedding_initializer_range",
}
_OWN_KEYS = {
    "attention": "attention",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "sandwich_norm": "sandwich_norm",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "qk_rope_period": "qk_rope_period",
    "v_head_dim": "v_head_dim",
}
_GATE_KEYS = {"kind": "early_exit_gate", "state_size": "gate_state_size", "sequence_level": "gate_sequence_level"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")  # fmt: skip

# The values with which these keys say nothing that ours would not do; other ones are refused. Absent is as null.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
# Ouro's code is ByteDance's and is not copied here: a config of our own making names its repository.
_OURO_CODE = "ByteDance/Ouro-1.4B--"
_OURO_CLASSES = {
    "AutoConfig": "configuration_ouro.OuroConfig",
    "AutoModel": "modeling_ouro.OuroModel",
    "AutoModelForCausalLM": "modeling_ouro.OuroForCausalLM",
}
_LOOPLM_CLASSES = {
    "AutoConfig": "configuration_looplm.LoopLMConfig",
    "AutoModelForCausalLM": "modeling_looplm.LoopLMForCausalLM",
}


class TokenIds(NamedTuple):
    """Of the special tokens; None where there is none."""

    bos: int | None
    eos: int | None
    pad: int | None


class HFDescription(NamedTuple):
    """What a directory says of its model."""

    layout: str
    model: ModelConfig
    gate: GateConfig
    gate_trained: bool
    ids: TokenIds


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: it is none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no JSON object; get the file again")
    return values


def from_config_json(values: Mapping[str, Any], generation: Mapping[str, Any], where: Path) -> HFDescription:
    """``config.json`` in our terms.

    Args:
        values: of ``config.json``.
        generation: of ``generation_config.json``, whose special tokens go before; empty where there is none.
        where: the file, for messages.

    Raises:
        UserError: it is another model than we have.
    """
    layout = values.get("model_type")
    if layout not in (OURO, LOOPLM):
        raise UserError(f"{where}: model_type: {layout!r} is not a layout that we read; give a directory of ouro or looplm")  # fmt: skip
    for key in _REQUIRED:
        if values.get(key) is None:
            raise UserError(f"{where}: {key}: missing; get the file again")
    _refuse_what_we_cannot(values, where)
    rope = values.get("rope_parameters") or {}  # where transformers 5 writes what 4 wrote beside it
    values = {**values, "rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
    own = layout == LOOPLM
    model_keys = {**_MODEL_KEYS, **_OWN_KEYS} if own else _MODEL_KEYS
    model = _typed(ModelConfig, model_keys, values, where)
    if not own:
        model["attention"] = "mha"
    if model.get("attention") == "mha":  # null where it is the default, as a recipe would have it
        heads = values["num_attention_heads"]
        model["num_query_groups"] = None if model.get("num_query_groups") == heads else model.get("num_query_groups")
        plain = model.get("head_dim") is not None and model["head_dim"] * heads == values["hidden_size"]
        model["head_dim"] = None if plain else model.get("head_dim")
    else:
        model["num_query_groups"] = model["head_dim"] = None
    gate = _typed(GateConfig, _GATE_KEYS, values, where) if own else {"kind": "linear"}
    try:
        shape, its_gate = ModelConfig(**model), GateConfig(**gate)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fault = None if own else ouro_fault(shape, its_gate)
    if fault is not None:
        raise UserError(f"{where}: {fault}; no released model is like that")
    ids = TokenIds(*(_token_id(values, generation, f"{name}_token_id", where) for name in TokenIds._fields))
    return HFDescription(layout, shape, its_gate, bool(values.get("gate_trained", shape.num_loops > 1)), ids)


def ouro_fault(model: ModelConfig, gate: GateConfig) -> str | None:
    """Why a model cannot be in Ouro's layout, in words; None if it can."""
    width = model.num_attention_heads * model.attention_head_dim
    faults = {
        f"model.attention={model.attention} is not mha": model.attention != "mha",
        f"gate.kind={gate.kind} is not linear": gate.kind != "linear",
        "model.sandwich_norm is false": not model.sandwich_norm,
        "model.tie_embeddings is true": model.tie_embeddings,
        "model.qkv_bias is true": model.qkv_bias,
        "model.qk_norm is true": model.qk_norm,
        # vLLM's Ouro does not read head_dim.
        f"model.head_dim times num_attention_heads={model.num_attention_heads} is {width}, not model.hidden_size={model.hidden_size}": width != model.hidden_size,
    }  # fmt: skip
    return next((fault for fault, holds in faults.items() if holds), None)


def to_config_json(described: HFDescription, dtype: torch.dtype) -> dict[str, Any]:
    """The inverse of :func:`from_config_json`: a whole ``config.json``."""
    layout, model, gate, gate_trained, ids = described
    own = layout == LOOPLM
    values: dict[str, Any] = {
        "architectures": ["LoopLMForCausalLM" if own else "OuroForCausalLM"],
        "auto_map": _LOOPLM_CLASSES if own else {key: _OURO_CODE + name for key, name in _OURO_CLASSES.items()},
        "model_type": layout,
        **{theirs: getattr(model, ours) for ours, theirs in _MODEL_KEYS.items()},
        "num_key_value_heads": model.query_groups,
        "head_dim": model.attention_head_dim if model.attention == "mha" else None,
        "hidden_act": "silu",
        "early_exit_threshold": 1.0,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_token_id": value for name, value in ids._asdict().items()},
    }
    if own:
        values |= {theirs: getattr(model, ours) for ours, theirs in _OWN_KEYS.items()}
        values |= {theirs: getattr(gate, ours) for ours, theirs in _GATE_KEYS.items()}
        return values | {"gate_trained": gate_trained}
    if model.embedding_init_std is None:
        del values["embedding_initializer_range"]  # Ouro has no such key
    return values | {
        "attention_dropout": 0.0,
        "layer_types": ["full_attention"] * model.num_layers,
        "max_window_layers": model.num_layers,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    }


def merge_changes(carried: Mapping[str, Any], then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A file that came with imported weights, with what has changed since.

    Args:
        carried: the file's values.
        then: what we would have written when it was read.
        now: what we would write.
    """
    changed = {key: value for key, value in now.items() if key not in then or then[key] != value}
    kept = {key: value for key, value in carried.items() if key in now or key not in then}
    if "rope_theta" in changed and "rope_parameters" in kept:
        kept["rope_parameters"] = {**kept["rope_parameters"], "rope_theta": changed["rope_theta"]}
    if "torch_dtype" in changed and "dtype" in kept:
        kept["dtype"] = changed["torch_dtype"]
    return kept | changed


def _refuse_what_we_cannot(values: Mapping[str, Any], where: Path) -> None:
    for key, allowed in _ONLY.items():
        if values.get(key) not in allowed:
            raise UserError(f"{where}: {key}: {values[key]!r} is not something our model does; it has {allowed[0]!r}")
    kinds = values.get("layer_types") or []
    if set(kinds) - {"full_attention"} or (kinds and len(kinds) != values["num_hidden_layers"]):
        raise UserError(f"{where}: layer_types: {kinds!r} is not something our model does; it has full_attention in each layer")  # fmt: skip
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default" or any(isinstance(part, dict) for part in rope.values()):  # fmt: skip
            raise UserError(f"{where}: {key}: {rope!r} is not something our model does; it scales no rotary positions")


def _typed(cls: type, keys: Mapping[str, str], values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The values of a dataclass of ours that are given, each of its type."""
    hints, found = typing.get_type_hints(cls), dict[str, Any]()
    for field in dataclasses.fields(cls):
        value = values.get(keys.get(field.name, ""))
        if value is None:
            continue
        kinds = [kind for kind in (*typing.get_args(hints[field.name]), hints[field.name]) if isinstance(kind, type)]
        kind = kinds[0] if kinds else str  # a Literal names its strings
        if kind is float and type(value) is int:
            value = float(value)
        choices = [choice for choice in typing.get_args(hints[field.name]) if isinstance(choice, str)]
        if type(value) is not kind or (choices and value not in choices):
            wanted = " or ".join(choices) or {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise UserError(f"{where}: {keys[field.name]}: {value!r} is not allowed; it must be {wanted}")
        found[field.name] = value
    return found


def _token_id(values: Mapping[str, Any], generation: Mapping[str, Any], key: str, where: Path) -> int | None:
    """Of several ends of text the first."""
    found = values.get(key) if generation.get(key) is None else generation[key]
    found = found[0] if isinstance(found, list) and found else found
    limit = values["vocab_size"]
    if found is not None and (type(found) is not int or not 0 <= found < limit):
        raise UserError(f"{where}: {key}: {found!r} is not allowed; give a whole number below vocab_size={limit}")
    return found
