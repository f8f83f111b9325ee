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
from datatrove.data import Document
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models

from data_pipeline import verify
from data_pipeline.config import ChatConfig, SourceConfig, TokenizerConfig
from data_pipeline.conversations import MESSAGES, read_conversation
from data_pipeline.manifest import manifest_path
from data_pipeline.sources import check_files, find_files, read_documents
from data_pipeline.synthetic import questions
from data_pipeline.text_encoder import TextEncoder
from data_pipeline.token_file import NO_LOSS, mark, unmark
from data_pipeline.train_tokenizer import train_tokenizer
from data_pipeline.verify import check_prefix
from looplm.chat import SPECIAL_TOKENS, ChatTemplate, Message
from looplm.config import DataConfig, DataSource
from looplm.failures import UserError
from looplm.files import sha256_of
from looplm.imported_template import ImportedTemplate
from pretrain.data import check_corpus
from tests.support.tiny import write_chat_corpus

TALK = [["system", "Be brief.", True], ["user", "1 + 1?", True], ["assistant", "2", True]]
PLAIN = [{"role": role, "content": content} for role, content, _ in TALK]
SHAREGPT = [
    {"from": names, "value": content} for names, (_, content, _) in zip(("system", "human", "gpt"), TALK, strict=True)
]
UNKNOWN_ROLE = "message 1 has the role 'tool'; give one of system, user, assistant"
WITH_TOKENS = TokenizerConfig(vocab_size=320, special_tokens=SPECIAL_TOKENS)


KEYS = ChatConfig(messages_key="messages")


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


