"""Conversations as documents: their messages read and checked, and written as marked tokens."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.utils.batching import batched

from data_pipeline.config import ChatConfig
from data_pipeline.loss_marks import mark
from looplm.chat import ANSWERS, ROLES, ChatTemplate, Message
from looplm.cli import UserError

MESSAGES = "messages"  # key of a document's metadata: [role, content] pairs
_ROLE_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}  # and ShareGPT's


def read_conversation(record: dict[str, Any], chat: ChatConfig, where: str) -> list[Message]:
    """The messages of a record.

    Args:
        record: a JSON object or a row.
        chat: where its conversation stands.
        where: FILE:LINE, for error messages.

    Raises:
        UserError: not a list of messages, an unknown role, or content that is not text.
    """
    for key in chat.keys:
        if key not in record:
            found = ", ".join(map(str, record))
            raise UserError(f"{where}: no key {key!r}, only {found}; name the right one under chat")
    if chat.messages_key is not None:
        return _messages(record[chat.messages_key], where)
    question, answer = (record[key] for key in chat.keys)
    asked = [Message("user", question)] if isinstance(question, str) else _messages(question, where)
    return [*asked, *_messages([{"role": ANSWERS, "content": answer}], where)]


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: holds {type(value).__name__}, not a list of messages; mend or remove the line")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: message {number} is {type(entry).__name__}, not an object with role and content")
        role, content = (entry.get(key, entry.get(other)) for key, other in (("role", "from"), ("content", "value")))
        if role not in _ROLE_NAMES:
            raise UserError(f"{where}: message {number} has the role {role!r}; give one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: message {number} holds {type(content).__name__}, not text; mend the line")
        messages.append(Message(_ROLE_NAMES[role], content))
    return messages


def as_document(messages: Sequence[Message]) -> dict[str, Any]:
    """A document's text and metadata: length, duplicates and a tokenizer's training go by the text."""
    text = "\n\n".join(message.content for message in messages)
    return {"text": text or "\n", "metadata": {MESSAGES: [list(message) for message in messages]}}


class AnswerFilter(BaseFilter):
    """Drops, and so counts, conversations in which nothing is answered: there is nothing to learn from them."""

    name = "💬 Answers"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        answered = any(role == ANSWERS and content.strip() for role, content in doc.metadata[MESSAGES])
        return answered or (False, "without_answer")


def write_conversations(
    documents: Iterable[Document], shard: MegatronTokenizedFile, template: ChatTemplate, eos_id: int, batch_size: int
) -> Iterator[int]:
    """Write every conversation, ended by eos, into ``shard``; yields how many tokens each has."""
    for batch in batched(documents, batch_size):
        conversations = [[Message(*pair) for pair in document.metadata[MESSAGES]] for document in batch]
        for ids, learnt in template.encode(conversations):
            marked = mark([*ids, eos_id], [*learnt, False])
            shard.write(marked)
            yield len(marked)


def starts_with_a_conversation(documents: Iterator[Document]) -> tuple[bool, Iterator[Document]]:
    """Whether the documents of a shard, all of one source, are conversations; and the documents."""
    first = next(documents, None)
    if first is None:
        return False, iter(())
    return MESSAGES in first.metadata, chain([first], documents)
