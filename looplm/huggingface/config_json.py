"""``config.json`` of a Hugging Face directory, to and from our configuration.

There are two Hugging Face layouts. ``ouro`` is that of the released Ouro models with all its keys: multi-head or
grouped attention, sandwich norms, the linear gate, an untied head. ``looplm`` is ours, and its code travels with it; it
holds every model.

A key that changes what the model computes, in a way that ours cannot, is refused. An unknown key is kept:
:func:`merge_changes` changes only those entries of a ``config.json`` that have changed since it was read.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from looplm.config import GateConfig, ModelConfig
from looplm.config.model import MAX_DEPTH, foreign_keys
from looplm.failures import UserError
from looplm.json_file import read_object

OURO, LOOPLM = "ouro", "looplm"
CONFIG, GENERATION = "config.json", "generation_config.json"

# Our keys and theirs. Both layouts have the keys of the first table; only looplm has those of the others.
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
_LOOPLM_KEYS = {
    key: key
    for key in (
        *("attention", "qkv_bias", "qk_norm", "sandwich_norm", "residual_gain"),
        *("q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "qk_rope_period", "v_head_dim"),
    )
}
# Written only if they differ from ModelConfig's defaults, so that other models' files stay as they were.
_OPTIONAL_KEYS = (
    *("prelude_layers", "coda_layers", "loop_norm", "injection", "step_embedding"),
    *("attention_gate", "kv_latent_norm", "latent_iterations", "latent_halting"),
)
_GATE_KEYS = {
    field.name: "early_exit_gate" if field.name == "kind" else f"gate_{field.name}"
    for field in dataclasses.fields(GateConfig)
}
_REQUIRED = [
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
]

# Keys that our models cannot vary, with the values they may have; the first is ours. A missing key counts as null.
_FIXED: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_NO_TOKEN = -1  # an id in the configs of older Llama-style models, for a token that does not exist
# Entries of rope_scaling and rope_parameters that scale nothing; rope_theta has its own key.
_PLAIN_ROPE: dict[str, tuple[object, ...]] = {
    "rope_type": ("default", None),
    "type": ("default", None),
    "partial_rotary_factor": (1, None),
}
# Ouro's code is ByteDance's and is not copied here: a config that we write names its repository.
_OURO_CLASSES = {
    "AutoConfig": "ByteDance/Ouro-1.4B--configuration_ouro.OuroConfig",
    "AutoModel": "ByteDance/Ouro-1.4B--modeling_ouro.OuroModel",
    "AutoModelForCausalLM": "ByteDance/Ouro-1.4B--modeling_ouro.OuroForCausalLM",
}
_LOOPLM_CLASSES = {
    "AutoConfig": "configuration_looplm.LoopLMConfig",
    "AutoModelForCausalLM": "modeling_looplm.LoopLMForCausalLM",
}


class TokenIds(NamedTuple):
    """Ids of the special tokens; None or nothing for a token that the tokenizer does not have."""

    bos: int | None
    eos: tuple[int, ...]  # any of them ends a text
    pad: int | None

    def known(self) -> dict[str, list[int]]:
        """Return the ids of each token that there is."""
        each = {"bos": (self.bos,), "eos": self.eos, "pad": (self.pad,)}
        found = {name: [one for one in ids if one is not None] for name, ids in each.items()}
        return {name: ids for name, ids in found.items() if ids}

    def to_json(self) -> dict[str, int | list[int]]:
        """Return the entries of ``config.json``: a list for several ids, as transformers writes them."""
        return {f"{name}_token_id": ids[0] if len(ids) == 1 else ids for name, ids in self.known().items()}


class HFDescription(NamedTuple):
    """The model that a Hugging Face directory describes."""

    hf_layout: str
    model: ModelConfig
    gate: GateConfig
    gate_trained: bool
    ids: TokenIds


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; raise a :class:`UserError` if it contains anything else."""
    return read_object(path, "get the file again")


