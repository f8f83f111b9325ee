"""Convert a dense Llama- or Qwen-style model to a looped one, whose shared stack is some of its layers.

The dense blocks are ours without sandwich norms, and the final norm becomes the loop-end norm. One loop over all layers
is the dense model itself, so nothing is lost before loops are added (compare arXiv 2410.20672, 2511.07384).
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from looplm.bounds import require
from looplm.chat import TEMPLATE_FILE, TOKENIZER_CONFIG
from looplm.checkpoint import About
from looplm.config import GateConfig
from looplm.failures import UserError
from looplm.huggingface import companion_files
from looplm.huggingface.config_json import CONFIG, GENERATION, LOOPLM, HFDescription, from_config_json, read_json
from looplm.huggingface.names import join
from looplm.huggingface.weight_files import check_shapes, common_dtype, find_tensors, is_inside, read_tensor
from looplm.parameters import parameters
from tools.upcycling.model_state import ModelState, Source, Upcycled
from tools.upcycling.structure import copy_layers

# Properties of a family that its config.json does not mention.
FAMILIES = dict[str, dict[str, Any]](llama={}, mistral={}, qwen2={"qkv_bias": True}, qwen3={"qk_norm": True})
# What transformers takes for a missing key, where it is not what we take.
_MISSING: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# Files that are still valid for the result, although it no longer belongs to the source's family.
_CARRIED = (GENERATION, TOKENIZER_CONFIG, companion_files.SPECIAL_TOKENS, TEMPLATE_FILE, "LICENSE")
_READ = (CONFIG, companion_files.TOKENIZER)  # and the weights: what the result is made of


def open_dense(folder: Path, tokenizer: Path | None, eos_token: str | None) -> Source:
    """Read a Hugging Face directory: config.json, safetensors, tokenizer.json. No code in it is executed.

    Args:
        folder: the directory.
        tokenizer: a tokenizer.json instead of the directory's own.
        eos_token: the token that ends a text; needed if no file names it.

    Raises:
        UserError: a file is missing or damaged, or our model cannot compute what this one does.
    """
    described = _describe(folder)
    # Precomputed tables, and the head's copy of a tied embedding, are redundant.
    redundant = ("rotary_emb.inv_freq", *(["lm_head.weight"] if described.model.tie_embeddings else []))
    found = {name: stored for name, stored in find_tensors(folder).items() if not name.endswith(redundant)}
    wanted = [row for row in parameters(described.model, GateConfig()) if row.section != "gate"]
    check_shapes(found, {name: shape for row in wanted for name, shape in row.hugging_face_parts.items()}, folder)
    path = tokenizer or folder / companion_files.TOKENIZER
    require(path.is_file(), "tokenizer", str(path), "there is no such file; name the model's tokenizer.json")
    tokens = companion_files.open_checked_tokenizer(path, described.model.vocab_size)
    ids = companion_files.complete_ids(described.ids, folder, tokens)
    named = None if eos_token is None else tokens.token_to_id(eos_token)
    eos = ids.eos if eos_token is None else () if named is None else (named,)
    if not eos:
        raise UserError(f"eos_token: {eos_token!r} is not allowed; name a token of {path} that ends a text")
    weights = {
        row.name: join(row, [read_tensor(name, found[name]).float() for name in row.hugging_face_parts])
        for row in wanted
    }
    about = About.for_weights(path, eos, ids.bos, ids.pad, gate_trained=False, dtype=common_dtype(found))
    state = ModelState(described.model, GateConfig(), weights)
    own = [path for path in sorted(folder.iterdir()) if path.name[0] != "." and ".safetensors" not in path.name]
    beside = tuple(path for path in own if path.name in _CARRIED and path.is_file() and is_inside(path))
    left_behind = tuple(path.name for path in own if path not in beside and path.name not in _READ)
    return Source(folder, state, about, path, beside, left_behind=left_behind)


def loop_layers(source: ModelState, layers: str | None, loops: int, gate: GateConfig) -> Upcycled:
    """Return a looped model of a range of layers, with a fresh gate.

    Args:
        source: the dense model.
        layers: FIRST:END, counted as in a Python slice; None takes all.
        loops: number of loops.
        gate: configuration of the gate.

    Raises:
        UserError: there are no such layers.
    """
    num_layers = source.config.num_layers
    chosen = parse_range(layers, num_layers)
    dropped = num_layers - len(chosen)
    config = replace(source.config, num_layers=len(chosen), num_loops=loops)
    exact = [f"embedding, head, final norm (now at the end of each loop) and layers {chosen[0]} to {chosen[-1]}"]
    approximate = [f"{dropped} of {num_layers} layers are left out"] if dropped else []
    if loops > 1:
        approximate.append("loops after the first: the stack was never trained on its own output")
    if not approximate:
        exact.append("the function: one loop over all layers is the dense model")
    return Upcycled(ModelState(config, gate, copy_layers(source.weights, list(chosen))), exact, approximate)


def parse_range(layers: str | None, num_layers: int, key: str = "layers") -> range:
    """Return the layers that FIRST:END names, all for None.

    Raises:
        UserError: it names no layers of the model; the message names ``key``.
    """
    first, colon, end = (layers or f"0:{num_layers}").partition(":")
    legal = bool(colon) and all(re.fullmatch("[0-9]{0,6}", part) for part in (first, end))
    chosen = range(int(first or 0), int(end or num_layers)) if legal else range(0)
    quarter = num_layers // 4
    fix = f"give FIRST:END, such as {quarter}:{num_layers - quarter}, of the source's {num_layers} layers"
    require(len(chosen) > 0 and chosen[-1] < num_layers, key, layers, fix)
    return chosen


def _describe(folder: Path) -> HFDescription:
    """Return the dense model's configuration, read as one of ours with the family's properties added."""
    path = folder / CONFIG
    require(path.is_file(), "input", str(folder), f"no {CONFIG} here; give a Hugging Face directory")
    values = read_json(path)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        fix = f"give one of {', '.join(FAMILIES)}"
        raise UserError(f"{path}: model_type: {family!r} is not a dense model that can be converted; {fix}")
    values = _MISSING.get(family, {}) | values
    window = values.get("sliding_window")
    if family == "mistral" and window is not None:
        raise UserError(f"{path}: sliding_window: {window!r} is not supported; it must be null, not missing (4096)")
    ours = {"model_type": LOOPLM, "attention": "mha", "sandwich_norm": False, "total_ut_steps": 1}
    generation = folder / GENERATION
    generation_values = read_json(generation) if generation.is_file() else {}
    return from_config_json({**values, **ours, **FAMILIES[family]}, generation_values, path)
