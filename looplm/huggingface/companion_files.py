"""The small files beside the weights: configuration, tokenizer, chat template, special tokens.

Files that came with imported weights are kept in a checkpoint's ``companions/`` and leave with an export: unchanged if
nothing they say has changed, otherwise with that change alone. An export's upcycle.json names no folders.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from looplm.chat import TOKENIZER_CONFIG
from looplm.encoding import open_tokenizer
from looplm.failures import UserError
from looplm.huggingface import config_json
from looplm.huggingface.config_json import CONFIG, GENERATION, LOOPLM, HFDescription, TokenIds, read_json
from looplm.huggingface.weight_files import is_inside
from looplm.json_file import parse_object

TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS, CARD = "special_tokens_map.json", "README.md"
CONVERSIONS = "upcycle.json"  # list that tools.upcycle extends by a record each time
_PATHS = ("source", "output", "checkpoint", "input", "data", "calibrate", "tokenizer")  # keys of its records
# Code that travels inside an export in the looplm layout.
CODE = tuple(sorted((Path(__file__).parent / "export").glob("*_looplm.py")))
Values = Mapping[str, Any]
_CARRIED = {".jinja", ".json", ".md", ".model", ".py", ".txt", ""}  # suffixes of text files; other weights stay behind


def collect(source: Path, into: Path) -> list[str]:
    """Copy the files that travel with the weights of ``source`` to a new folder; return the names of all others.

    Code is copied like any file; it is not run, here or at an export. A link that leads elsewhere is left behind.
    """
    skipped = {TOKENIZER, *(path.name for path in CODE)}  # stored elsewhere; written from the current code
    files = [
        path
        for path in sorted(source.iterdir())
        if path.name[0] != "." and path.name not in skipped and ".safetensors" not in path.name
    ]
    into.mkdir()
    left_behind = []
    for path in files:
        if path.is_file() and path.suffix in _CARRIED and is_inside(path):
            shutil.copyfile(path, into / path.name)
        else:
            left_behind.append(path.name)
    return left_behind


def open_checked_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer in a tokenizer.json; raise a :class:`UserError` unless its ids fit the vocabulary."""
    tokenizer = open_tokenizer(path, "name another with --tokenizer")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab_size:
        raise UserError(
            f"{path}: has ids up to {largest}, but the model's vocab_size is {vocab_size}; "
            "name the model's own tokenizer with --tokenizer"
        )
    return tokenizer


