"""The small files beside the weights: configuration, tokenizer, chat template, ids of the special tokens.

What came with imported weights lies in a checkpoint's ``companions/`` and goes out with them again: to the byte as long
as nothing that it says has changed, else with that change alone.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from looplm.cli import UserError
from looplm.huggingface import config_json
from looplm.huggingface.config_json import CONFIG, LOOPLM, HFDescription, TokenIds, read_json

GENERATION, TOKENIZER, TOKENIZER_CONFIG = "generation_config.json", "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, CARD = "special_tokens_map.json", "README.md"
CODE = tuple(
    sorted((Path(__file__).parent / "export").glob("*_looplm.py"))
)  # what travels inside an export of our own layout
_CARRIED = {".jinja", ".json", ".md", ".model", ".py", ".txt", ""}  # of text; weights in whatever format stay behind


def gather(source: Path, into: Path) -> list[str]:
    """Copy what travels with the weights of ``source`` to a new folder; returns the names of what does not.

    Code is copied like any file. It is not run, here or on the way out. A link is followed inside the directory and in
    Hugging Face's cache, whose files are links to ``blobs``; one that leads elsewhere could fetch anything.
    """
    place = source.resolve()
    roots = (place, place.parent.parent / "blobs")
    written = {TOKENIZER, *(path.name for path in CODE)}  # the tokenizer has its place; our code goes out as it now is
    files = [path for path in sorted(source.iterdir()) if path.name[0] != "." and path.name not in written]
    files = [path for path in files if ".safetensors" not in path.name]
    travels = [path for path in files if path.is_file() and path.suffix in _CARRIED]
    travels = [path for path in travels if any(root in path.resolve().parents for root in roots)]
    into.mkdir()
    for path in travels:
        shutil.copyfile(path, into / path.name)
    return [path.name for path in files if path not in travels]


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A tokenizer.json whose ids the model's embedding holds.

    Raises:
        UserError: it is none, or does not fit.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise UserError(f"{path}: not a tokenizer.json ({error}); name another with --tokenizer") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise UserError(f"{path}: has ids up to {largest}, the model's vocab_size is {vocab_size}; name its own tokenizer with --tokenizer")  # fmt: skip
    return tokenizer


def read_description(folder: Path) -> HFDescription:
    """What ``config.json`` and ``generation_config.json`` say.

    Raises:
        UserError: there is none, or it describes a model that we do not have.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} here; give a Hugging Face directory")
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    return config_json.from_config_json(read_json(folder / CONFIG), generation, folder / CONFIG)


def complete_ids(ids: TokenIds, folder: Path, tokenizer: Tokenizer) -> TokenIds:
    """The ids that a configuration leaves out, from the tokens that ``tokenizer_config.json`` names."""
    path = folder / TOKENIZER_CONFIG
    named = read_json(path) if path.is_file() else {}

    def find(name: str) -> int | None:
        token = named.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return tokenizer.token_to_id(token) if isinstance(token, str) else None

    return TokenIds(*(find(name) if value is None else value for name, value in ids._asdict().items()))


def write_all(
    target: Path, companions: Path, tokenizer: Path, now: HFDescription, dtype: torch.dtype, cast: bool
) -> bool:
    """Everything that stands beside the weights but the card; returns whether ``config.json`` is as it came.

    Args:
        target: folder to write to.
        companions: what came with the weights that the model started from; may not exist.
        tokenizer: a tokenizer.json.
        now: what is written.
        dtype: of the weights written.
        cast: whether it may be another one than when the companions came.
    """
    tokens = Tokenizer.from_file(str(tokenizer))
    then = _described_then(companions, now.layout, tokens)
    same = then is not None and then.ids == now.ids
    ids, tokens_now = _ids(now.ids), _tokens(now.ids, tokens)
    skipped = {CONFIG, GENERATION, TOKENIZER_CONFIG, CARD} | (set() if same else {SPECIAL_TOKENS})
    for path in sorted(companions.glob("*")):
        if path.name not in skipped and (then is not None or path.suffix != ".py"):  # code is of its layout
            shutil.copyfile(path, target / path.name)
    shutil.copyfile(tokenizer, target / TOKENIZER)

    config = config_json.to_config_json(now, dtype)
    if then is None:
        _write(target / CONFIG, config)
    else:
        before = _dtype_named(companions / CONFIG) if cast else dtype
        _carry(companions / CONFIG, target, config_json.to_config_json(then, before or dtype), config)
    _carry(companions / GENERATION, target, ids if same else {}, ids)
    fresh = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    fresh |= {"model_max_length": now.model.max_sequence_length}
    _carry(companions / TOKENIZER_CONFIG, target, tokens_now if same else {}, tokens_now, fresh)
    if now.layout == LOOPLM:
        for path in CODE:
            shutil.copyfile(path, target / path.name)
    return then is not None and (target / CONFIG).read_bytes() == (companions / CONFIG).read_bytes()


def _described_then(companions: Path, layout: str, tokenizer: Tokenizer) -> HFDescription | None:
    """What the weights that a model started from were; None where they came from nowhere, or in another layout."""
    if not (companions / CONFIG).is_file():
        return None
    then = read_description(companions)
    return then._replace(ids=complete_ids(then.ids, companions, tokenizer)) if then.layout == layout else None


def _dtype_named(config: Path) -> torch.dtype | None:
    values = read_json(config)
    return getattr(torch, str(values.get("torch_dtype") or values.get("dtype")), None)


def _ids(ids: TokenIds) -> dict[str, Any]:
    return {f"{name}_token_id": value for name, value in ids._asdict().items() if value is not None}


def _tokens(ids: TokenIds, tokenizer: Tokenizer) -> dict[str, Any]:
    return {f"{name}_token": tokenizer.id_to_token(i) for name, i in ids._asdict().items() if i is not None}


def _carry(
    carried: Path, target: Path, then: Mapping[str, Any], now: Mapping[str, Any], fresh: Mapping[str, Any] | None = None
) -> None:
    """Write a file anew where none was carried, as it was where it is still true, else with what has changed."""
    if not carried.is_file():
        _write(target / carried.name, {**(fresh or {}), **now})
        return
    before = read_json(carried)
    after = config_json.merge_changes(before, then, now)
    if after == before:
        shutil.copyfile(carried, target / carried.name)
    else:
        _write(target / carried.name, after)


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def names_sharing_an_id(ids: TokenIds) -> Iterable[str]:
    """Names of special tokens that are one token."""
    return [name for name, value in ids._asdict().items() if value is not None and list(ids).count(value) > 1]
