"""The whole pipeline: its output, and that incomplete work is never mistaken for it."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipeline import tokenize
from data_pipeline.config import TokenizerConfig
from data_pipeline.shards import batches
from data_pipeline.text_encoder import EncodedDocument, TextEncoder
from data_pipeline.train_tokenizer import train_tokenizer
from data_pipeline.verify import check_prefix
from looplm.failures import UserError

pytestmark = pytest.mark.slow  # every test here starts a process or trains


@pytest.fixture
def source(corpus: Any, jsonl: Callable) -> dict[str, Path]:
    return {"a": jsonl("a", corpus.documents(40, 3))}


def test_counts_and_texts(corpus: Any, jsonl: Any, config: Any, build: Any, decoded: Any, tmp_path: Path) -> None:
    texts = [*corpus.documents(30, 3), "Grüße\n\n  世界 🙂 <|eos|> <|pad|>\t.", "x"]
    output = build(config({"a": jsonl("a", texts)}))
    found = []
    for split in ("train", "valid"):
        manifest = check_prefix(output / f"a_{split}", deep=True)
        documents, dataset = decoded(output / f"a_{split}"), IndexedDataset(str(output / f"a_{split}"))
        assert manifest.documents == len(documents) == len(dataset)
        assert manifest.tokens == int(dataset.sequence_lengths.sum())
        assert manifest.sources["a"].tokens == manifest.tokens and manifest.split == split
        assert (manifest.tokenizer.bos_id, manifest.tokenizer.eos_id, manifest.tokenizer.pad_id) == (0, 1, 2)
        found += documents
    assert sorted(found) == sorted(texts)
    files = {f"a_{split}.{kind}" for split in ("train", "valid") for kind in ("bin", "idx", "manifest.json")}
    assert {path.name for path in output.iterdir()} == files | {"data_pipeline.json", "logs", "tokenizer.json"}
    assert not (tmp_path / "out.partial").exists()


def test_a_tokenizer_learns_from_the_training_documents_alone_by_size(
    source: Any, corpus: Any, jsonl: Any, config: Any, build: Any, decoded: Any, monkeypatch: Any
) -> None:
    learned = list[str]()

    def train(texts: Iterable[str], settings: TokenizerConfig) -> Tokenizer:
        learned.extend(texts)
        return train_tokenizer(learned, settings)

    monkeypatch.setattr(tokenize, "train_tokenizer", train)
    output = build(config(source))
    assert sorted(learned) == sorted(decoded(output / "a_train")) and decoded(output / "a_valid")

    small, large = corpus.documents(10, 3), corpus.documents(40, 3)
    half = TokenizerConfig(vocab_size=320, train_chars=sum(map(len, [*small, *large])) // 2)
    learned.clear()
    build(
        config({"b": jsonl("b", small), "c": jsonl("c", large)}, tokenizer=half, validation_fraction=0.0, replace=True)
    )
    assert 4 <= len({*learned} & {*small}) <= 6


def test_batches_of_long_documents_are_small(
    source: Any, config: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build(config(source)) / "a_train.bin"
    sizes, encode = list[int](), TextEncoder.encode_texts

    def record(self: TextEncoder, documents: list[Document]) -> Iterator[EncodedDocument]:
        sizes.append(sum(len(document.text) for document in documents[:-1]))
        return encode(self, documents)

    monkeypatch.setattr(TextEncoder, "encode_texts", record)
    monkeypatch.setattr("data_pipeline.shards._CHARACTERS", 300)
    many = build(config(source, output_dir=str(tmp_path / "many"))) / "a_train.bin"
    assert max(sizes) < 300 and len(sizes) > 10
    assert many.read_bytes() == one.read_bytes()
    monkeypatch.setattr("data_pipeline.shards._DOCUMENTS", 2)
    assert [len(batch) for batch in batches([Document("a", "id")] * 5)] == [2, 2, 1]


def test_same_result_twice_and_no_work_the_third_time(
    source: Any, config: Any, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = check_prefix(build(config(source)) / "a_train", deep=True)
    second = check_prefix(build(config(source, output_dir=str(tmp_path / "again"))) / "a_train", deep=True)
    assert first == second
    monkeypatch.setattr(tokenize, "split_documents", None)  # fails if it is called
    build(config(source))
    build(config(source, workers=2, verbose=True))  # neither changes the result
    written = tmp_path / "out" / "data_pipeline.json"
    older = json.loads(written.read_text())
    del older["tokenizer"]["chat_template"]
    written.write_text(json.dumps(older))
    build(config(source))  # made before this setting existed


def test_other_settings_are_refused_or_replace(source: Any, config: Any, build: Any) -> None:
    build(config(source))
    changed = config(source, tokenizer=TokenizerConfig(vocab_size=300))
    with pytest.raises(UserError, match=r"tokenizer.vocab_size 320 -> 300\); add --replace true"):
        build(changed)
    output = build(config(source, tokenizer=TokenizerConfig(vocab_size=300), replace=True))
    assert check_prefix(output / "a_train", deep=True).vocab_size == 300
    source["a"].write_text(source["a"].read_text() + '{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"inputs\.a"):
        build(changed)
    assert check_prefix(output / "a_train", deep=True)


def test_a_foreign_folder_is_left_alone(source: Any, config: Any, build: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="did not write"):
        build(config(source, replace=True))
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_an_interrupted_run_continues(source: Any, config: Any, build: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole = check_prefix(build(config(source, output_dir=str(tmp_path / "whole"))) / "a_train", deep=True)

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_prefixes", die)
        with pytest.raises(KeyboardInterrupt):
            build(config(source))
    assert not (tmp_path / "out").exists()
    marks = list((tmp_path / "out.partial" / "final" / "logs").glob("*/completions/*"))
    times = [mark.stat().st_mtime_ns for mark in marks]
    assert len(marks) == 3  # two tasks read, one of them nothing; so one splits
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "train_tokenizer", None)  # already done
        output = build(config(source))
    finished = [output / "logs" / mark.relative_to(tmp_path / "out.partial" / "final" / "logs") for mark in marks]
    assert [mark.stat().st_mtime_ns for mark in finished] == times
    assert check_prefix(output / "a_train", deep=True) == whole


def test_unfinished_work_of_other_settings_is_not_used(
    source: Any, config: Any, build: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "write_prefixes", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(config(source))
    other = build(config(source, seed=99, replace=True))
    clean = build(config(source, seed=99, output_dir=str(tmp_path / "clean")))
    assert check_prefix(other / "a_train", deep=True) == check_prefix(clean / "a_train", deep=True)


def test_ids_above_65535_do_not_wrap(source: Any, config: Any, build: Any, tmp_path: Path) -> None:
    words = sorted({word for line in source["a"].read_text().splitlines() for word in json.loads(line)["text"].split()})
    fillers = {f"filler{index}": index for index in range(4, 70_000)}
    vocabulary = {"<unk>": 0, "<|eos|>": 1, "<|pad|>": 2, "<|bos|>": 3} | fillers
    vocabulary |= {word: 70_000 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "t.json"))
    output = build(config(source, tokenizer=TokenizerConfig(path=str(tmp_path / "t.json"))))
    manifest = check_prefix(output / "a_train", deep=True)
    assert manifest.vocab_size == 70_000 + len(words)
    ids = np.fromfile(output / "a_train.bin", np.int32)
    assert set(ids[ids != 1] >= 70_000) == {True}


def test_the_command_with_two_workers(source: Any, config: Any, build: Any, tmp_path: Path) -> None:
    """Two worker processes give the fingerprint of one."""
    alone = check_prefix(build(config(source, dedup=True)) / "a_train", deep=True)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"output_dir: {tmp_path / 'two'}\nsources: [{{name: a, kind: jsonl, paths: [{source['a']}]}}]\n"
        "tokenizer: {vocab_size: 320}\nvalidation_fraction: 0.2\nexecutor: {tasks: 2}\n"
    )
    command = [sys.executable, "-m", "data_pipeline.tokenize", "--config", str(path), "--executor.workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "two/a_train: " in done.stdout and "documents" in done.stdout
    assert check_prefix(tmp_path / "two" / "a_train", deep=True).fingerprint == alone.fingerprint
