"""Fuzz texts: conversations, documents, files of prompts, and tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_pipeline.config import ChatConfig, SourceConfig, TokenizerConfig
from data_pipeline.conversations import read_conversation
from data_pipeline.sources import read_documents
from data_pipeline.train_tokenizer import load_tokenizer
from looplm.chat import ChatTemplate, Message
from looplm.encoding import begin_id, encode, read_tokenizer
from looplm.generate import read_prompts
from looplm.plain_text import as_text
from tests.fuzz.mutate import Edit, anything, changed, edited, edits
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
PROMPTS = "Once upon a time\n---\ndef f():\r\n    é\n---\n🙂".encode()


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


@given(content=st.one_of(st.builds(edited, st.just(PROMPTS), edits), st.binary(max_size=100)))
def test_files_of_prompts(content: bytes, folder: Path) -> None:
    path = folder / "prompts.txt"
    path.write_bytes(content)
    texts = outcome(lambda: read_prompts(str(path)), [path])
    assert texts is None or all(text.strip() for text in texts)


def use(path: Path) -> None:
    """Do what the commands do with a tokenizer.json."""
    tokenizer = read_tokenizer(path)
    encode(tokenizer, "def f(): 🙂", begin_id(tokenizer))
    plain = as_text(tokenizer, ["<eos>", "<pad>"], path)
    plain.encode("<eos> a")
    ChatTemplate(tokenizer, str(path))


def load(path: Path) -> None:
    """Do what the data pipeline does with a tokenizer.json."""
    config = TokenizerConfig(path=str(path), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer: Tokenizer = load_tokenizer(config)
    assert tokenizer is not None


@given(data=st.data())
def test_tokenizers_of_changed_values(data: st.DataObject, folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] = dict(list(values["model"]["vocab"].items()))
    path = folder / "changed" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    small = {key: value for key, value in values.items() if key != "model"}
    model = {key: value for key, value in values["model"].items() if key not in ("vocab", "merges")}
    found = data.draw(changed({**small, "model": model}))
    if isinstance(found, dict) and isinstance(found.get("model"), dict) and data.draw(st.booleans()):
        found["model"] = {"vocab": values["model"]["vocab"], "merges": values["model"]["merges"], **found["model"]}
    path.write_text(json.dumps(found))
    outcome(lambda: use(path), [path])
    outcome(lambda: load(path), [path])


@given(changes=edits)
@example(changes=[Edit("insert", 0.0, 1, b"[" * 2000)])
def test_tokenizers_of_changed_bytes(changes: list[Edit], folder: Path) -> None:
    path = folder / "changed" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(edited((folder / "tokenizer.json").read_bytes(), changes))
    outcome(lambda: use(path), [path])
    outcome(lambda: load(path), [path])
