"""check_prefix and the verify command find every fault; merging equals Megatron's and refuses broken shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from data_pipeline import verify
from data_pipeline.manifest import TokenizerRecord, write_manifest
from data_pipeline.shards import merge_shards
from data_pipeline.verify import check_prefix
from looplm.cli import UserError
from looplm.files import sha256_of

EOS = 1


def write_shard(prefix: Path, documents: list[list[int]], dtype: Any = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def describe(prefix: Path, vocab_size: int = 50) -> Path:
    tokenizer = prefix.parent / "tokenizer.json"
    tokenizer.write_text("{}")
    record = TokenizerRecord(path=tokenizer.name, sha256=sha256_of(tokenizer), bos_id=0, eos_id=EOS, pad_id=2)
    write_manifest(prefix, source="s", split="train", vocab_size=vocab_size, tokenizer=record, config_sha256="0" * 64)
    return prefix


DOCUMENTS = [[5, 6, 7, EOS], [49, EOS], [8] * 20 + [EOS]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    return describe(write_shard(tmp_path / "s_train", DOCUMENTS))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 4
    path.write_bytes(data)


def other_index(path: Path) -> None:
    write_shard(path.parent / "other", [[1, EOS], [2, 2, EOS], [3, EOS]])
    shutil.copy(path.parent / "other.idx", path)


def edit(path: Path, key: str, value: object) -> None:
    values = json.loads(path.read_text())
    values[key] = value
    path.write_text(json.dumps(values))


SHALLOW: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: Path(f"{p}.manifest.json").unlink(), "manifest.json: cannot be read"),
    "garbled manifest": (lambda p: cut(Path(f"{p}.manifest.json")), "not valid JSON"),
    "manifest of another kind": (lambda p: Path(f"{p}.manifest.json").write_text("[]"), "not a manifest"),
    "manifest with a wrong type": (lambda p: edit(Path(f"{p}.manifest.json"), "tokens", "many"), "tokens"),
    "manifest without a key": (lambda p: Path(f"{p}.manifest.json").write_text("{}"), "manifest.json"),
    "no bin": (lambda p: Path(f"{p}.bin").unlink(), "s_train.bin: is missing"),
    "no idx": (lambda p: Path(f"{p}.idx").unlink(), "s_train.idx: is missing"),
    "empty bin": (lambda p: Path(f"{p}.bin").write_bytes(b""), "s_train.bin: 0 bytes, the manifest says 54"),
    "truncated bin": (lambda p: cut(Path(f"{p}.bin")), "s_train.bin: 52 bytes, the manifest says 54"),
    "truncated idx": (lambda p: cut(Path(f"{p}.idx")), "s_train.idx: .* bytes, the manifest says"),
    "idx of other data": (lambda p: other_index(Path(f"{p}.idx")), "belongs to another data set"),
    "no tokenizer": (lambda p: (p.parent / "tokenizer.json").unlink(), "the tokenizer is missing"),
    "other tokenizer": (lambda p: (p.parent / "tokenizer.json").write_text("[]"), "not the tokenizer"),
}

DEEP: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed bin": (lambda p: flip(Path(f"{p}.bin")), "s_train.bin: its content is not what was written"),
    "id above the vocabulary": (lambda p: describe(p, vocab_size=49), "holds token id 49, the vocabulary has 49"),
    "document without eos": (lambda p: describe(write_shard(p, [[5, 6], [7, EOS]])), "does not end in eos"),
    "negative id": (lambda p: describe(write_shard(p, [[-3, EOS]], np.int32)), "holds token id -3"),
    "edited fingerprint": (lambda p: edit(Path(f"{p}.manifest.json"), "fingerprint", "f"), "fingerprint"),
}


def test_whole_data_passes(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    for deep in (False, True):
        manifest = check_prefix(prefix, deep=deep)
        assert (manifest.documents, manifest.tokens, manifest.vocab_size) == (3, 27, 50)
    verify.main([str(prefix), "--deep"])
    assert "whole, 3 documents, 27 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("fault", SHALLOW)
def test_faults_found_without_reading(prefix: Path, fault: str, deep: bool) -> None:
    harm, message = SHALLOW[fault]
    harm(prefix)
    with pytest.raises(UserError, match=message) as caught:
        check_prefix(prefix, deep=deep)
    assert "\n" not in str(caught.value) and str(prefix.parent) in str(caught.value)


@pytest.mark.parametrize("fault", DEEP)
def test_faults_found_by_reading(prefix: Path, fault: str) -> None:
    harm, message = DEEP[fault]
    harm(prefix)
    check_prefix(prefix, deep=False)
    with pytest.raises(UserError, match=message):
        check_prefix(prefix, deep=True)


def test_verify_reports_each_bad_prefix(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        verify.main([str(prefix), str(prefix.parent / "x"), str(prefix.parent / "y")])
    assert str(caught.value).count("cannot be read") == 2
    assert "whole" in capsys.readouterr().out


def test_merge_equals_megatrons_in_order_without_empty_shards(tmp_path: Path) -> None:
    shards = [
        write_shard(tmp_path / "1", DOCUMENTS[:2]),
        write_shard(tmp_path / "2", []),
        write_shard(tmp_path / "0", DOCUMENTS[2:]),
    ]
    assert Path(f"{shards[1]}.bin").stat().st_size == 0
    merge_shards([str(shard) for shard in shards], str(tmp_path / "all"))
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for shard in (shards[0], shards[2]):
        builder.add_index(str(shard))
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"all.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "all"))
    assert [np.array(dataset[index]).tolist() for index in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3]


def test_merge_refuses(tmp_path: Path) -> None:
    good, wide = write_shard(tmp_path / "good", DOCUMENTS), write_shard(tmp_path / "wide", DOCUMENTS, np.int32)
    empty, short = write_shard(tmp_path / "empty", []), write_shard(tmp_path / "short", DOCUMENTS)
    cut(Path(f"{short}.bin"))
    for shards, message in [
        ((good, wide), "int32 and uint16"),
        ((empty,), "all 1 shards are empty"),
        ((good, short), "short.bin: 52 bytes"),
    ]:
        with pytest.raises(UserError, match=message):
            merge_shards([str(shard) for shard in shards], str(tmp_path / "all"))
    cut(Path(f"{good}.idx"))
    with pytest.raises(UserError, match="truncated"):
        merge_shards([str(good)], str(tmp_path / "all"))
