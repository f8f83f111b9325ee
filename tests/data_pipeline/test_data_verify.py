"""check_prefix and the verify command find every fault; merging equals Megatron's and refuses broken shards."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from data_pipeline import verify
from data_pipeline.manifest import TokenizerRecord, write_manifest
from data_pipeline.shards import merge_shards
from data_pipeline.verify import check_prefix
from looplm.failures import UserError
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
    Tokenizer(WordLevel({str(index): index for index in range(vocab_size)}, unk_token="0")).save(str(tokenizer))
    record = TokenizerRecord(path=tokenizer.name, sha256=sha256_of(tokenizer), bos_id=0, eos_id=EOS, pad_id=2)
    write_manifest(prefix, source="s", split="train", vocab_size=vocab_size, tokenizer=record, config_sha256="0" * 64)
    return prefix


DOCUMENTS = [[5, 6, 7, EOS], [49, EOS], [8] * 20 + [EOS]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return describe(write_shard(tmp_path / "data" / "s_train", DOCUMENTS))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 4
    path.write_bytes(data)


def other_index(path: Path) -> None:
    write_shard(path.parent / "other", [[1, EOS], [2, 2, EOS], [3, EOS]])
    shutil.copy(path.parent / "other.idx", path)


def link(prefix: Path, target: str) -> None:
    Path(f"{prefix}.bin").unlink()
    Path(f"{prefix}.bin").symlink_to(target)


def forget_max_id(prefix: Path) -> None:
    edit(Path(f"{prefix}.manifest.json"), "max_id", None)


def same_size_index(path: Path) -> None:
    """Move a bound between two documents, as in the index of other data of the same size."""
    write_shard(path.parent / "other", [[5, 6, 7, 8, EOS], [EOS], [8] * 20 + [EOS]])
    shutil.copy(path.parent / "other.idx", path)


def name_tokenizer(prefix: Path, path: str) -> None:
    """Let the manifest name another tokenizer, with the hash of the right one."""
    shutil.copy(prefix.parent / "tokenizer.json", prefix.parent.parent / "outside.json")
    record = json.loads(Path(f"{prefix}.manifest.json").read_text())["tokenizer"]
    edit(Path(f"{prefix}.manifest.json"), "tokenizer", record | {"path": path.format(prefix.parent.parent)})


def name_file(prefix: Path, name: str) -> None:
    """Let the manifest name another .bin."""
    shutil.copy(f"{prefix}.bin", prefix.parent.parent / "outside.bin")
    files = json.loads(Path(f"{prefix}.manifest.json").read_text())["files"]
    files[name.format(prefix.parent.parent)] = files.pop(f"{prefix.name}.bin")
    edit(Path(f"{prefix}.manifest.json"), "files", files)


def edit(path: Path, key: str, value: object) -> None:
    values = json.loads(path.read_text())
    values[key] = value
    path.write_text(json.dumps(values))


SHALLOW: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda p: Path(f"{p}.manifest.json").unlink(), "manifest.json: cannot be read"),
    "garbled manifest": (lambda p: cut(Path(f"{p}.manifest.json")), "cannot be read as JSON"),
    "manifest of another kind": (lambda p: Path(f"{p}.manifest.json").write_text("[]"), "not a JSON object"),
    "manifest with a wrong type": (lambda p: edit(Path(f"{p}.manifest.json"), "tokens", "many"), "tokens"),
    "manifest without a key": (lambda p: Path(f"{p}.manifest.json").write_text("{}"), "manifest.json"),
    "no bin": (lambda p: Path(f"{p}.bin").unlink(), "s_train.bin: is missing"),
    "no idx": (lambda p: Path(f"{p}.idx").unlink(), "s_train.idx: is missing"),
    "empty bin": (lambda p: Path(f"{p}.bin").write_bytes(b""), "s_train.bin: 0 bytes, the manifest says 54"),
    "truncated bin": (lambda p: cut(Path(f"{p}.bin")), "s_train.bin: 52 bytes, the manifest says 54"),
    "truncated idx": (lambda p: cut(Path(f"{p}.idx")), "s_train.idx: .* bytes, the manifest says"),
    "idx of other data": (lambda p: other_index(Path(f"{p}.idx")), "belongs to another data set"),
    "idx of other data of the same size": (lambda p: same_size_index(Path(f"{p}.idx")), "s_train.idx: its content"),
    "id above the vocabulary": (lambda p: describe(p, vocab_size=49), "holds token id 49, the vocabulary has 49"),
    "manifest that is too deep": (
        lambda p: Path(f"{p}.manifest.json").write_text("[" * 100_000),
        "cannot be read as JSON",
    ),
    "tokenizer above its folder": (lambda p: name_tokenizer(p, "../outside.json"), "not a file of its folder"),
    "tokenizer of an absolute path": (lambda p: name_tokenizer(p, "{}/outside.json"), "not a file of its folder"),
    "tokenizer that is the folder above": (lambda p: name_tokenizer(p, ".."), "not a file of its folder"),
    "tokenizer of too long a name": (lambda p: name_tokenizer(p, "x" * 256), "not a file of its folder"),
    "bin above its folder": (lambda p: name_file(p, "../outside.bin"), "describes .*outside.bin, which were renamed"),
    "bin of an absolute path": (lambda p: name_file(p, "{}/outside.bin"), "outside.bin, which were renamed"),
    "bin that is a dangling link": (lambda p: link(p, "nowhere"), "s_train.bin: is missing"),
    "bin that is a link to itself": (lambda p: link(p, "s_train.bin"), "s_train.bin: is missing"),
    "bin that is a link to other data": (
        lambda p: link(p, "tokenizer.json"),
        "s_train.bin: .* bytes, the manifest says 54",
    ),
    "no tokenizer": (lambda p: (p.parent / "tokenizer.json").unlink(), "the tokenizer is missing"),
    "other tokenizer": (lambda p: (p.parent / "tokenizer.json").write_text("[]"), "not the tokenizer"),
}

DEEP: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed bin": (lambda p: flip(Path(f"{p}.bin")), "s_train.bin: its content is not what was written"),
    "id above the vocabulary, in an older manifest": (
        lambda p: forget_max_id(describe(p, vocab_size=49)),
        "holds token id 49, the vocabulary has 49",
    ),
    "document without eos": (lambda p: describe(write_shard(p, [[5, 6], [7, EOS]])), "does not end in eos"),
    "negative id": (lambda p: describe(write_shard(p, [[-3, EOS]], np.int32)), "holds token id -3"),
    "edited fingerprint": (lambda p: edit(Path(f"{p}.manifest.json"), "fingerprint", "f"), "fingerprint"),
    "edited vocabulary": (
        lambda p: edit(Path(f"{p}.manifest.json"), "vocab_size", 10**15),
        r"manifest.json: says that the vocabulary has 10{15} ids, but the largest in \S+/tokenizer.json is 49;",
    ),
}


def test_whole_data_passes(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    for deep in (False, True):
        manifest = check_prefix(prefix, deep=deep)
        assert (manifest.documents, manifest.tokens, manifest.vocab_size) == (3, 27, 50)
    verify.main([str(prefix), "--deep"])
    assert "whole, 3 documents, 27 tokens" in capsys.readouterr().out


@pytest.mark.promise(
    text="Token files that are truncated, foreign, empty, or not those of their manifest are refused before training",
    expected="status 2, one line that names the file",
)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("fault", SHALLOW)
def test_faults_found_without_reading(prefix: Path, fault: str, deep: bool, record_property: Any) -> None:
    harm, message = SHALLOW[fault]
    harm(prefix)
    with pytest.raises(UserError, match=message) as caught:
        check_prefix(prefix, deep=deep)
    assert "\n" not in str(caught.value) and str(prefix.parent) in str(caught.value)
    line = str(caught.value).replace(f"{prefix.parent}/", "").replace(str(prefix.parent.parent), "")
    record_property("seen", f"status {caught.value.status}: {line}")


@pytest.mark.promise(
    text="Token files whose content changed are refused: a .bin up to 256 MiB by training, any by verify --deep",
    expected="status 2, one line that names the file",
)
@pytest.mark.parametrize("fault", DEEP)
def test_faults_found_by_reading(prefix: Path, fault: str, record_property: Any) -> None:
    harm, message = DEEP[fault]
    harm(prefix)
    check_prefix(prefix, deep=False)
    with pytest.raises(UserError, match=message) as caught:
        check_prefix(prefix, deep=True)
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{prefix.parent}/", ""))


def test_more_documents_than_megatron_can_number_are_refused(prefix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_DOCUMENTS", 3)
    check_prefix(prefix, deep=True)
    monkeypatch.setattr(verify, "MAX_DOCUMENTS", 2)
    with pytest.raises(UserError) as caught:
        check_prefix(prefix, deep=False)
    fix = "split the source into several and build the data again"
    assert str(caught.value) == f"{prefix}.manifest.json: 3 documents, more than 2; {fix}"


def test_links_to_whole_files_are_followed(prefix: Path) -> None:
    folder = prefix.parent.parent / "links"
    folder.mkdir()
    for path in prefix.parent.iterdir():
        (folder / path.name).symlink_to(path)
    assert check_prefix(folder / "s_train", deep=True) == check_prefix(prefix, deep=True)


def test_the_manifest_knows_the_largest_id(prefix: Path) -> None:
    assert check_prefix(prefix, deep=False).max_id == 49


def test_verify_reports_each_bad_prefix(prefix: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        verify.main([str(prefix), str(prefix.parent / "x"), str(prefix.parent / "y")])
    assert str(caught.value).count("cannot be read") == 2
    assert "whole" in capsys.readouterr().out


@pytest.mark.promise(text="An empty shard of a data build is merged as nothing", expected="Megatron's own result")
def test_merge_equals_megatrons_in_order_without_empty_shards(tmp_path: Path, record_property: Any) -> None:
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
    record_property("seen", "Megatron's own result")


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
