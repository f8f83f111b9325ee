"""A dense Llama- or Qwen-style model, some of whose layers become the shared stack of a looped one.

Its blocks are ours without sandwich norms, its final norm is the loop-end norm. One loop over all of its layers is the
dense model itself, so nothing is lost before the first loop is added (compare arXiv 2410.20672, 2511.07384).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from looplm.checkpoint import About
from looplm.cli import UserError, require
from looplm.config import GateConfig
from looplm.huggingface import companion_files
from looplm.huggingface.config_json import CONFIG, LOOPLM, HFDescription, from_config_json, read_json
from looplm.huggingface.names import entries
from looplm.huggingface.weight_files import StoredTensor, check_shapes, common_dtype, find_tensors, read_tensor
from tools.upcycling.depth import copy_layers
from tools.upcycling.parts import Parts, Source, Upcycled

# What goes without saying in a family's config.json.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
# What stays true of the result, which is no model of the source's family any more.
_CARRIED = (
    companion_files.GENERATION,
    companion_files.TOKENIZER_CONFIG,
    companion_files.SPECIAL_TOKENS,
    "chat_template.jinja",
)


def open_dense(folder: Path, tokenizer: Path | None, eos_token: str | None) -> Source:
    """Take apart a Hugging Face directory: config.json, safetensors, tokenizer.json. No code in it is run.

    Args:
        folder: the directory.
        tokenizer: a tokenizer.json in place of its own.
        eos_token: the token that ends a text, where no file names it.

    Raises:
        UserError: a file is missing or damaged, or the model computes something that ours cannot.
    """
    described = _describe(folder)
    found = _plain(find_tensors(folder), described)
    wanted = [entry for entry in entries(described.model, GateConfig()) if not entry.ours.startswith("gate.")]
    check_shapes(found, {name: shape for entry in wanted for name, shape in entry.theirs.items()}, folder)
    path = tokenizer or folder / companion_files.TOKENIZER
    require(path.is_file(), "tokenizer", str(path), "there is no such file; name the model's tokenizer.json")
    tokens = companion_files.read_tokenizer(path, described.model.vocab_size)
    ids = companion_files.complete_ids(described.ids, folder, tokens)
    eos = tokens.token_to_id(eos_token) if eos_token is not None else ids.eos
    if eos is None:
        raise UserError(f"eos_token: {eos_token!r} is not allowed; name a token of {path} that ends a text")
    weights = {
        entry.ours: entry.join([read_tensor(name, found[name]).float() for name in entry.theirs]) for entry in wanted
    }
    about = About.for_weights(path, eos, ids.bos, ids.pad, gate_trained=False, dtype=common_dtype(found))
    beside = tuple(folder / name for name in _CARRIED if (folder / name).is_file())
    return Source(folder, Parts(described.model, GateConfig(), weights), about, path, beside)


def loop_layers(parts: Parts, layers: str | None, loops: int, gate: GateConfig) -> Upcycled:
    """A looped model of a range of layers, with a fresh gate.

    Args:
        parts: the dense model's.
        layers: FIRST:END, as a Python slice counts them; None takes all.
        loops: of the result.
        gate: its gate.

    Raises:
        UserError: no such layers.
    """
    have = parts.model.num_layers
    chosen = _range(layers, have)
    dropped = have - len(chosen)
    model = replace(parts.model, num_layers=len(chosen), num_loops=loops)
    exact = [f"embedding, head, final norm (now at the end of each loop) and layers {chosen[0]} to {chosen[-1]}"]
    approximate = [f"{dropped} of {have} layers are left out"] if dropped else []
    if loops > 1:
        approximate.append("loops after the first: the stack was never trained on its own output")
    if not approximate:
        exact.append("the function: one loop over all layers is the dense model")
    return Upcycled(Parts(model, gate, copy_layers(parts.weights, list(chosen))), exact, approximate)


def _range(layers: str | None, have: int) -> range:
    first, colon, end = (layers or f"0:{have}").partition(":")
    legal = bool(colon) and all(part == "" or part.isdigit() for part in (first, end))
    chosen = range(int(first or 0), int(end or have)) if legal else range(0)
    fix = f"give FIRST:END, such as {have // 4}:{have - have // 4}, of the source's {have} layers"
    require(len(chosen) > 0 and chosen[-1] < have, "layers", layers, fix)
    return chosen


def _describe(folder: Path) -> HFDescription:
    """The dense model in our terms: our own layout, once it is said what goes without saying in its family."""
    path = folder / CONFIG
    require(path.is_file(), "input", str(folder), f"no {CONFIG} here; give a Hugging Face directory")
    values = read_json(path)
    family = values.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"{path}: model_type: {family!r} is not a dense model that ours can hold; give one of {', '.join(FAMILIES)}")  # fmt: skip
    if family == "mistral" and values.get("sliding_window") is not None:
        raise UserError(f"{path}: sliding_window: {values['sliding_window']!r} is not something our model does; it has null")  # fmt: skip
    said: dict[str, Any] = {
        "model_type": LOOPLM,
        "attention": "mha",
        "sandwich_norm": False,
        "total_ut_steps": 1,
        **FAMILIES[family],
    }
    generation = folder / companion_files.GENERATION
    return from_config_json({**values, **said}, read_json(generation) if generation.is_file() else {}, path)


def _plain(found: Mapping[str, StoredTensor], described: HFDescription) -> dict[str, StoredTensor]:
    """Without what says nothing: tables that are computed, the head's second copy of a tied embedding."""
    tied = {"lm_head.weight"} if described.model.tie_embeddings else set()
    return {
        name: stored for name, stored in found.items() if name not in tied and not name.endswith("rotary_emb.inv_freq")
    }
