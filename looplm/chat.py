"""Conversations as text: ChatML, the chat template of SmolLM2 and Ouro, and which of its tokens a model has to learn.

::

    <|im_start|>user          a message: opened, its role on a line, its content, closed
    2 + 2?<|im_end|>
    <|im_start|>assistant
    4<|im_end|>               learnt: what stands after "assistant" and its newline, up to and with <|im_end|>

The header of an answer is encoded apart from the answer, as it is where a model goes on from it. What looks like a special
token inside a content is text.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from looplm.cli import UserError

NAME = "chatml"
START, END = SPECIAL_TOKENS = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")
ANSWERS = "assistant"  # the role whose words are learnt
TEMPLATE_FILE = "chat_template.jinja"  # where transformers looks for it, beside the weights
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
    """A conversation as token ids, and of each whether it is learnt."""

    ids: list[int]
    learnt: list[bool]


class _Piece(NamedTuple):
    """A special token by its name, or a stretch of text that is encoded by itself."""

    text: str
    special: bool = False
    learnt: bool = False


class ChatTemplate:
    """ChatML for one tokenizer.

    Args:
        tokenizer: is copied; the copy takes what looks like a special token for text.
        where: names it in the error message.

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
        """Whole conversations."""
        return self._encode([list(chain.from_iterable(map(_turn, messages))) for messages in conversations])

    def ask(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation so far, up to where the model's answer begins."""
        pieces = [*chain.from_iterable(map(_turn, messages)), *_answer_header()]
        return self._encode([pieces])[0].ids

    def close(self) -> list[int]:
        """The ids that follow an answer."""
        return self._encode([_closing(learnt=False)])[0].ids

    def _encode(self, conversations: list[list[_Piece]]) -> list[Encoded]:
        texts = [piece.text for pieces in conversations for piece in pieces if not piece.special]
        encoded = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        found = []
        for pieces in conversations:
            ids, learnt = list[int](), list[bool]()
            for piece in pieces:
                new = [self._ids[piece.text]] if piece.special else next(encoded).ids
                ids += new
                learnt += [piece.learnt] * len(new)
            found.append(Encoded(ids, learnt))
        return found


def special_ids(tokenizer: Tokenizer, where: str | Path) -> dict[str, int]:
    """The ids of the template's special tokens.

    Raises:
        UserError: the tokenizer lacks one.
    """
    ids = dict[str, int]()
    for token in SPECIAL_TOKENS:
        found = tokenizer.token_to_id(token)
        if found is None:
            fix = "take a tokenizer that has it, or train one with it in tokenizer.special_tokens"
            raise UserError(f"{where}: has no token {token!r}, which the chat template {NAME} needs; {fix}")
        ids[token] = found
    return ids


def _turn(message: Message) -> Iterator[_Piece]:
    answer = message.role == ANSWERS
    if answer:
        yield from _answer_header()
        yield _Piece(message.content, learnt=True)
    else:
        yield _Piece(START, special=True)
        yield _Piece(f"{message.role}\n{message.content}")
    yield from _closing(learnt=answer)


def _answer_header() -> list[_Piece]:
    return [_Piece(START, special=True), _Piece(f"{ANSWERS}\n")]


def _closing(learnt: bool) -> list[_Piece]:
    return [_Piece(END, special=True, learnt=learnt), _Piece("\n")]
