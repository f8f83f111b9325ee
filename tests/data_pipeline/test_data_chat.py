"""Conversations in the pipeline: every form is read, every fault is one line, marks are written and counted."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models

from data_pipeline import verify
from data_pipeline.config import ChatConfig, SourceConfig, TokenizerConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.manifest import manifest_path
from data_pipeline.sources import check_files, find_files, read_documents
from data_pipeline.synthetic import questions
from data_pipeline.token_file import NO_LOSS, mark, unmark
from data_pipeline.verify import check_prefix
from looplm.chat import SPECIAL_TOKENS, ChatTemplate, Message
from looplm.cli import UserError

TALK = [["system", "Be brief.", True], ["user", "1 + 1?", True], ["assistant", "2", True]]
PLAIN = [{"role": role, "content": content} for role, content, _ in TALK]
SHAREGPT = [
    {"from": names, "value": content} for names, (_, content, _) in zip(("system", "human", "gpt"), TALK, strict=True)
]
UNKNOWN_ROLE = "message 1 has the role 'tool'; give one of system, user, assistant"
WITH_TOKENS = TokenizerConfig(vocab_size=320, special_tokens=SPECIAL_TOKENS)


def source(path: Path, kind: Literal["jsonl", "parquet"] = "jsonl", **chat: Any) -> SourceConfig:
    keys = chat or {"messages_key": "messages"}
    return SourceConfig(name="talk", kind=kind, paths=(str(path),), chat=ChatConfig(**keys))


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read(config: SourceConfig) -> list[Any]:
    files = find_files(config)
    check_files(config, files)
    return [document.metadata[MESSAGES] for document in read_documents(config, files)]


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        ({"messages": PLAIN, "id": 7, "more": 1}, {"messages_key": "messages"}),
        ({"conversations": SHAREGPT}, {"messages_key": "conversations"}),
        ({"q": PLAIN[:2], "a": "2"}, {"prompt_key": "q", "answer_key": "a"}),
    ],
)
def test_every_form_is_read_from_jsonl_and_parquet(tmp_path, record, keys):
    assert read(source(write(tmp_path / "a.jsonl", [record]), **keys)) == [TALK]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "a.parquet")
    assert read(source(tmp_path / "a.parquet", "parquet", **keys)) == [TALK]


def test_a_question_may_be_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "1 + 1?", "output": "2"}])
    assert read(source(path, prompt_key="input", answer_key="output")) == [TALK[1:]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"talk": PLAIN}, "no key 'messages', only talk; name the right one under chat"),
        ({"messages": "hello"}, "holds str, not a list of messages"),
        ({"messages": [*PLAIN, "hello"]}, "message 4 is str, not an object"),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            UNKNOWN_ROLE,
        ),
        ({"messages": [{"content": "x"}]}, "message 1 has the role None"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 holds NoneType, not text"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1 holds a list of str, not text"),
    ],
)
def test_faults_are_named_with_file_and_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [{"messages": PLAIN}, record])
    with pytest.raises(UserError, match=message) as caught:
        read(source(path))
    assert str(caught.value).startswith(f"{path}:2: ") and "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"messages": PLAIN}] * 2)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON"):
        read(source(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "text", "chat": ChatConfig(messages_key="m")}, "sources.s.chat: .*kind=jsonl or parquet"),
        (
            {"kind": "jsonl", "chat": ChatConfig(messages_key="m"), "filters": ("c4",)},
            "sources.s.filters: .*c4 rewrites",
        ),
    ],
)
def test_sources_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SourceConfig(name="s", paths=("x",), **options)


@pytest.mark.parametrize("keys", [{}, {"prompt_key": "a"}, {"messages_key": "m", "answer_key": "a"}])
def test_keys_that_do_not_name_one_form(keys):
    with pytest.raises(UserError, match=r"chat\.messages_key.*give either"):
        ChatConfig(**keys)


def test_unmark_inverts_mark():
    ids, has_loss = unmark(np.array(mark([0, 5, NO_LOSS - 1], [False, True, False]), np.int32))
    assert ids.tolist() == [0, 5, NO_LOSS - 1] and has_loss.tolist() == [False, True, False]


@pytest.fixture
def talks(tmp_path: Path) -> list[list[dict[str, str]]]:
    """Forty conversations, and three without an answer."""
    questions.main(["--output", str(tmp_path / "q.jsonl"), "--count", "40"])
    lines = [json.loads(line)["messages"] for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    lines += [[], PLAIN[:2], [*PLAIN[:2], {"role": "assistant", "content": " "}]]
    write(tmp_path / "talk.jsonl", [{"messages": messages} for messages in lines])
    return lines[:40]


@pytest.mark.slow
def test_conversations_are_written_as_the_template_encodes_them(
    talks: Any, corpus: Any, jsonl: Callable, config: Any, build: Any, tmp_path: Path, capsys: Any
) -> None:
    """Next to a plain source, every conversation is written once, with the template's ids and marks and an eos."""
    sources = (
        source(tmp_path / "talk.jsonl"),
        SourceConfig(name="a", kind="jsonl", paths=(str(jsonl("a", corpus.documents(40, 3))),)),
    )
    output = build(replace(config({"x": tmp_path}, tokenizer=WITH_TOKENS), sources=sources))
    printed = capsys.readouterr().out
    assert "dropped 3 without_answer" in printed
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    template, found = ChatTemplate(tokenizer, "t"), list[list[int]]()
    for split in ("train", "valid"):
        manifest = check_prefix(output / f"talk_{split}", deep=True)
        assert (
            manifest.chat is not None and manifest.chat.template == "chatml" and manifest.chat.end_id == template.end_id
        )
        stored = [np.array(document).tolist() for document in IndexedDataset(str(output / f"talk_{split}"))]
        assert manifest.chat.answer_tokens == sum(token & NO_LOSS == 0 for document in stored for token in document)
        found += stored
        assert f"{manifest.tokens:,} tokens, {manifest.chat.answer_tokens:,} learned" in printed
        assert check_prefix(output / f"a_{split}", deep=True).chat is None
    encoded = template.encode([[Message(**message) for message in messages] for messages in talks])
    assert sorted(found) == sorted(mark([*ids, 1], [*counts, False]) for ids, counts in encoded)
    verify.main([str(output / "talk_train"), "--deep"])
    assert "conversations" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_finds_a_lost_mark_and_an_id_under_a_mark(talks: Any, config: Any, build: Any, tmp_path: Path) -> None:
    made = (source(tmp_path / "talk.jsonl"),)
    output = build(replace(config({"x": tmp_path}, tokenizer=WITH_TOKENS), sources=made))
    path = manifest_path(output / "talk_train")
    values = json.loads(path.read_text())
    for change, message in (
        ({"chat": {**values["chat"], "answer_tokens": 5}}, r"marks \d+ tokens as learned, the manifest says 5"),
        ({"vocab_size": 200}, r"holds token id \d+, the vocabulary has 200"),
        ({"chat": None}, r"holds token id 10737\d+"),
    ):
        path.write_text(json.dumps({**values, **change}))
        with pytest.raises(UserError, match=message):
            check_prefix(output / "talk_train", deep=True)


