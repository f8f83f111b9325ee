"""Describe a Hugging Face directory or a checkpoint in a table, without reading its weights."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from looplm import checkpoint
from looplm.checkpoint import COMPANION_FOLDER, WEIGHTS_ONLY, ModelDescription, step_folder
from looplm.checkpoint.contents import stored_tensors
from looplm.config import GateConfig, ModelConfig
from looplm.config.model import GATE_KEYS
from looplm.failures import UserError
from looplm.huggingface.companion_files import read_description
from looplm.huggingface.config_json import CONFIG, TokenIds, ouro_fault
from looplm.huggingface.convert import examine
from looplm.huggingface.weight_files import find_tensors
from looplm.parameters import Shape

Row = tuple[str, str]


def inspect(path: Path) -> str:
    """Return the table of a Hugging Face directory, a training directory, or a step directory."""
    if (path / step_folder.MANIFEST).is_file() or step_folder.of_run(path).is_dir():
        rows = _checkpoint(path)
    elif (path / CONFIG).is_file():
        rows = _hugging_face(path)
    else:
        raise UserError(
            f"{path}: neither a Hugging Face directory ({CONFIG}) nor a checkpoint (manifest.json, checkpoints/); "
            "give one of the two"
        )
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _hugging_face(folder: Path) -> list[Row]:
    description = read_description(folder)
    rows = [("directory", f"{folder}: Hugging Face, layout {description.hf_layout}")]
    rows += _model(description.model, description.gate, description.gate_trained)
    try:
        tensors = find_tensors(folder).values()
        rows.append(("parameters", _counts((stored.shape, stored.dtype) for stored in tensors)))
        files = {stored.path for stored in tensors}
        size = sum(path.stat().st_size for path in files)
        rows.append(("weights", f"{size / 1e6:,.1f} MB in {len(files)} file{'s' if len(files) > 1 else ''}"))
        description = examine(folder).description
        whole = "yes"
    except UserError as error:
        whole = f"no: {error}"
    return [*rows, ("tokens", _ids(description.ids)), ("beside", _names(folder)), ("whole", whole)]


def _checkpoint(path: Path) -> list[Row]:
    faults: list[str] = []
    if (path / step_folder.MANIFEST).is_file():
        fault = step_folder.find_fault(path.resolve())  # a link that the user names is the user's
        step = path if fault is None else None
        faults = [] if fault is None else [fault]
    else:
        step = step_folder.newest(step_folder.of_run(path), faults.append)
    if step is None:
        return [("directory", f"{path}: checkpoint"), ("whole", f"no: {'; '.join(faults) or 'no checkpoint here'}")]
    about, (model, gate) = checkpoint.read_about(step), checkpoint.read_model(step)
    origin = f"{about.objective}, step {about.step}, {about.tokens:,} tokens"
    if about.objective == WEIGHTS_ONLY:
        origin = "weights alone"
    fault = ouro_fault(model, gate)
    return [
        ("directory", f"{step}: checkpoint, {origin}"),
        *_model(model, gate, about.gate_trained),
        ("parameters", _counts(stored_tensors(step, ModelDescription(model, gate)))),
        ("export", f"layout {'ouro' if fault is None else f'looplm ({fault})'}"),
        ("tokens", _ids(TokenIds(about.bos_id, about.eos_ids, about.pad_id))),
        ("beside", _names(step / COMPANION_FOLDER)),
        ("whole", "; ".join(["yes", *faults])),
    ]


def _model(model: ModelConfig, gate: GateConfig, gate_trained: bool) -> list[Row]:
    heads = f"{model.num_attention_heads} heads of {model.attention_head_dim}"
    norms = "sandwich norms" if model.sandwich_norm else "no sandwich norms"
    head = "tied to the embedding" if model.tie_embeddings else "of its own"
    gate_keys = "".join(f", {key} {getattr(gate, key)}" for key in GATE_KEYS[gate.kind])
    if model.injection != "none":
        norms += f", {model.injection} injection"
    if model.step_embedding != "none":
        norms += f", {model.step_embedding} step embedding"
    size = f"{model.depth_summary}, hidden {model.hidden_size:,}"
    positions = f"RoPE base {model.rope_base:,.0f}, {model.max_sequence_length:,} positions"
    return [
        ("model", f"{size}, feed-forward {model.ffn_hidden_size:,}, {norms}"),
        ("attention", f"{model.attention}, {heads}, {model.attention_widths.summary}{_variants(model)}; {positions}"),
        ("head", f"{head}, {model.vocab_size:,} tokens"),
        ("gate", f"{gate.kind}{gate_keys}, {'trained' if gate_trained else 'untrained'}"),
    ]


def _variants(model: ModelConfig) -> str:
    """Return what attention has beside the usual, each part after a comma."""
    gate = {"none": "", "head": ", a gate per head", "element": ", a gate per channel"}[model.attention_gate]
    steps = f", refined in {model.latent_iterations} steps" if model.latent_iterations else ""
    return steps + (" with halting" if model.latent_halting else "") + gate


def _counts(tensors: Iterable[tuple[Shape, torch.dtype]]) -> str:
    """Return the number of parameters, by dtype if there are several."""
    total: Counter[str] = Counter()
    for shape, dtype in tensors:
        total[str(dtype).removeprefix("torch.")] += torch.Size(shape).numel()
    by_dtype = ", ".join(total if len(total) < 2 else (f"{count:,} {dtype}" for dtype, count in total.items()))
    return f"{sum(total.values()):,} ({by_dtype})"


def _ids(ids: TokenIds) -> str:
    known = ids.known()
    return ", ".join(f"{name} {' or '.join(map(str, known.get(name, '-')))}" for name in TokenIds._fields)


def _names(folder: Path) -> str:
    names = sorted(path.name for path in folder.glob("*") if ".safetensors" not in path.name and path.name != CONFIG)
    return ", ".join(names) or "nothing"