def turns(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of TALK, each with its further keys."""
    return [{**message, **change} for message, change in zip(PLAIN, changes or ({},) * 3, strict=True)]


@pytest.mark.promise(
    text="Whatever a message holds beside its text is refused in one line, or dropped because chat.ignore names it",
    expected="FILE:LINE, the message and the key",
)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]),
        ("function_call", {"name": "add"}),
        ("tool_call_id", "call_1"),
        ("name", "Ada"),
        ("reasoning_content", "because"),
        ("images", ["a.png"]),
        ("value", "another text"),
        ("from", "gpt"),
        ("toxic", False),
    ],
)
def test_nothing_in_a_message_is_dropped_without_a_word(tmp_path, key, value, record_property):
    path = write(tmp_path / "a.jsonl", [{"messages": PLAIN}, {"messages": turns({}, {}, {key: value})}])
    wanted = f"a.jsonl:2: message 3 has {key!r}, which the chat template chatml does not render; remove it, or name it"
    with pytest.raises(UserError, match=wanted) as caught:
        read(source(path))
    assert "\n" not in str(caught.value)
    assert read(source(path, messages_key="messages", ignore=(key,))) == [TALK, TALK]
    record_property("seen", str(caught.value).removeprefix(f"{tmp_path}/"))


def test_empty_keys_hold_nothing(tmp_path):
    """As in a table, whose rows have every key that any message has."""
    empty = turns(*[{"tool_calls": None, "name": "", "images": [], "weight": None, "from": None}] * 3)
    path = write(tmp_path / "a.jsonl", [{"messages": empty, "tools": None, "system": ""}])
    assert read(source(path)) == [TALK]
    table = [{"messages": PLAIN, "tools": None}, {"messages": PLAIN, "tools": ["f"]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet:2 has 'tools', which the chat template"):
        read(source(tmp_path / "t.parquet", "parquet"))
    table = [{"messages": PLAIN}, {"messages": turns({}, {}, {"tool_calls": ["f"]})}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "m.parquet")
    with pytest.raises(UserError, match=r"m\.parquet:2: message 3 has 'tool_calls'"):
        read(source(tmp_path / "m.parquet", "parquet"))


@pytest.mark.parametrize(("key", "value"), [("tools", [{"name": "f"}]), ("functions", [1]), ("system", "Be brief.")])
def test_what_stands_beside_the_messages_is_refused(tmp_path, key, value):
    path = write(tmp_path / "a.jsonl", [{"messages": PLAIN, key: value}])
    with pytest.raises(UserError, match=rf"a\.jsonl:1 has '{key}', which the chat template chatml does not render"):
        read(source(path))
    assert read(source(path, messages_key="messages", ignore=(key,))) == [TALK]


def test_parts_of_text_are_joined_and_others_refused(tmp_path):
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1?"}]
    path = write(tmp_path / "a.jsonl", [{"messages": turns({}, {"content": parts}, {})}])
    assert read(source(path)) == [TALK]
    for part, message in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 2 has a part of type 'image_url'; only parts of"),
        ({"type": "text", "text": None}, "message 2 has a part of type 'text'; only parts of"),
        ({"type": "text", "text": "x", "citations": ["a"]}, "message 2 has 'citations', which the chat template"),
    ):
        path = write(tmp_path / "b.jsonl", [{"messages": turns({}, {"content": [*parts, part]}, {})}])
        with pytest.raises(UserError, match=rf"b\.jsonl:1: {message}"):
            read(source(path))


MASKED = [*TALK[:2], [*TALK[2][:2], False]]


@pytest.mark.promise(
    text='A turn with "weight": 0, "train": false or "masked": true is not learned; other weights are refused',
    expected="that answer alone has no loss; 0.5 is one line",
)
@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("weight", 0, 1),
        ("weight", 0.0, 1.0),
        ("train", False, True),
        ("training", False, True),
        ("trainable", False, True),
        ("loss", False, True),
        ("masked", True, False),
        ("mask", 1, 0),
    ],
)
def test_a_turn_may_be_left_unlearned(tmp_path, key, off, on, record_property):
    records = [{"messages": turns({}, {}, {key: value})} for value in (off, on, None)]
    assert read(source(write(tmp_path / "a.jsonl", records))) == [MASKED, TALK, TALK]
    for value in (0.5, "0", 2, [0]):
        path = write(tmp_path / "b.jsonl", [{"messages": turns({}, {}, {key: value})}])
        with pytest.raises(
            UserError, match=rf"b\.jsonl:1: message 3 has the {key} .*; a message is learned or not"
        ) as caught:
            read(source(path))
        assert "\n" not in str(caught.value)
    record_property("seen", "that answer alone has no loss; 0.5 is one line")


@pytest.mark.parametrize(("key", "off"), [("weight", 0), ("train", False), ("trainable", False), ("mask", True)])
def test_a_whole_record_may_be_left_unlearned(tmp_path, key, off):
    (messages,) = read(source(write(tmp_path / "a.jsonl", [{"messages": turns({}, {}, {}), key: off}])))
    assert not any(learned for *_, learned in messages)


def test_marks_that_cannot_be_followed_are_refused(tmp_path):
    for change, message in (
        (({}, {"weight": 1}, {}), "message 2 of the role 'user' is to be learned; only answers are"),
        (({}, {}, {"weight": 0, "masked": False}), "message 3 is to be learned by 'masked' and not by 'weight'"),
    ):
        path = write(tmp_path / "a.jsonl", [{"messages": turns(*change)}])
        with pytest.raises(UserError, match=rf"a\.jsonl:1: {message}"):
            read(source(path))
    marked = {"messages": turns({"weight": 0}, {"train": False}, {"weight": 0})}  # no prompt is learned anyway
    assert [messages[2] for messages in read(source(write(tmp_path / "a.jsonl", [marked])))] == MASKED[2:]
    assert [message[2] for message in read_conversation({"messages": PLAIN, "weight": 0}, KEYS, "w")] == [False] * 3
    with pytest.raises(UserError, match=r"^w has the weight 0\.3; .*chat\.ignore"):
        read_conversation({"messages": PLAIN, "weight": 0.3}, KEYS, "w")


def test_roles_of_other_names_are_read_if_they_are_named(tmp_path):
    path = write(
        tmp_path / "a.jsonl", [{"messages": [{"role": "prompter", "content": "1 + 1?"}, {"from": "bot", "value": "2"}]}]
    )
    with pytest.raises(
        UserError, match=r"message 1 has the role 'prompter'; give one of .*, or name it in chat\.roles"
    ):
        read(source(path))
    assert read(source(path, messages_key="messages", roles=("prompter=user", "bot=assistant"))) == [TALK[1:]]
    for wrong in ("bot", "bot=robot", "=user"):
        with pytest.raises(UserError, match=r"sources\[\]\.chat\.roles"):
            ChatConfig(messages_key="m", roles=(wrong,))
    with pytest.raises(UserError, match=r"message 1 has the role \['user'\]"):
        read_conversation({"messages": [{"role": ["user"], "content": "x"}]}, KEYS, "w")


def test_a_mark_of_the_template_cannot_be_eos_or_pad(config, tmp_path):
    given = TokenizerConfig(path="t.json")
    for key, changed in (
        ("eos_token", replace(given, eos_token="<|im_end|>")),
        ("pad_token", replace(given, pad_token="<|im_start|>")),
    ):
        with pytest.raises(UserError, match=rf"tokenizer\.{key}: .*the turns of sources\.talk\.chat use it"):
            replace(config({"x": tmp_path}, tokenizer=changed), sources=(source(tmp_path),))


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


def test_no_more_questions_are_written_than_fit(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^count: \d+ is not allowed; give a number above 0 and at most 10000000$"):
        questions.main(["--output", str(tmp_path / "q.jsonl"), "--count", "1000000000000"])


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


JINJA = "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
JINJA += "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"


@pytest.mark.slow
def test_conversations_are_packed_in_the_template_of_an_imported_model(
    talks: Any, config: Any, build: Any, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    tokenizer = train_tokenizer(["1 + 1? 2 Be brief."], WITH_TOKENS)
    tokenizer.save(str(model / "tokenizer.json"))
    existing = TokenizerConfig(path=str(model / "tokenizer.json"), chat_template=str(model))
    made = replace(config({"x": tmp_path}), tokenizer=existing, sources=(source(tmp_path / "talk.jsonl"),))
    with pytest.raises(UserError, match=r"tokenizer.chat_template: '.*model' holds no chat template; name a folder"):
        build(made)
    (model / "chat_template.jinja").write_text(JINJA)
    output = build(made)
    template, found = ImportedTemplate(JINJA, tokenizer, {}, "t"), list[list[int]]()
    for split in ("train", "valid"):
        manifest = check_prefix(output / f"talk_{split}", deep=True)
        assert manifest.chat is not None and manifest.chat.end_id == tokenizer.token_to_id("<|im_end|>")
        assert manifest.chat.template == "chat_template.jinja"
        found += [np.array(document).tolist() for document in IndexedDataset(str(output / f"talk_{split}"))]
    encoded = template.encode([[Message(**message) for message in messages] for messages in talks])
    assert sorted(found) == sorted(mark([*ids, 1], [*learned, False]) for ids, learned in encoded)
    data = DataConfig(train=(DataSource(prefix=str(output / "talk_train")),), seq_length=200)
    assert check_corpus(data, 320).chat_template == JINJA, "a checkpoint carries the template on"
    (model / "chat_template.jinja").write_text(JINJA + "{# #}")
    with pytest.raises(UserError, match=r"inputs.chat_template"):
        build(made)
    kept = output / "chat_template.jinja"
    kept.write_text(JINJA + "{# #}")
    with pytest.raises(
        UserError, match=r"chat_template.jinja: not the chat template of .*talk_train; put that one back"
    ):
        check_prefix(output / "talk_train", deep=False)
    kept.unlink()
    with pytest.raises(UserError, match=r"chat_template.jinja: the chat template is missing"):
        check_prefix(output / "talk_train", deep=False)


def test_conversations_in_two_templates_are_not_mixed(tmp_path: Path) -> None:
    write_chat_corpus(tmp_path / "a")
    write_chat_corpus(tmp_path / "b")
    path = manifest_path(tmp_path / "b" / "train")
    values = json.loads(path.read_text())
    (tmp_path / "b" / "chat_template.jinja").write_text(JINJA)
    chat = {"template": "chat_template.jinja", "template_sha256": sha256_of(tmp_path / "b" / "chat_template.jinja")}
    path.write_text(json.dumps({**values, "chat": {**values["chat"], **chat}}))
    sources = tuple(DataSource(prefix=str(tmp_path / name / "train")) for name in "ab")
    apart = DataConfig(train=sources[:1], valid=sources[1:], seq_length=200)  # losses would be of another format
    for mixed in (DataConfig(train=sources, seq_length=200), apart):
        with pytest.raises(UserError, match=r"b/train: packed in another chat template than .*a/train; pack"):
            check_corpus(mixed, 400)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": TokenizerConfig(path="t.json", chat_template="m")}, "no source has conversations; leave it out"),
        (None, "it belongs to an existing tokenizer; name that in tokenizer.path"),
    ],
)
def test_a_template_that_would_not_be_used_is_refused(changes: Any, message: str, tmp_path: Path, config: Any) -> None:
    with pytest.raises(UserError, match=message):
        if changes is None:
            TokenizerConfig(vocab_size=320, chat_template="m")
        else:
            config({"x": tmp_path}, **changes)


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


def test_written_marks_follow_the_turns(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["1 + 1? 2 Be brief."], WITH_TOKENS)
    encoder = TextEncoder(tokenizer, WITH_TOKENS, "t")
    two = [*TALK, *TALK[1:]]
    documents = [
        Document("x", "1", metadata={MESSAGES: two}),
        Document("x", "2", metadata={MESSAGES: [*MASKED, *TALK[1:]]}),
        Document("x", "3", metadata={MESSAGES: [["user", "<|eos|><|pad|>", True], ["assistant", "<|eos|>", True]]}),
    ]
    plain, masked, names = (found.tokens for found in encoder.encode_conversations(documents))
    end_id, eos = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|eos|>")
    ids, (learned, rest) = unmark(np.array(plain))[0], (unmark(np.array(tokens))[1] for tokens in (plain, masked))
    assert np.array_equal(unmark(np.array(masked))[0], ids)
    answer = [tokenizer.token_to_id("2"), end_id]
    assert ids[learned].tolist() == answer * 2 and ids[rest].tolist() == answer
    assert np.flatnonzero(rest).tolist() == np.flatnonzero(learned)[2:].tolist()
    ids, learned = unmark(np.array(names))
    assert ids.tolist().count(eos) == 1 and ids[-1] == eos and not learned[-1]
    assert tokenizer.decode(ids[learned][:-1].tolist()) == "<|eos|>"


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
