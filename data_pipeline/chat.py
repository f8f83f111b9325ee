"""Conversations as documents: messages read from a source's records and checked."""

from collections.abc import Sequence
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from data_pipeline.config import ChatConfig
from looplm.chat import ANSWERS, ROLES, Message
from looplm.cli import UserError

MESSAGES = "messages"  # key of a document's metadata: [role, content] pairs
_ROLE_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}  # the last two are ShareGPT's


def read_conversation(record: dict[str, Any], chat: ChatConfig, where: str) -> list[Message]:
    """Return the messages of a record.

    Args:
        record: a JSON object or a row of a table.
        chat: the keys of its conversation.
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
    prompt = [Message("user", question)] if isinstance(question, str) else _messages(question, where)
    return [*prompt, *_messages([{"role": ANSWERS, "content": answer}], where)]


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: holds {type(value).__name__}, not a list of messages; fix or remove the line")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: message {number} is {type(entry).__name__}, not an object with role and content")
        role, content = (entry.get(key, entry.get(other)) for key, other in (("role", "from"), ("content", "value")))
        if role not in _ROLE_NAMES:
            raise UserError(f"{where}: message {number} has the role {role!r}; give one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: message {number} holds {type(content).__name__}, not text; fix the line")
        messages.append(Message(_ROLE_NAMES[role], content))
    return messages


def as_document(messages: Sequence[Message]) -> dict[str, Any]:
    """Return a document's text and metadata. Length, deduplication and tokenizer training use only the text."""
    text = "\n\n".join(message.content for message in messages)
    return {"text": text or "\n", "metadata": {MESSAGES: [list(message) for message in messages]}}


class AnswerFilter(BaseFilter):
    """Filter that drops conversations without an answer, which would have no token with loss."""

    name = "💬 Answers"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        answered = any(role == ANSWERS and content.strip() for role, content in doc.metadata[MESSAGES])
        return answered or (False, "without_answer")