def test_a_tokenizer_without_the_template_is_refused_in_one_line(
    talks: Any, config: Any, build: Any, tmp_path: Path
) -> None:
    made = (source(tmp_path / "talk.jsonl"),)
    with pytest.raises(UserError, match=r"tokenizer\.special_tokens: \[\] is not allowed; sources\.talk\.chat needs"):
        replace(config({"x": tmp_path}), sources=made)
    Tokenizer(models.WordLevel({"<unk>": 0, "<|eos|>": 1, "<|pad|>": 2}, unk_token="<unk>")).save(
        str(tmp_path / "t.json")
    )
    given = config({"x": tmp_path}, tokenizer=TokenizerConfig(path=str(tmp_path / "t.json"), bos_token=None))
    given = replace(given, sources=made)
    with pytest.raises(UserError, match=r"tokenizer\.path: .*t\.json: has no token '<\|im_start\|>'") as caught:
        build(given)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("tokens", [("<|eos|>",), ("a", "a"), ("",)])
def test_special_tokens_must_differ(tokens):
    with pytest.raises(UserError, match=r"tokenizer\.special_tokens"):
        TokenizerConfig(vocab_size=320, special_tokens=tokens)
    with pytest.raises(UserError, match="an existing tokenizer has its own"):
        TokenizerConfig(path="t.json", special_tokens=("x",))


def test_questions_are_the_same_for_the_same_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        questions.main(["--output", str(tmp_path / name), "--count", "30", "--seed", str(seed)])
    a, b, c = ((tmp_path / name).read_text() for name in "abc")
    assert a == b != c
    record = json.loads(a.splitlines()[0])
    assert {message["role"] for message in record["messages"]} <= {"system", "user", "assistant"}
    assert record["text"].startswith("Question: ")
    with pytest.raises(UserError, match=r"output: .*cannot be written"):
        questions.main(["--output", str(tmp_path / "a/b")])
