"""ChatML, the chat template of SmolLM2 and Ouro: conversations as token ids, with a mask of the tokens to be learned.

::

    <|im_start|>user          a message: its role on the first line, then its content
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>               learned: everything after "assistant" and its newline, including <|im_end|>

The header of an answer is encoded separately from the answer, as it is when a model continues from it. Special tokens
that appear inside a message's content are treated as text. A content is a text, or a list of parts of text; nothing
else that a message may hold, such as tool calls, is rendered, and the exported template refuses it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from looplm.encoding import remove_limits
from looplm.failures import UserError
from looplm.plain_text import as_text

NAME = "chatml"
START, END = SPECIAL_TOKENS = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"  # the role whose messages are learned
TEMPLATE_FILE, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"  # where transformers looks for one
_REFUSE = "{{ raise_exception('this template renders %s') }}"
JINJA = (
    "{% if tools %}" + _REFUSE % "no tools" + "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    + _REFUSE
    % "the roles system, user and assistant"
    + "{% endif %}"
    "{% if message['tool_calls'] or message['function_call'] or message['reasoning_content'] %}"
    + _REFUSE
    % "the role and the content of a message, no tool call or reasoning"
    + "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] != 'text' %}" + _REFUSE % "text only" + "{% endif %}{{ part['text'] }}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Contents in whose first characters, line ends and spaces the ways of tokenizers differ.
_PROBES = ("The QUICK fox: 42?", " a  b ", "two\nlines\n", "é", "世界", "", *map(chr, range(33, 127)))


class Message(NamedTuple):
    """One turn of a conversation; the role is one of :data:`ROLES`. An answer is learned unless it says otherwise."""

    role: str
    content: str
    learned: bool = True


class Encoded(NamedTuple):
    """A conversation as token ids, each with True if it is to be learned."""

    ids: list[int]
    learned: list[bool]


class _Piece(NamedTuple):
    """A special token by its name, or text that is encoded by itself, after a special token or other text."""

    text: str
    special: bool = False
    learned: bool = False
    after_text: bool = False


_ANSWER_HEADER = [_Piece(START, special=True), _Piece(f"{ANSWERS}\n")]


class ChatTemplate:
    """ChatML for one tokenizer.

    Args:
        tokenizer: it is copied; the copies treat special tokens in their input as text.
        where: the tokenizer's name in the error message.

    Raises:
        UserError: the tokenizer lacks a token of the template, or would encode the exported template otherwise.
    """

    def __init__(self, tokenizer: Tokenizer, where: str | Path) -> None:
        self._ids = special_ids(tokenizer, where)
        self.end_id, self.mark_ids = self._ids[END], frozenset(self._ids.values())
        text = as_text(tokenizer, SPECIAL_TOKENS, where)
        self._after_special = self._after_text = text
        # A token that reaches across the line end of an answer's header: such a token shows only in the words it holds.
        across = [found[1] for name in tokenizer.get_vocab() if (found := re.search(r"[\nĊ]([!-~].*)", name))]
        contents = [*_PROBES, *(words.replace("Ġ", " ").replace("▁", " ") for words in sorted(across)[:1000])]
        probes = [[Message(role, content) for role in ROLES] for content in contents]
        expected = _rendered_ids(tokenizer, probes)
        if self._ids_of(probes) != expected:  # SentencePiece's way: a space before the first word of a text
            self._after_special, self._after_text = (_without_space(text, schemes) for schemes in _SCHEMES)
            if self._ids_of(probes) != expected:
                fix = "take one whose tokens do not depend on the text around them"
                raise UserError(f"{where}: encodes conversations otherwise than the exported template {NAME}; {fix}")

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Encode complete conversations."""
        return self._encode([[piece for message in messages for piece in _turn(message)] for messages in conversations])

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation so far, up to the point where the model's answer begins."""
        pieces = [piece for message in messages for piece in _turn(message)]
        return self._encode([[*pieces, *_ANSWER_HEADER]])[0].ids

    def close(self) -> list[int]:
        """Return the ids that follow an answer."""
        return self._encode([_closing(learned=False)])[0].ids

    def _ids_of(self, conversations: list[list[Message]]) -> list[list[int]]:
        return [encoded.ids for encoded in self.encode(conversations)]

    def _encode(self, conversations: list[list[_Piece]]) -> list[Encoded]:
        pieces = [piece for conversation in conversations for piece in conversation if not piece.special]
        encoded = {}
        for after_text, tokenizer in ((False, self._after_special), (True, self._after_text)):
            texts = [piece.text for piece in pieces if piece.after_text == after_text]
            encoded[after_text] = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        results = []
        for conversation in conversations:
            ids, learned = list[int](), list[bool]()
            for piece in conversation:
                new = [self._ids[piece.text]] if piece.special else next(encoded[piece.after_text]).ids
                ids += new
                learned += [piece.learned] * len(new)
            results.append(Encoded(ids, learned))
        return results


def special_ids(tokenizer: Tokenizer, where: str | Path) -> dict[str, int]:
    """Return the ids of the template's special tokens.

    Raises:
        UserError: the tokenizer lacks one.
    """
    ids = {token: found for token in SPECIAL_TOKENS if (found := tokenizer.token_to_id(token)) is not None}
    for token in SPECIAL_TOKENS:
        if token not in ids:
            fix = "take a tokenizer that has it, or train one with it in tokenizer.special_tokens"
            raise UserError(f"{where}: has no token {token!r}, which the chat template {NAME} needs; {fix}")
    return ids


def _turn(message: Message) -> Iterator[_Piece]:
    learned = message.role == ANSWERS and message.learned
    if message.role == ANSWERS:
        yield from [*_ANSWER_HEADER, _Piece(message.content, learned=learned, after_text=True)]
    else:
        yield from [_Piece(START, special=True), _Piece(f"{message.role}\n{message.content}")]
    yield from _closing(learned)


def _closing(learned: bool) -> list[_Piece]:
    return [_Piece(END, special=True, learned=learned), _Piece("\n")]


def _rendered_ids(tokenizer: Tokenizer, conversations: list[list[Message]]) -> list[list[int]]:
    """Return the ids of conversations as transformers gives them: the template's text, encoded at once."""
    plain = remove_limits(Tokenizer.from_str(tokenizer.to_str()))
    texts = ["".join(piece.text for message in messages for piece in _turn(message)) for messages in conversations]
    return [found.ids for found in plain.encode_batch(texts, add_special_tokens=False)]


# Metaspace puts a space before the text ("first") or before each text between special tokens ("always", as the others).
_SCHEMES = (("first",), ("first", "always"))


def _without_space(tokenizer: Tokenizer, schemes: tuple[str, ...]) -> Tokenizer:
    """Return a copy that does not put a space before its input, if it does so by one of ``schemes``."""

    def changed(part: Any) -> Any:
        if isinstance(part, list):
            return [changed(inner) for inner in part]
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Metaspace" and part["prepend_scheme"] in schemes:
            return {**part, "prepend_scheme": "never"}
        if part.get("type") == "ByteLevel" and "always" in schemes:
            return {**part, "add_prefix_space": False}
        if part.get("type") == "Prepend" and "always" in schemes:
            return {"type": "Sequence", "normalizers": []}
        return {key: changed(value) for key, value in part.items()}

    settings = json.loads(tokenizer.to_str())
    steps = {name: changed(settings[name]) for name in ("normalizer", "pre_tokenizer")}
    copy = Tokenizer.from_str(json.dumps(settings | steps))
    copy.encode_special_tokens = True
    return copy
