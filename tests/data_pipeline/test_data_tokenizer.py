"""Trained and existing tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from tokenizers import Tokenizer, models

from data_pipeline import train_tokenizer as module
from data_pipeline.config import TokenizerConfig
from data_pipeline.text_encoder import TextEncoder
from data_pipeline.train_tokenizer import load_tokenizer, sample_texts, special_ids, train_tokenizer, vocab_size
from looplm.cli import UserError


@pytest.fixture
def trained(corpus: Any) -> Tokenizer:
    return train_tokenizer(corpus.documents(30), TokenizerConfig(vocab_size=400))


@pytest.mark.parametrize(
    "text", ["", " a  b\n\n\tc ", "Grüße, 世界 🙂\x00\ud7ff", "12345 and 1.5e-3", "def f(x):\n    return x\r\n"]
)
def test_decoding_restores_the_text(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_repeatable_and_special_tokens_have_ids(corpus: Any, trained: Tokenizer) -> None:
    again = train_tokenizer(type(corpus)().documents(30), TokenizerConfig(vocab_size=400))
    assert again.to_str() == trained.to_str()
    assert special_ids(trained, TokenizerConfig(vocab_size=400)) == (0, 1, 2, None)
    assert vocab_size(trained) == 400


def encode(tokenizer: Tokenizer, config: TokenizerConfig, text: str) -> list[int]:
    return next(TextEncoder(tokenizer, config, "t").encode_texts([Document(text, "id")])).tokens


def test_special_tokens_in_a_text_are_text(trained: Tokenizer) -> None:
    trained.enable_truncation(3)
    trained.enable_padding(pad_id=2)
    text = "before <|eos|> and <|pad|> and <|bos|> after"
    ids = encode(trained, TokenizerConfig(vocab_size=400), text)
    assert ids[-1] == 1 and not {0, 1, 2} & set(ids[:-1])
    assert trained.decode(ids[:-1]) == text


def test_sample_spreads_the_budget() -> None:
    streams = [
        lambda text=text, count=count: [Document(text, "id")] * count
        for text, count in (("a" * 10, 2), ("b" * 10, 50), ("c" * 10, 50))
    ]
    taken = "".join(sample_texts(streams, 300))
    assert taken.count("a") == 20 and taken.count("b") == taken.count("c") == 140
    assert len("".join(sample_texts(streams, 10**6))) == 1020


def save_tokenizer(path: Path, vocabulary: dict[str, int], **options: Any) -> TokenizerConfig:
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))
    return TokenizerConfig(path=str(path), **options)


WORDS = {"<unk>": 0, "<|eos|>": 1, "<|pad|>": 2, "a": 3}


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ({"<unk>": 0, "<|pad|>": 1}, {}, "tokenizer.eos_token: .* has no token '<|eos|>'"),
        ({"<unk>": 0, "<|eos|>": 1}, {}, "tokenizer.pad_token: .* has no token '<|pad|>'"),
        (WORDS, {"bos_token": "<|bos|>"}, "tokenizer.bos_token: .* has no token"),
        (WORDS, {"bos_token": "<|pad|>"}, "pad needs its own id"),
        (WORDS | {"z": 70_000}, {}, "4|5 tokens but ids up to 70000"),
    ],
)
def test_existing_tokenizers_that_are_refused(tmp_path: Path, vocabulary: dict, options: dict, message: str) -> None:
    config = save_tokenizer(tmp_path / "t.json", vocabulary, **({"bos_token": None} | options))
    with pytest.raises(UserError, match=message):
        load_tokenizer(config)


def test_existing_tokenizer(tmp_path: Path) -> None:
    config = save_tokenizer(tmp_path / "t.json", WORDS, bos_token=None)
    assert special_ids(load_tokenizer(config), config) == (None, 1, 2, None)
    (tmp_path / "t.json").write_text(json.dumps({"not": "one"}))
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(config)
    with pytest.raises(UserError, match="is not a file"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "none.json")))


def test_the_command(tmp_path: Path, corpus: Any, jsonl: Any, capsys: pytest.CaptureFixture) -> None:
    path = jsonl("a", corpus.documents(20))
    (tmp_path / "c.yaml").write_text(
        f"output_dir: x\nsources: [{{name: a, kind: jsonl, paths: [{path}]}}]\ntokenizer: {{vocab_size: 300}}\n"
    )
    module.main(["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "t" / "t.json")])
    assert vocab_size(Tokenizer.from_file(str(tmp_path / "t" / "t.json"))) == 300
    assert "300 tokens" in capsys.readouterr().out
