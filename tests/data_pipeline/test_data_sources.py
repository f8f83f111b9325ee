"""Every reader, with and without compression, and every kind of damaged file."""

import gzip
import json
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.config import SourceConfig
from data_pipeline.sources import check_files, find_files, make_reader, read_documents
from looplm.cli import UserError

TEXTS = ["one\ntwo", "Grüße, 世界 🙂", "three"]


def pack(data: bytes, suffix: str) -> bytes:
    """Return ``data`` compressed by suffix; zstd in two frames, as parallel compressors write it."""
    if suffix == ".gz":
        return gzip.compress(data)
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:]) if suffix[:4] == ".zst" else data


def write_jsonl(path: Path, records: list[Any], suffix: str = "") -> Path:
    path = path.with_name(path.name + suffix)
    path.write_bytes(pack("".join(json.dumps(record) + "\n" for record in records).encode(), suffix))
    return path


def read(kind: Any, *paths: Path, **options: Any) -> list[tuple[str, str]]:
    source = SourceConfig(name="s", kind=kind, paths=tuple(map(str, paths)), **options)
    files = find_files(source)
    check_files(source, files)
    documents = list(read_documents(source, files))
    assert all(document.metadata["source"] == "s" for document in documents)
    return [(document.id, document.text) for document in documents]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".zstd"])
def test_text_files(tmp_path: Path, suffix: str) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index}.txt{suffix}").write_bytes(pack(text.replace("\n", "\r\n").encode(), suffix))
    expected = [(f"{index}.txt{suffix}", text) for index, text in enumerate(TEXTS)]
    assert read("text", tmp_path / f"*.txt{suffix}") == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    records = [{"text": text, "metadata": "ignored", "rank": 7} for text in TEXTS] + [{"text": None}, {"text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", records, suffix)
    assert read("jsonl", path) == [(f"{path.name}/{index}", text) for index, text in enumerate(TEXTS)]


def test_json_lines_with_ids_and_another_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "id": index + 5} for index, text in enumerate(TEXTS)])
    assert read("jsonl", path, text_key="body") == [(str(index + 5), text) for index, text in enumerate(TEXTS)]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS, "stars": [1, 2, 3]}), path)
    assert [text for _, text in read("parquet", path, text_key="content")] == TEXTS
    with pytest.raises(UserError, match="no column 'text', only content, stars"):
        read("parquet", path)


def test_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"b.py": b"x = 1\r\n", "a/c.py": b"y\n", "latin.py": b"# \xe9\n", "empty.py": b"", "n.txt": b"no"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "d.py").write_text("z\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("python-stdlib") == [("a/c.py", "y\n"), ("b.py", "x = 1\n")]


def test_the_real_stdlib_is_megabytes() -> None:
    files = find_files(SourceConfig(name="s", kind="python-stdlib"))
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any("site-packages" in str(path) for path in files)


def test_files_are_divided_among_tasks(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / f"{index}.jsonl", [{"text": f"{index}{part}"} for part in "ab"]) for index in range(5)
    ]
    source = SourceConfig(name="s", kind="jsonl", paths=(str(tmp_path / "*.jsonl"),))
    reader = make_reader(source, paths, tmp_path / "paths")
    shares = [[document.text for document in reader.run(rank=rank, world_size=3)] for rank in range(3)]
    assert shares == [["0a", "0b", "3a", "3b"], ["1a", "1b", "4a", "4b"], ["2a", "2b"]]


def test_limit_and_globs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(index)} for index in range(5)])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "b.jsonl", [{"text": "b"}])
    both = (tmp_path / "**" / "*.jsonl", tmp_path / "a.jsonl")  # a file named twice is read once
    assert [text for _, text in read("jsonl", *both)] == ["0", "1", "2", "3", "4", "b"]
    assert [text for _, text in read("jsonl", *both, limit=3)] == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compressed_files(tmp_path: Path, kind: str, suffix: str) -> None:
    data = "".join(json.dumps({"text": f"line {index**7}"}) + "\n" for index in range(5000)).encode()
    whole = pack(data, suffix)
    for cut in (len(whole) - 7, len(whole) * 3 // 4):
        path = tmp_path / f"cut.{kind}{suffix}"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"cut\.{kind}\{suffix}: damaged, truncated"):
            read(kind, path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl:2: no key 'text', only txt; set text_key"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: 'text' holds int, not text"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1: holds list"),
        ("a.jsonl", b"", r"a.jsonl: is empty"),
        ("a.txt", b"", r"a.txt: is empty"),
        ("a.txt", b"ok \xff", r"a.txt: byte 3 is not UTF-8"),
        ("a.txt.gz", b"no gzip at all", r"a.txt.gz: damaged"),
        ("a.txt.zst", b"no zstd at all", r"a.txt.zst: damaged"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: damaged"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(name).suffix, "text")
    with pytest.raises(UserError, match=message) as caught:
        read(kind, tmp_path / name)
    assert "\n" not in str(caught.value)
