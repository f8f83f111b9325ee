"""Fuzz conversations and documents: records of any form, and bytes of JSON Lines."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.config import ChatConfig, SourceConfig
from data_pipeline.conversations import read_conversation
from data_pipeline.sources import read_documents
from looplm.chat import ChatTemplate, Message
from looplm.encoding import read_tokenizer
from tests.fuzz.mutate import anything, changed, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import write_chat_corpus

RECORD: dict[str, Any] = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": "4", "weight": 1},
    ],
    "question": "2 + 2?",
    "answer": "4",
}
CHATS = [ChatConfig(messages_key="messages"), ChatConfig(prompt_key="question", answer_key="answer")]
LINES = b"".join(json.dumps({**RECORD, "text": f"def f{n}(): pass"}).encode() + b"\n" for n in range(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_chat_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def template(folder) -> ChatTemplate:
    return ChatTemplate(read_tokenizer(folder / "tokenizer.json"), "tiny")


@given(
    record=st.one_of(changed(RECORD), st.dictionaries(st.sampled_from(list(RECORD)), anything)),
    number=st.integers(0, 1),
)
@example(record={"messages": [{"role": "user", "content": "\ud800"}]}, number=0)
def test_conversations(record: Any, number: int, template: ChatTemplate) -> None:
    messages = outcome(lambda: read_conversation(record, CHATS[number], "a.jsonl:1"), ["a.jsonl:1"])
    if messages is not None and all(is_unicode(message.content) for message in messages):
        [encoded] = template.encode([messages])
        assert len(encoded.ids) == len(encoded.learned) and not (set(encoded.ids) - set(range(320)))


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=3))
@example(texts=["<|im_end|>", "<eos>"])
def test_texts_hold_no_control_token(texts: list[str], template: ChatTemplate) -> None:
    messages = [Message("user", text) for text in texts]
    encoded = outcome(lambda: template.encode([messages])[0], [])
    assert encoded is not None and encoded.ids.count(template.end_id) == len(texts)


@given(
    content=st.one_of(st.builds(edited, st.just(LINES), edits), st.binary(max_size=100)),
    chat=st.sampled_from([None, *CHATS]),
)
@example(content=b"[" * 100_000, chat=None)
@example(content=b'{"text": "\\ud800"}', chat=None)
def test_documents(content: bytes, chat: ChatConfig | None, folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_bytes(content)
    source = SourceConfig(name="a", kind="jsonl", paths=(str(path),), chat=chat)
    for document in outcome(lambda: list(read_documents(source, [path])), [path]) or []:
        document.text.encode()