def read_description(folder: Path) -> HFDescription:
    """Return the model described by ``config.json`` and ``generation_config.json``.

    Raises:
        UserError: there is no config.json, or its model is not supported.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} here; give a Hugging Face directory")
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    return config_json.from_config_json(read_json(folder / CONFIG), generation, folder / CONFIG)


def complete_ids(ids: TokenIds, folder: Path, tokenizer: Tokenizer) -> TokenIds:
    """Return the ids with those that are missing looked up by the token names of ``tokenizer_config.json``."""
    path = folder / TOKENIZER_CONFIG
    tokens = read_json(path) if path.is_file() else {}

    def find(name: str) -> int | None:
        token = tokens.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        return tokenizer.token_to_id(token) if isinstance(token, str) else None

    eos = find("eos") if not ids.eos else None
    bos, pad = (find(name) if value is None else value for name, value in (("bos", ids.bos), ("pad", ids.pad)))
    return TokenIds(bos, ids.eos if eos is None else (eos,), pad)


def write(
    target: Path, companions: Path, tokenizer: Path, after: HFDescription, dtype: torch.dtype, may_cast: bool
) -> bool:
    """Write every file beside the weights except the model card; return True if ``config.json`` is unchanged.

    Args:
        target: the folder to write to.
        companions: files that came with the weights that the model started from; may be absent.
        tokenizer: a tokenizer.json.
        after: the model that is exported.
        dtype: dtype of the exported weights.
        may_cast: the imported weights may have had another dtype.
    """
    tokens = Tokenizer.from_file(str(tokenizer))
    before = _imported_description(companions, after.hf_layout, tokens)
    same_ids = before is not None and before.ids == after.ids
    ids, token_names = after.ids.to_json(), _token_names(after.ids, companions, tokens)
    rewritten = {CONFIG, GENERATION, TOKENIZER_CONFIG, CARD} | (set() if same_ids else {SPECIAL_TOKENS})
    for path in sorted(companions.glob("*")):
        # Code belongs to the layout that it came in.
        if path.name not in rewritten and (before is not None or path.suffix != ".py"):
            shutil.copyfile(path, target / path.name)
    shutil.copyfile(tokenizer, target / TOKENIZER)
    records = read_conversions(companions)
    published = [_without_folders(record) for record in records]
    if published != records:  # the folders of whoever converted the model are not published
        _write_json(target / CONVERSIONS, published)

    config = config_json.to_config_json(after, dtype)
    if before is None:
        _write_json(target / CONFIG, config)
    else:
        dtype_before = _stated_dtype(companions / CONFIG) if may_cast else dtype
        _update(companions / CONFIG, target, config_json.to_config_json(before, dtype_before or dtype), config)
    _update(companions / GENERATION, target, ids if same_ids else {}, ids)
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    longest = {"model_max_length": after.model.max_sequence_length}
    told: dict[str, Any] = {**token_names}
    stated = read_json(companions / TOKENIZER_CONFIG) if (companions / TOKENIZER_CONFIG).is_file() else {}
    if before is not None and stated.get("model_max_length") == before.model.max_sequence_length:
        told |= longest  # a limit that was the model's follows it; another one stays
    _update(companions / TOKENIZER_CONFIG, target, {**token_names} if same_ids else {}, told, defaults | longest)
    if after.hf_layout == LOOPLM:
        for path in CODE:
            shutil.copyfile(path, target / path.name)
    return before is not None and (target / CONFIG).read_bytes() == (companions / CONFIG).read_bytes()


def read_conversions(folder: Path) -> list[dict[str, Any]]:
    """Return the records in the ``upcycle.json`` of companions, the first conversion first; none without the file.

    Raises:
        UserError: it holds anything else.
    """
    path, fix = folder / CONVERSIONS, "get the checkpoint again"
    if not path.is_file():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON in UTF-8 ({error}); {fix}") from error
    records = parse_object(f'{{"records": {text}}}', str(path), fix)["records"]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: is not a list of conversions; {fix}")
    return records


def _without_folders(record: Values) -> dict[str, Any]:
    """Return a record of ``upcycle.json`` whose paths are reduced to their last names."""
    reduced = dict(record)
    for key, value in record.items():
        if isinstance(value, dict):
            reduced[key] = _without_folders(value)
        elif key in _PATHS and isinstance(value, str):
            reduced[key] = Path(value).name
    return reduced


def _imported_description(companions: Path, hf_layout: str, tokenizer: Tokenizer) -> HFDescription | None:
    """Return the description that came with the imported weights; None without one, or if its layout differs."""
    if not (companions / CONFIG).is_file():
        return None
    before = read_description(companions)
    ids = complete_ids(before.ids, companions, tokenizer)
    return before._replace(ids=ids) if before.hf_layout == hf_layout else None


def _token_names(ids: TokenIds, companions: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the entries of ``tokenizer_config.json``. It has room for one of the tokens that end a text."""
    path = companions / TOKENIZER_CONFIG
    before = read_json(path) if path.is_file() else {}
    names = dict[str, str]()
    for key, found in ids.known().items():
        texts = [tokenizer.id_to_token(one) for one in found]
        stated = before.get(f"{key}_token")
        stated = stated.get("content") if isinstance(stated, dict) else stated
        if stated in texts or texts[0] is not None:  # an id without a token has no name
            names[f"{key}_token"] = str(stated if stated in texts else texts[0])
    return names


def _stated_dtype(config: Path) -> torch.dtype | None:
    values = read_json(config)
    found = getattr(torch, str(values.get("torch_dtype") or values.get("dtype")), None)
    return found if isinstance(found, torch.dtype) else None


def _update(original: Path, target: Path, before: Values, after: Values, defaults: Values | None = None) -> None:
    """Copy a file to ``target`` if it still holds, otherwise write it with the changes; write a new one if absent."""
    if not original.is_file():
        _write_json(target / original.name, {**(defaults or {}), **after})
        return
    values = read_json(original)
    changed = config_json.merge_changes(values, before, after)
    if changed == values:
        shutil.copyfile(original, target / original.name)
    else:
        _write_json(target / original.name, changed)


def _write_json(path: Path, values: Values | list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def names_sharing_an_id(ids: TokenIds) -> list[str]:
    """Return the names of special tokens whose id another special token has too."""
    known = ids.known()
    return [name for name in known if any(set(known[name]) & set(known[other]) for other in known if other != name)]
