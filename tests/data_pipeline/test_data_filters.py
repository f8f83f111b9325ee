"""Quality filters: what they drop, and that they work without a network."""

import socket
from typing import Any

import pytest
from datatrove.data import Document

from data_pipeline.config import SourceConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.filters import AnswerFilter, _content, build_filters
from data_pipeline.languages import check_filters, check_language
from looplm.failures import UserError

GERMAN = (
    "Die Entwicklung der Stadt begann im zwölften Jahrhundert, als Kaufleute an der Furt einen Markt gründeten. "
    "Im Laufe der Zeit wuchs die Siedlung zu einem Handelsplatz heran, der von einer Mauer umgeben war. "
    "Nach dem großen Brand wurde das Rathaus neu errichtet und später um einen Turm erweitert. "
    "Heute ist die Altstadt ein beliebtes Ziel, und viele Häuser stehen unter Denkmalschutz. "
    "Neben dem Tourismus spielt auch die Landwirtschaft noch eine große Rolle."
)
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


@pytest.mark.parametrize("name", ["gopher_quality", "gopher_repetition", "c4", "fineweb_quality"])
def test_filters_judge_by_the_language(name: Any) -> None:
    options: dict[str, Any] = {"filters": (name,), "language": "deu"}
    source = SourceConfig(name="s", kind="text", paths=("x",), **options)
    check_filters(source)
    assert vars(build_filters(source)[-1])["language"] == "deu"
    assert survivors([GERMAN], **options) == [GERMAN]
    assert survivors([GERMAN], filters=(name,)) == ([] if name == "gopher_quality" else [GERMAN])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("gopher_quality", "zho"),  # words of one or two characters
        ("gopher_quality", "sco"),  # split as English
        ("gopher_quality", "fao"),  # without a list
        ("c4", "zho"),
        ("c4", "amh"),
    ],
)
def test_languages_that_a_filter_cannot_judge(name: Any, code: str) -> None:
    source = SourceConfig(name="s", kind="text", paths=("x",), filters=("fineweb_quality", name), language=code)
    with pytest.raises(UserError) as caught:
        check_filters(source)
    refused = f"sources.s.filters: ['fineweb_quality', '{name}'] is not allowed"
    assert str(caught.value) == f"{refused}; {name} cannot judge texts in language='{code}'; leave it out"


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
