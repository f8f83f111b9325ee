"""A Hugging Face directory into a checkpoint of ours, and back.

::

    config.json, safetensors ──names──▶ LoopLM ──torch_dist──▶ config.yaml, state/       import
    generation_config.json, tokenizer, chat template, code ──▶ companions/               carried, never run

Everything is checked before anything is built; what is written appears whole or not at all. Beside the model, one tensor
is in memory at a time.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer
from torch import Tensor

from looplm import checkpoint
from looplm.checkpoint import COMPANION_FOLDER, WEIGHTS_ONLY, About, OpenedModel, step_folder
from looplm.cli import UserError
from looplm.huggingface import companion_files, weight_files
from looplm.huggingface.companion_files import CARD, TOKENIZER
from looplm.huggingface.config_json import LOOPLM, OURO, HFDescription, TokenIds, ouro_fault
from looplm.huggingface.model_card import model_card
from looplm.huggingface.names import Shape, entries
from looplm.huggingface.weight_files import StoredTensor
from looplm.model import LoopLM

SOURCE_CARD = "README.source.md"  # of the model that training started from


class Source(NamedTuple):
    """A Hugging Face directory that was found sound."""

    folder: Path
    described: HFDescription
    tensors: dict[str, StoredTensor]
    tokenizer: Path


def examine(folder: Path, tokenizer: Path | None = None) -> Source:
    """Check a directory from its headers; no weight is read.

    Args:
        folder: to read.
        tokenizer: a tokenizer.json in place of its own.

    Raises:
        UserError: what is wrong with it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a directory; give the Hugging Face directory that holds config.json")
    described = companion_files.read_description(folder)
    tensors = weight_files.find_tensors(folder)
    weight_files.check_shapes(tensors, tensor_shapes(described), folder)
    path = tokenizer or folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path}: missing; name a tokenizer.json with --tokenizer")
    tokens = companion_files.read_tokenizer(path, described.model.vocab_size)
    described = described._replace(ids=companion_files.complete_ids(described.ids, folder, tokens))
    return Source(folder, described, tensors, path)


def tensor_shapes(described: HFDescription) -> dict[str, Shape]:
    """Every tensor of the directory by name, in the order in which it is written."""
    return {name: shape for entry in entries(described.model, described.gate) for name, shape in entry.theirs.items()}


def with_tokens(source: Source, tokens: dict[str, str | None]) -> Source:
    """Special tokens named by the user, in place of those that the directory names.

    Raises:
        UserError: the tokenizer has no such token, or it is not known which one ends a text.
    """
    tokenizer, ids = Tokenizer.from_file(str(source.tokenizer)), source.described.ids
    for name, token in tokens.items():
        found = None if token is None else tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise UserError(f"{name}_token: {token!r} is not a token of {source.tokenizer}; name one that it has")
        ids = ids if found is None else ids._replace(**{name: found})
    if ids.eos is None:
        raise UserError(f"{source.folder}: no file names the token that ends a text; name it with --eos_token")
    return source._replace(described=source.described._replace(ids=ids))


def import_source(source: Source, final: Path, groups: ProcessGroupCollection) -> list[str]:
    """Write ``final``, a checkpoint of weights alone; returns the names of files that were left behind."""
    _, shape, gate, gate_trained, ids = source.described
    dtype = weight_files.common_dtype(source.tensors)
    assert ids.eos is not None  # with_tokens saw to it
    about = About.for_weights(source.tokenizer, ids.eos, ids.bos, ids.pad, gate_trained, dtype)
    model = LoopLM(shape, gate, groups, dtype, draw=False)
    _read_into(model, source)
    with tempfile.TemporaryDirectory() as place:
        beside = Path(place) / COMPANION_FOLDER
        left = companion_files.gather(source.folder, beside)
        try:
            checkpoint.save_weights(final, model, gate, about, source.tokenizer, beside)
        finally:
            step_folder.discard_partial(final)  # gone already, unless something went wrong
    return left


@torch.no_grad()
def _read_into(model: LoopLM, source: Source) -> None:
    parameters = dict(model.named_parameters())
    for entry in entries(source.described.model, source.described.gate):
        parts = [weight_files.read_tensor(name, source.tensors[name]) for name in entry.theirs]
        parameters[entry.ours].copy_(entry.join(parts))


def choose_layout(asked: str, shape: checkpoint.ModelDescription) -> str:
    """The layout of an export.

    Raises:
        UserError: the model cannot be in the one that is asked for.
    """
    fault = ouro_fault(shape.model, shape.gate)
    if asked == OURO and fault is not None:
        raise UserError(f"layout: 'ouro' does not hold this model ({fault}); give looplm or auto")
    return (OURO if fault is None else LOOPLM) if asked == "auto" else asked


def export_model(opened: OpenedModel, final: Path, layout: str, dtype: torch.dtype | None, limit: int) -> HFDescription:
    """Write ``final``, a Hugging Face directory.

    Args:
        opened: from :func:`looplm.checkpoint.open_model` with the weights' own type.
        final: where to; it must not exist.
        layout: ouro or looplm.
        dtype: of the weights; None for what they are stored in.
        limit: bytes of a file of weights.
    """
    about, beside = opened.about, opened.folder / COMPANION_FOLDER
    ids = TokenIds(about.bos_id, about.eos_id, about.pad_id)
    described = HFDescription(layout, opened.model.model_config, opened.gate, about.gate_trained, ids)
    imported = about.objective == WEIGHTS_ONLY
    written = dtype or next(opened.model.parameters()).dtype
    partial = step_folder.create_partial(final)
    try:
        weight_files.write_tensors(partial, tensor_shapes(described), written, limit, _parts(opened))
        cast = dtype is not None or not imported
        as_it_came = companion_files.write_all(partial, beside, opened.folder / TOKENIZER, described, written, cast)
        carried = beside / CARD
        if carried.is_file():
            shutil.copyfile(carried, partial / (CARD if imported and as_it_came else SOURCE_CARD))
        if not (partial / CARD).is_file():
            (partial / CARD).write_text(model_card(final.name, opened, described, written), encoding="utf-8")
        step_folder.move_into_place(partial, final)
    finally:
        step_folder.discard_partial(final)  # gone already, unless something went wrong
    return described


@torch.no_grad()
def _parts(opened: OpenedModel) -> Iterator[Tensor]:
    parameters = dict(opened.model.named_parameters())
    for entry in entries(opened.model.model_config, opened.gate):
        yield from entry.split(parameters[entry.ours])
