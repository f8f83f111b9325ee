"""ChatML, the chat template of SmolLM2 and Ouro: conversations as token ids, with a mask of the tokens to be learned.

::

    <|im_start|>user          a message: its role on the first line, then its content
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>               learned: everything after "assistant" and its newline, including <|im_end|>

The header of an answer is encoded separately from the answer, as it is when a model continues from it. Special tokens
that appear inside a message's content are treated as text.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from looplm.cli import UserError

NAME = "chatml"
START, END = SPECIAL_TOKENS = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"  # the role whose messages are learned
TEMPLATE_FILE = "chat_template.jinja"  # transformers looks for this file beside the weights
JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Message(NamedTuple):
    """One turn of a conversation; the role is one of :data:`ROLES`."""

    role: str
    content: str


class Encoded(NamedTuple):
    """A conversation as token ids, each with True if it is to be learned."""

    ids: list[int]
    learned: list[bool]


class _Piece(NamedTuple):
    """A special token by its name, or text that is encoded by itself."""

    text: str
    special: bool = False
    learned: bool = False


_ANSWER_HEADER = [_Piece(START, special=True), _Piece(f"{ANSWERS}\n")]


class ChatTemplate:
    """ChatML for one tokenizer.

    Args:
        tokenizer: it is copied; the copy treats special tokens in its input as text.
        where: the tokenizer's name in the error message.

    Raises:
        UserError: the tokenizer lacks a token of the template.
    """

    def __init__(self, tokenizer: Tokenizer, where: str | Path) -> None:
        self.tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()  # a tokenizer.json may carry settings of the model it was made for
        self.tokenizer.no_padding()
        self._ids = special_ids(tokenizer, where)
        self.end_id = self._ids[END]

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

    def _encode(self, conversations: list[list[_Piece]]) -> list[Encoded]:
        texts = [piece.text for pieces in conversations for piece in pieces if not piece.special]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        results = []
        for pieces in conversations:
            ids, learned = list[int](), list[bool]()
            for piece in pieces:
                new = [self._ids[piece.text]] if piece.special else next(encoded).ids
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
    answer = message.role == ANSWERS
    if answer:
        yield from [*_ANSWER_HEADER, _Piece(message.content, learned=True)]
    else:
        yield from [_Piece(START, special=True), _Piece(f"{message.role}\n{message.content}")]
    yield from _closing(learned=answer)


def _closing(learned: bool) -> list[_Piece]:
    return [_Piece(END, special=True, learned=learned), _Piece("\n")]
