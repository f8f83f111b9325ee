"""Convert a Hugging Face directory to a checkpoint of ours, and back.

::

    config.json, safetensors ──names──▶ LoopLM ──torch_dist──▶ config.yaml, state/       import
    generation_config.json, tokenizer, chat template, code ──▶ companions/               copied, never run

Everything is checked before anything is built, and the output is complete or absent. Memory holds the model and one
more tensor at a time.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer
from torch import Tensor

from looplm import checkpoint
from looplm.checkpoint import COMPANION_FOLDER, WEIGHTS_ONLY, About, OpenedModel, step_folder
from looplm.failures import UserError
from looplm.huggingface import companion_files, weight_files
from looplm.huggingface.companion_files import CARD, TOKENIZER
from looplm.huggingface.config_json import LOOPLM, OURO, HFDescription, TokenIds, ouro_fault
from looplm.huggingface.model_card import model_card
from looplm.huggingface.names import join, split, stored_shapes
from looplm.huggingface.weight_files import StoredTensor
from looplm.model import LoopLM
from looplm.parameters import parameters

SOURCE_CARD = "README.source.md"  # model card of the imported model


class ImportSource(NamedTuple):
    """A Hugging Face directory that has passed every check."""

    folder: Path
    description: HFDescription
    tensors: dict[str, StoredTensor]
    tokenizer: Path


def examine(folder: Path, tokenizer: Path | None = None) -> ImportSource:
    """Check a Hugging Face directory without reading its weights.

    Args:
        folder: the directory.
        tokenizer: a tokenizer.json to use instead of the directory's own.

    Raises:
        UserError: the directory is incomplete, damaged, or holds an unsupported model.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a directory; give the Hugging Face directory that holds config.json")
    description = companion_files.read_description(folder)
    tensors = weight_files.find_tensors(folder)
    weight_files.check_shapes(tensors, stored_shapes(description.model, description.gate), folder)
    path = tokenizer or folder / TOKENIZER
    if not path.is_file():
        raise UserError(f"{path}: missing; name a tokenizer.json with --tokenizer")
    tokens = companion_files.open_checked_tokenizer(path, description.model.vocab_size)
    ids = companion_files.complete_ids(description.ids, folder, tokens)
    return ImportSource(folder, description._replace(ids=ids), tensors, path)


def with_tokens(source: ImportSource, tokens: dict[str, str | None]) -> ImportSource:
    """Replace special tokens by those that the user names.

    Args:
        source: from :func:`examine`.
        tokens: text of the tokens bos, eos and pad; None keeps the token of the directory.

    Raises:
        UserError: the tokenizer has no such token, or the token that ends a text is unknown.
    """
    tokenizer, ids = Tokenizer.from_file(str(source.tokenizer)), source.description.ids
    for name, token in tokens.items():
        found = None if token is None else tokenizer.token_to_id(token)
        if token is not None and found is None:
            raise UserError(f"{name}_token: {token!r} is not a token of {source.tokenizer}; name one that it has")
        if found is not None:
            values: dict[str, Any] = {name: (found,) if name == "eos" else found}
            ids = ids._replace(**values)
    if not ids.eos:
        raise UserError(f"{source.folder}: no file names the token that ends a text; name it with --eos_token")
    return source._replace(description=source.description._replace(ids=ids))


def import_source(source: ImportSource, final: Path, groups: ProcessGroupCollection) -> list[str]:
    """Write the checkpoint ``final`` with weights alone; return the names of files that were left behind."""
    _, model_config, gate, gate_trained, ids = source.description
    dtype = weight_files.common_dtype(source.tensors)
    assert ids.eos  # checked by with_tokens
    about = About.for_weights(source.tokenizer, ids.eos, ids.bos, ids.pad, gate_trained, dtype)
    model = LoopLM(model_config, gate, groups, dtype, initialize=False)
    _read_into(model, source)
    with tempfile.TemporaryDirectory() as folder:
        companions = Path(folder) / COMPANION_FOLDER
        left_behind = companion_files.collect(source.folder, companions)
        try:
            checkpoint.save_weights(final, model, gate, about, source.tokenizer, companions)
        finally:
            step_folder.discard_partial(final)  # exists only after a failure
    return left_behind


@torch.no_grad()
def _read_into(model: LoopLM, source: ImportSource) -> None:
    tensors = dict(model.named_parameters())
    for row in parameters(source.description.model, source.description.gate):
        parts = [weight_files.read_tensor(name, source.tensors[name]) for name in row.hugging_face_parts]
        for name, part in zip(row.hugging_face_parts, parts, strict=True):
            if not part.isfinite().all():
                raise UserError(f"{source.tensors[name].path}: {name} holds values that are not finite; get it again")
        tensors[row.name].copy_(join(row, parts))


def choose_hf_layout(requested: str, found: checkpoint.ModelDescription) -> str:
    """Return the Hugging Face layout of an export; raise a :class:`UserError` if the model does not fit the request."""
    fault = ouro_fault(found.model, found.gate)
    if requested == OURO and fault is not None:
        raise UserError(f"layout: 'ouro' does not hold this model ({fault}); give looplm or auto")
    return (OURO if fault is None else LOOPLM) if requested == "auto" else requested


def export_model(
    opened: OpenedModel, final: Path, hf_layout: str, dtype: torch.dtype | None, limit: int
) -> HFDescription:
    """Write the Hugging Face directory ``final``; return its description.

    Args:
        opened: from :func:`looplm.checkpoint.open_model`, in the dtype of the stored weights.
        final: path of the directory, which must not exist.
        hf_layout: ouro or looplm.
        dtype: dtype of the exported weights; None for that of the stored weights.
        limit: largest size of a weight file in bytes.
    """
    about, companions = opened.about, opened.folder / COMPANION_FOLDER
    model, gate, ids = opened.model.model_config, opened.gate, TokenIds(about.bos_id, about.eos_ids, about.pad_id)
    description = HFDescription(hf_layout, model, gate, about.gate_trained, ids)
    imported = about.objective == WEIGHTS_ONLY
    written = dtype or next(opened.model.parameters()).dtype
    partial = step_folder.create_partial(final)
    try:
        weight_files.write_tensors(partial, stored_shapes(model, gate), written, limit, _parts(opened))
        may_cast = dtype is not None or not imported
        unchanged = companion_files.write(
            partial, companions, opened.folder / TOKENIZER, description, written, may_cast
        )
        if (companions / CARD).is_file():
            shutil.copyfile(companions / CARD, partial / (CARD if imported and unchanged else SOURCE_CARD))
        if not (partial / CARD).is_file():
            (partial / CARD).write_text(model_card(final.name, opened, description, written), encoding="utf-8")
        step_folder.move_into_place(partial, final)
    finally:
        step_folder.discard_partial(final)  # exists only after a failure
    return description


@torch.no_grad()
def _parts(opened: OpenedModel) -> Iterator[Tensor]:
    tensors = dict(opened.model.named_parameters())
    for row in parameters(opened.model.model_config, opened.gate):
        yield from split(row, tensors[row.name])
