"""Conversations in records: messages with a role and a text, and marks of answers that are not learned.

The chat template renders nothing else. A message that holds more, such as tool calls or an image, is refused unless
``chat.ignore`` names the key: what is dropped without a word is missed only when the model does not have it.
"""

from collections.abc import Mapping
from typing import Any

from data_pipeline.config import ChatConfig
from looplm.chat import ANSWERS, NAME, ROLES, Message
from looplm.failures import UserError

MESSAGES = "messages"  # key of a conversation in a document's metadata: [role, content, learned] lists
_ROLE_KEYS, _CONTENT_KEYS = ("role", "from"), ("content", "value")  # the second ones are ShareGPT's
_ROLE_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}  # the last two are ShareGPT's
_LEARNED, _MASKED = ("weight", "train", "training", "trainable", "loss"), ("masked", "mask")
_UNRENDERED = ("tools", "functions", "system")
MESSAGE_KEYS = (*_ROLE_KEYS, *_CONTENT_KEYS, *_LEARNED, *_MASKED)
_BESIDE = tuple(key for key in (*_LEARNED, *_MASKED) if key != "loss")  # beside messages, that is often a score
RECORD_KEYS = (*_UNRENDERED, *_BESIDE)  # keys beside the messages that say what is in them


def read_conversation(record: Mapping[str, Any], chat: ChatConfig, where: str) -> list[Message]:
    """Return the messages of a record; ``where`` is FILE:LINE, for error messages.

    Raises:
        UserError: not a list of messages, an unknown role, or anything that the chat template does not render.
    """
    for key in chat.keys:
        if key not in record:
            found = ", ".join(map(str, record))
            raise UserError(f"{where}: no key {key!r}, only {found}; name the right one under chat")
    beside = {key: record[key] for key in RECORD_KEYS if key in record and key not in (*chat.keys, *chat.ignore)}
    _refuse({key: beside[key] for key in _UNRENDERED if key in beside}, where)
    if chat.messages_key is not None:
        messages = _messages(record[chat.messages_key], chat, where)
    else:
        question, answer = (record[key] for key in chat.keys)
        asked = [Message("user", question)] if isinstance(question, str) else _messages(question, chat, where)
        messages = [*asked, *_messages([{"role": ANSWERS, "content": answer}], chat, where)]
    learned = _learned(beside, where)
    return [message._replace(learned=False) for message in messages] if learned is False else messages


def _messages(value: object, chat: ChatConfig, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: holds {type(value).__name__}, not a list of messages; fix or remove the line")
    return [_message(entry, chat, f"{where}: message {number}") for number, entry in enumerate(value, start=1)]


def _message(entry: object, chat: ChatConfig, where: str) -> Message:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is {type(entry).__name__}, not an object with role and content")
    values = {key: value for key, value in entry.items() if key not in chat.ignore}
    role_key, content_key = (
        next((key for key in keys if values.get(key) is not None), keys[0]) for keys in (_ROLE_KEYS, _CONTENT_KEYS)
    )
    known = {role_key, content_key, *_LEARNED, *_MASKED}
    _refuse({key: value for key, value in values.items() if key not in known}, where)
    name, content = values.get(role_key), values.get(content_key)
    role = {**_ROLE_NAMES, **chat.role_names}.get(name) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"{where} has the role {name!r}; give one of {', '.join(ROLES)}, or name it in chat.roles")
    text = "".join(_text_of(part, where) for part in content) if isinstance(content, list) else content
    if not isinstance(text, str):
        raise UserError(f"{where} holds {type(content).__name__}, not text; fix the line")
    learned = _learned(values, where)
    if learned and role != ANSWERS:
        raise UserError(f"{where} of the role {name!r} is to be learned; only answers are, remove its mark")
    return Message(role, text, learned is not False)


def _text_of(part: object, where: str) -> str:
    if not isinstance(part, dict):
        raise UserError(f"{where} holds a list of {type(part).__name__}, not text; fix the line")
    kind, text = part.get("type"), part.get("text")
    if kind != "text" or not isinstance(text, str):
        raise UserError(f"{where} has a part of type {kind!r}; only parts of type 'text' are read, remove the line")
    _refuse({key: value for key, value in part.items() if key not in ("type", "text")}, where)
    return text


def _refuse(values: Mapping[str, Any], where: str) -> None:
    """Raise if a value is not empty."""
    for key, value in values.items():
        if value is not None and value not in ("", [], {}):
            fix = "remove it, or name it in chat.ignore"
            raise UserError(f"{where} has {key!r}, which the chat template {NAME} does not render; {fix}")


def _learned(values: Mapping[str, Any], where: str) -> bool | None:
    """Return False for ``"weight": 0``, ``"train": false``, ``"masked": true`` and the like; None without a mark."""
    said = dict[bool, str]()
    for key in (*_LEARNED, *_MASKED):
        value = values.get(key)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            fix = "give 0 or 1, or name it in chat.ignore"
            raise UserError(f"{where} has the {key} {value!r}; a message is learned or not, {fix}")
        said[bool(value) == (key in _LEARNED)] = key
    if len(said) > 1:
        raise UserError(f"{where} is to be learned by {said[True]!r} and not by {said[False]!r}; remove one")
    return next(iter(said), None)
