"""Documents as token ids, with what the tokenizer does not know or loses counted.

A tokenizer without an unknown token and without bytes drops the characters that it has no token for. datatrove would
write what is left.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from tokenizers import Encoding, Tokenizer, pre_tokenizers

from data_pipeline.config import TokenizerConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.token_file import mark
from data_pipeline.train_tokenizer import control_names, special_ids
from looplm.chat import TEMPLATE_FILE, TOKENIZER_CONFIG, ChatTemplate, Message
from looplm.failures import UserError
from looplm.imported_template import ImportedTemplate, imported_template
from looplm.plain_text import as_text, control_ids, unknown_token

_ALPHABET, _BYTES = set(pre_tokenizers.ByteLevel.alphabet()), {f"<0x{value:02X}>" for value in range(256)}
_KEEP_ALL = {"ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts"}  # pre-tokenizers
_AS_SPACES = {"Prepend", "Replace"}  # normalizers of SentencePiece, which write spaces as ▁
_REWRITE = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}  # normalizers that change characters and drop none
_AROUND = 20  # characters shown on each side of a lost one


class EncodedDocument(NamedTuple):
    """Token ids as they are stored, how many of them are the unknown token, and how many characters are lost."""

    tokens: list[int]
    unknown: int
    lost: int


class TextEncoder:
    """Encoder of documents, plain text or conversations, for one tokenizer.

    Args:
        tokenizer: it is copied.
        config: names of its control tokens, and whether it may lose characters.
        where: the tokenizer's name in error messages.

    Raises:
        UserError: the tokenizer cannot be used.
    """

    def __init__(self, tokenizer: Tokenizer, config: TokenizerConfig, where: str) -> None:
        self._tokenizer, self._config, self._where = tokenizer, config, where
        settings, names = json.loads(tokenizer.to_str()), control_names(config)
        unknown = unknown_token(settings)
        self._unknown = unknown or ""
        self._unknown_id = tokenizer.token_to_id(self._unknown)
        self._loses_nothing = _loses_nothing(settings)
        self._ids, self._control = special_ids(tokenizer, config), control_ids(tokenizer, names)
        self._text = as_text(tokenizer, names, where)

    def encode_texts(self, documents: Sequence[Document]) -> Iterator[EncodedDocument]:
        """Yield plain texts. A document begins as the tokenizer begins a text, and ends in eos.

        Raises:
            UserError: a document would hold a control token, or characters are lost and may not be.
        """
        begin = [] if self._ids.begin in (None, self._ids.eos) else [self._ids.begin]  # the eos before it is the begin
        for document, encoding in zip(documents, self._encoded(documents), strict=True):
            ids = encoding.ids
            self._refuse_control(document, self._control, ids)
            yield EncodedDocument([*begin, *ids, self._ids.eos], self._unknown_in(ids), self._lost(document, encoding))

    def encode_conversations(self, documents: Sequence[Document]) -> Iterator[EncodedDocument]:
        """Yield conversations with marks on the tokens without loss. Each ends in eos, which has none.

        Raises:
            UserError: as above, or the tokenizer does not fit the chat template.
        """
        encodings = [None] * len(documents) if self._loses_nothing else self._encoded(documents)
        control = (self._control - self.template.mark_ids) | {self._ids.eos}
        conversations = [[Message(*message) for message in document.metadata[MESSAGES]] for document in documents]
        for document, encoding, (ids, learned) in zip(
            documents, encodings, self.template.encode(conversations), strict=True
        ):
            self._refuse_control(document, control, ids)
            lost = 0 if encoding is None else self._lost(document, encoding)
            yield EncodedDocument(mark([*ids, self._ids.eos], [*learned, False]), self._unknown_in(ids), lost)

    @cached_property
    def template(self) -> ChatTemplate | ImportedTemplate:
        """The template of conversations."""
        return open_template(self._tokenizer, self._config, self._where)

    def _encoded(self, documents: Sequence[Document]) -> list[Encoding]:
        encode = self._text.encode_batch_fast if self._loses_nothing else self._text.encode_batch  # fast: no offsets
        return encode([document.text for document in documents], add_special_tokens=False)

    def _refuse_control(self, document: Document, control: frozenset[int], ids: list[int]) -> None:
        if not control.isdisjoint(ids):
            name = self._tokenizer.id_to_token(min(control.intersection(ids)))
            fix = "remove it, or take a tokenizer that does not build it from text"
            raise UserError(
                f"{self._where}: a text of document {document.id} becomes the control token {name!r}; {fix}"
            )

    def _unknown_in(self, ids: list[int]) -> int:
        return 0 if self._unknown_id is None else ids.count(self._unknown_id)

    def _lost(self, document: Document, encoding: Encoding) -> int:
        """Return the number of characters that no token stands for, unless decoding restores them, as spaces often."""
        if self._loses_nothing:
            return 0
        end = lost = first = 0
        for start, stop in [*encoding.offsets, (len(document.text), len(document.text))]:
            first = first if lost or start <= end else end
            lost, end = lost + max(0, start - end), max(end, stop)
        if lost and self._text.decode(encoding.ids, skip_special_tokens=False) == self._known(document.text, encoding):
            return 0
        if lost and not self._config.allow_loss:
            sample = document.text[max(0, first - _AROUND) : first + _AROUND]
            left = self._text.decode(self._text.encode(sample, add_special_tokens=False).ids)
            fix = "take a tokenizer with bytes or an unknown token, or set tokenizer.allow_loss"
            raise UserError(f"{self._where}: loses characters, {sample!r} becomes {left!r}; {fix}")
        return lost

    def _known(self, text: str, encoding: Encoding) -> str:
        """Return the text with the name of the unknown token in place of what it stands for."""
        for token, (start, stop) in reversed(list(zip(encoding.ids, encoding.offsets, strict=True))):
            if token == self._unknown_id:
                text = text[:start] + self._unknown + text[stop:]
        return text


def open_template(tokenizer: Tokenizer, config: TokenizerConfig, where: str) -> ChatTemplate | ImportedTemplate:
    """Return the template in which conversations are packed; ``where`` is the tokenizer's name in messages.

    Raises:
        UserError: the tokenizer does not fit ChatML, or ``tokenizer.chat_template`` holds no usable template.
    """
    if config.chat_template is None:
        return ChatTemplate(tokenizer, where)
    folder = Path(config.chat_template)
    names = {"bos_token": config.bos_token, "eos_token": config.eos_token, "pad_token": config.pad_token}
    imported = imported_template(folder, tokenizer, names)
    if imported is not None:
        return imported
    if not template_files(config):
        fix = f"name a folder with a {TEMPLATE_FILE}, or with a {TOKENIZER_CONFIG} that has one"
        raise UserError(f"tokenizer.chat_template: {config.chat_template!r} holds no chat template; {fix}")
    return ChatTemplate(tokenizer, where)


def template_files(config: TokenizerConfig) -> list[Path]:
    """Return the files of ``tokenizer.chat_template`` on which the packing of conversations depends."""
    folder = config.chat_template
    names = (TEMPLATE_FILE, TOKENIZER_CONFIG)
    return [] if folder is None else [path for name in names if (path := Path(folder) / name).is_file()]


def rewriting(tokenizer: Tokenizer) -> str:
    """Return the names of the normalizers that change a text so that decoding does not restore it."""
    found = (part["type"] for part in _steps(json.loads(tokenizer.to_str())["normalizer"], "normalizers"))
    return ", ".join(name for name in found if name not in _AS_SPACES)


def _loses_nothing(settings: dict[str, Any]) -> bool:
    """Return True if every character surely becomes tokens, because every byte has one; if False, it may yet be so."""
    model, splits = settings["model"], list(_steps(settings["pre_tokenizer"], "pretokenizers"))
    kept = all(part["type"] in _KEEP_ALL and part.get("behavior") != "Removed" for part in splits)
    for part in _steps(settings["normalizer"], "normalizers"):
        as_spaces = part["type"] == "Prepend" or (part["type"] == "Replace" and part["content"])
        kept = kept and (as_spaces or part["type"] in _REWRITE)
    vocabulary = set(model["vocab"] if isinstance(model["vocab"], dict) else (piece for piece, _ in model["vocab"]))
    in_bytes = any(part["type"] == "ByteLevel" for part in splits) and vocabulary >= _ALPHABET
    return bool(kept and (in_bytes or (model.get("byte_fallback") and vocabulary >= _BYTES)))


def _steps(part: Any, inner: str) -> Iterator[dict[str, Any]]:
    """Yield the normalizers or pre-tokenizers of a tokenizer.json, out of their sequences."""
    if part is not None and part["type"] == "Sequence":
        for step in part[inner]:
            yield from _steps(step, inner)
    elif part is not None:
        yield part
