"""Quality filters: what they drop, and that they work without a network."""

import socket
from typing import Any

import pytest
from datatrove.data import Document

from data_pipeline.config import SourceConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.filters import AnswerFilter, _content, build_filters, check_language
from looplm.failures import UserError

CODE = "\n".join(f"if x[{index}] == {{'a': {index}}}: y.append(x[{index}])" for index in range(60))


def survivors(texts: list[str], **options: Any) -> list[str]:
    documents = iter([Document(text=text, id=str(index)) for index, text in enumerate(texts)])
    for step in build_filters(SourceConfig(name="s", kind="text", paths=("x",), **options)):
        documents = step.run(documents)
    return [document.text for document in documents]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gopher_quality", "gopher_below_alpha_threshold"),
        ("gopher_repetition", "dup_line_frac"),
        ("c4", "too_few_sentences"),
        ("fineweb_quality", "line_punct_ratio"),
    ],
)
def test_quality_filters_offline(corpus: Any, name: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a filter asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    good = corpus.document(12)
    bad = "\n".join(["the same line of the text that we have with it"] * 40) if "repetition" in name else CODE
    assert survivors([good, bad], filters=(name,)) == [good]
    *_, quality = build_filters(SourceConfig(name="s", kind="text", paths=("x",), filters=(name,)))
    assert quality.filter(Document(text=bad, id="0")) == (False, reason)


def test_length() -> None:
    assert survivors(["a", "abc", "abcdef"], min_chars=2, max_chars=5) == ["abc"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("xyz9", "doesn't have a tokenizer"), ("cmn", "jieba"), ("ben_Latn", "cannot be used|download")],
)
def test_languages_that_cannot_be_split_here(code: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_language(code, "sources.s.language")
    check_language("eng", "sources.s.language")


def test_conversations_with_other_marks_have_other_contents():
    one, two = (
        Document("a b", mark, metadata={MESSAGES: [["user", "a", True], ["assistant", "b", mark == "1"]]})
        for mark in "01"
    )
    assert _content(one) != _content(two)


def test_a_conversation_without_a_learned_answer_is_left_out():
    talk = [["user", "a", True], ["assistant", "b", False]]
    assert AnswerFilter().filter(Document("ab", "1", metadata={MESSAGES: talk})) == (False, "without_answer")