def from_config_json(values: Mapping[str, Any], generation: Mapping[str, Any], where: Path) -> HFDescription:
    """Return the model that a ``config.json`` describes.

    Args:
        values: content of ``config.json``.
        generation: content of ``generation_config.json``, whose special tokens come first; empty without that file.
        where: path of the file, for messages.

    Raises:
        UserError: the model is not supported.
    """
    hf_layout = values.get("model_type")
    if not isinstance(hf_layout, str) or hf_layout not in (OURO, LOOPLM):
        raise UserError(
            f"{where}: model_type: {hf_layout!r} is not supported; give a directory whose model_type is ouro or looplm"
        )
    for key in _REQUIRED:
        if values.get(key) is None:
            raise UserError(f"{where}: {key}: missing; get the file again")
    _refuse_unsupported(values, where)
    rope = values.get("rope_parameters") or {}  # where transformers 5 writes the base
    values = {**values, "rope_theta": rope.get("rope_theta", values.get("rope_theta"))}
    is_looplm = hf_layout == LOOPLM
    optional = {key: key for key in _OPTIONAL_KEYS}
    model_keys = {**_MODEL_KEYS, **_LOOPLM_KEYS, **optional} if is_looplm else _MODEL_KEYS
    model_values = _read_fields(ModelConfig, model_keys, values, where)
    if not is_looplm:
        model_values["attention"] = "mha"
    groups, head_dim = model_values.pop("num_query_groups", None), model_values.pop("head_dim", None)
    if model_values.get("attention") == "mha":  # null for defaults, as a recipe has it
        heads = values["num_attention_heads"]
        model_values["num_query_groups"] = None if groups == heads else groups
        is_default = head_dim is not None and head_dim * heads == values["hidden_size"]
        model_values["head_dim"] = None if is_default else head_dim
    gate_values = _read_fields(GateConfig, _GATE_KEYS, values, where) if is_looplm else {"kind": "linear"}
    try:
        model, gate = ModelConfig(**model_values), GateConfig(**gate_values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    fault = None if is_looplm else ouro_fault(model, gate)
    if fault is not None:
        raise UserError(f"{where}: {fault}, unlike every released Ouro model; get the file again")
    gate_trained = values.get("gate_trained")
    if gate_trained is not None and type(gate_trained) is not bool:
        raise UserError(f"{where}: gate_trained: {gate_trained!r} is not allowed; it must be true or false")
    gate_trained = model.num_loops > 1 if gate_trained is None else gate_trained
    bos, eos, pad = (_token_ids(values, generation, name, where) for name in TokenIds._fields)
    ids = TokenIds(next(iter(bos), None), eos, next(iter(pad), None))
    return HFDescription(hf_layout, model, gate, gate_trained, ids)


def ouro_fault(model: ModelConfig, gate: GateConfig) -> str | None:
    """Say why a model does not fit Ouro's layout; None if it does."""
    width, absent = model.num_attention_heads * model.attention_head_dim, _first_lever(model)
    faults = {
        f"model.attention={model.attention} is not mha": model.attention != "mha",
        f"gate.kind={gate.kind} is not linear": gate.kind != "linear",
        "model.sandwich_norm is false": not model.sandwich_norm,
        "model.tie_embeddings is true": model.tie_embeddings,
        "model.qkv_bias is true": model.qkv_bias,
        "model.qk_norm is true": model.qk_norm,
        f"{absent} is not in it": absent is not None,
        # vLLM's Ouro does not read head_dim.
        f"model.head_dim times num_attention_heads={model.num_attention_heads} is {width}, "
        f"not model.hidden_size={model.hidden_size}": width != model.hidden_size,
    }
    return next((fault for fault, holds in faults.items() if holds), None)


def _first_lever(model: ModelConfig) -> str | None:
    """Return the first optional key that differs from its default, with its value; None if no key does."""
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    changed = (key for key in _OPTIONAL_KEYS if getattr(model, key) != defaults[key] and key not in foreign_keys(model))
    return next((f"model.{key}={getattr(model, key)}" for key in changed), None)


def to_config_json(description: HFDescription, dtype: torch.dtype) -> dict[str, Any]:
    """Return a complete ``config.json``: the inverse of :func:`from_config_json`."""
    hf_layout, model, gate, gate_trained, ids = description
    is_looplm = hf_layout == LOOPLM
    values: dict[str, Any] = {
        "architectures": ["LoopLMForCausalLM" if is_looplm else "OuroForCausalLM"],
        "auto_map": _LOOPLM_CLASSES if is_looplm else _OURO_CLASSES,
        "model_type": hf_layout,
        **{theirs: getattr(model, ours) for ours, theirs in _MODEL_KEYS.items()},
        "num_key_value_heads": model.query_groups,
        "head_dim": model.attention_head_dim if model.attention == "mha" else None,
        "hidden_act": "silu",
        "early_exit_threshold": 1.0,
        "use_cache": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
        **dict.fromkeys(f"{name}_token_id" for name in TokenIds._fields),
        **ids.to_json(),
    }
    if is_looplm:
        values |= {theirs: getattr(model, ours) for ours, theirs in _LOOPLM_KEYS.items()}
        defaults = {field.name: field.default for field in dataclasses.fields(model)}
        values |= {key: getattr(model, key) for key in _OPTIONAL_KEYS if getattr(model, key) != defaults[key]}
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


def merge_changes(original: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file that came with imported weights, with what has changed since.

    Args:
        original: the values of the file.
        before: what we would have written at the import.
        after: what we would write now.
    """
    changed = {key: value for key, value in after.items() if key not in before or before[key] != value}
    kept = {key: value for key, value in original.items() if key in after or key not in before}
    if "rope_theta" in changed and kept.get("rope_parameters"):
        kept["rope_parameters"] = {**kept["rope_parameters"], "rope_theta": changed["rope_theta"]}
    if "torch_dtype" in changed and "dtype" in kept:
        kept["dtype"] = changed["torch_dtype"]
    return kept | changed


def _refuse_unsupported(values: Mapping[str, Any], where: Path) -> None:
    """Raise if a key says that the model computes something that ours does not."""

    def refuse(key: str, wanted: str) -> typing.NoReturn:
        raise UserError(f"{where}: {key}: {values[key]!r} is not supported; it must be {wanted}")

    for key, allowed in _FIXED.items():
        if values.get(key) not in allowed:
            refuse(key, repr(allowed[0]))
    layers, layer_types = values["num_hidden_layers"], values.get("layer_types")
    if type(layers) is not int or not 0 < layers <= MAX_DEPTH:
        refuse("num_hidden_layers", f"a whole number from 1 to {MAX_DEPTH:,}")
    if layer_types not in (None, [], ["full_attention"] * layers):
        refuse("layer_types", "full_attention for each layer")
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        scaled = not isinstance(rope, dict) or any(
            value not in _PLAIN_ROPE.get(name, (None,)) for name, value in rope.items() if name != "rope_theta"
        )
        if scaled:
            refuse(key, "of type default, without scaled positions")


def _read_fields(cls: type, keys: Mapping[str, str], values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the fields of a dataclass that ``values`` has under the names of ``keys``; check their types."""
    hints, found = typing.get_type_hints(cls), dict[str, Any]()
    type_names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    for field, key in keys.items():
        value = values.get(key)
        if value is None:
            continue
        options = typing.get_args(hints[field]) or (hints[field],)  # of Literal["a", "b"], int | None, or int
        choices = [option for option in options if isinstance(option, str)]
        expected = str if choices else options[0]
        if expected is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        is_finite = not isinstance(value, float) or math.isfinite(value)  # Python's JSON knows NaN and Infinity
        if type(value) is not expected or not is_finite or (choices and value not in choices):
            wanted = " or ".join(choices) or type_names[expected]
            raise UserError(f"{where}: {key}: {value!r} is not allowed; it must be {wanted}")
        found[field] = value
    return found


def _token_ids(values: Mapping[str, Any], generation: Mapping[str, Any], name: str, where: Path) -> tuple[int, ...]:
    """Return the ids of a special token: several if a text may end with any of them; none if they are null or -1."""
    key, limit = f"{name}_token_id", values["vocab_size"]
    found, file = values.get(key), where
    if generation.get(key) is not None:
        found, file = generation[key], where.with_name(GENERATION)
    listed = found if isinstance(found, list) and name == "eos" else [found]
    ids = [value for index, value in enumerate(listed) if value not in (None, _NO_TOKEN, *listed[:index])]
    for value in listed:
        if value in (None, _NO_TOKEN):
            continue
        if type(value) is not int or not 0 <= value < limit:
            wanted = f"a whole number below vocab_size={limit}, or null (or {_NO_TOKEN}) for no such token"
            raise UserError(f"{file}: {key}: {value!r} is not allowed; it must be {wanted}")
    return tuple(ids)
