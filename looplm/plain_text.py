"""A tokenizer for text alone: the names of control tokens inside a text stay text.

``tokenizers`` finds the name of an added token in a text and turns it into the token's id, always if the token is not
marked as special. Its models may do the same: a Unigram model made by SentencePiece has ``</s>`` among its pieces. A
document that holds the end of a document by accident would be cut in two.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from looplm.failures import UserError

_HIDDEN = "\0\0control "  # renames a control token of the model to what no text holds


def as_text(tokenizer: Tokenizer, names: Iterable[str | None], where: str | Path) -> Tokenizer:
    """Return a copy that adds nothing, cuts nothing, and treats the names of control tokens as text.

    Args:
        tokenizer: stays as it is.
        names: control tokens besides those that the tokenizer marks as special; None is skipped.
        where: the tokenizer's name in the error message.

    Raises:
        UserError: text would still give the id of a control token.
    """
    settings = json.loads(tokenizer.to_str())
    control = _control_names(tokenizer, names, settings)
    for token in settings["added_tokens"]:
        token["special"] = token["special"] or token["content"] in control
    settings |= {"truncation": None, "padding": None, "post_processor": None}
    copy = _load(settings)
    leaks = {name for name in control if _gives(copy, name, tokenizer)}
    if leaks:
        _hide(settings, leaks)
        try:
            copy = _load(settings)
            leaks = {name for name in control if _gives(copy, name, tokenizer)}
        except Exception:  # the package raises plain Exception, here because a merge needs the token
            pass
    if leaks:
        fix = "take a tokenizer whose model does not build it from text"
        raise UserError(f"{where}: the text {min(leaks)!r} becomes the control token of that name; {fix}")
    return copy


def control_ids(tokenizer: Tokenizer, names: Iterable[str | None]) -> frozenset[int]:
    """Return the ids that no text may hold: those of ``names``, and of all special tokens but the unknown one."""
    control = _control_names(tokenizer, names, json.loads(tokenizer.to_str()))
    return frozenset(found for name in control if (found := tokenizer.token_to_id(name)) is not None)


def _control_names(tokenizer: Tokenizer, names: Iterable[str | None], settings: dict[str, Any]) -> set[str]:
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    named = {name for name in names if name is not None and tokenizer.token_to_id(name) is not None}
    return special - {unknown_token(settings)} | named  # text that the tokenizer does not know is the unknown token


def unknown_token(settings: dict[str, Any]) -> str | None:
    """Return the token for text that the tokenizer does not know, from the content of its tokenizer.json."""
    model = settings["model"]
    if model.get("unk_id") is not None:
        return str(model["vocab"][model["unk_id"]][0])
    name: str | None = model.get("unk_token")
    return name


def _load(settings: dict[str, Any]) -> Tokenizer:
    copy = Tokenizer.from_str(json.dumps(settings))
    copy.encode_special_tokens = True
    return copy


def _gives(copy: Tokenizer, name: str, tokenizer: Tokenizer) -> bool:
    texts, control_id = [name, f"a {name} b", f"a{name}b"], tokenizer.token_to_id(name)
    return any(control_id in found.ids for found in copy.encode_batch(texts, add_special_tokens=False))


def _hide(settings: dict[str, Any], names: set[str]) -> None:
    """Rename ``names`` in the model's vocabulary; their ids and all others stay."""
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in names]
    vocabulary = settings["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {_HIDDEN + name if name in names else name: index for name, index in vocabulary.items()}
    else:  # a Unigram model: pieces with scores
        vocabulary = [[_HIDDEN + name if name in names else name, score] for name, score in vocabulary]
    settings["model"]["vocab"] = vocabulary
    if "merges" in settings["model"]:
        settings["model"]["merges"] = [pair for pair in settings["model"]["merges"] if "".join(pair) not in names]
