"""Every reader, with and without compression, and every kind of damaged file."""

import bz2
import gzip
import json
import lzma
import sysconfig
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from data_pipeline.config import SourceConfig
from data_pipeline.sources import check_files, find_files, make_reader, read_documents
from looplm.failures import UserError

TEXTS = ["one\ntwo", "Grüße, 世界 🙂", "three"]


def pack(data: bytes, suffix: str) -> bytes:
    """Return ``data`` compressed by suffix; zstd in two frames, as parallel compressors write it."""
    for known, compress in ((".gz", gz), (".bz2", bz2.compress), (".xz", lzma.compress)):
        if suffix == known:
            return compress(data)
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
    expected = [(f"{index}.txt{suffix}/0", text) for index, text in enumerate(TEXTS)]
    assert read("text", tmp_path / f"*.txt{suffix}") == expected


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    records = [{"text": text, "metadata": "ignored", "rank": 7} for text in TEXTS] + [{"text": None}, {"text": ""}]
    path = write_jsonl(tmp_path / "a.jsonl", records, suffix)
    assert read("jsonl", path) == [(f"{path.name}/{index}", text) for index, text in enumerate(TEXTS)]


def test_json_lines_with_another_key(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": text, "id": None, "text": 7} for text in TEXTS])
    assert [text for _, text in read("jsonl", path, text_key="body")] == TEXTS


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS, "stars": [1, 2, 3]}), path)
    assert [text for _, text in read("parquet", path, text_key="content")] == TEXTS
    with pytest.raises(UserError, match="no column 'text', only content, stars"):
        read("parquet", path)


def test_the_check_of_a_parquet_file_reads_its_columns_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 9000]}), path, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"x" * 9000, b"\xff" * 9000))
    source = SourceConfig(name="s", kind="parquet", paths=(str(path),))
    check_files(source, [path])
    with pytest.raises(UserError, match=r"a\.parquet:1: byte 1 of a text is not UTF-8 \(0xff\)"):
        read("parquet", path)
    with pytest.raises(UserError, match=f"^{path}: has no column 'body', only text; set text_key$"):
        check_files(SourceConfig(name="s", kind="parquet", paths=(str(path),), text_key="body"), [path])


def test_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"b.py": b"x = 1\r\n", "a/c.py": b"y\n", "latin.py": b"# \xe9\n", "empty.py": b"", "n.txt": b"no"}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "d.py").write_text("z\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert read("python-stdlib") == [("a/c.py/0", "y\n"), ("b.py/0", "x = 1\n")]


def test_the_real_stdlib_is_megabytes() -> None:
    files = find_files(SourceConfig(name="s", kind="python-stdlib"))
    assert sum(path.stat().st_size for path in files) > 5e6
    assert not any("site-packages" in str(path) for path in files)


def test_files_are_divided_among_tasks(tmp_path: Path) -> None:
    paths = [
        write_jsonl(tmp_path / f"{index}.jsonl", [{"text": f"{index}{part}"} for part in "ab"]) for index in range(5)
    ]
    source = SourceConfig(name="s", kind="jsonl", paths=(str(tmp_path / "*.jsonl"),))
    reader = make_reader(source, paths)
    shares = [[document.text for document in reader.run(rank=rank, world_size=3)] for rank in range(3)]
    assert shares == [["0a", "0b", "3a", "3b"], ["1a", "1b", "4a", "4b"], ["2a", "2b"]]


def test_limit_and_globs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": str(index)} for index in range(5)])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "b.jsonl", [{"text": "b"}])
    both = (tmp_path / "**" / "*.jsonl", tmp_path / "a.jsonl")  # a file named twice is read once
    assert [text for _, text in read("jsonl", *both)] == ["0", "1", "2", "3", "4", "b"]
    assert [text for _, text in read("jsonl", *both, limit=3)] == ["0", "1", "2"]


@pytest.mark.promise(
    text="A truncated compressed file is called truncated, and none of its text is lost without a word",
    expected="status 2, one line that names the file",
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("suffix", [".gz", ".zst", ".bz2", ".xz"])
def test_truncated_compressed_files(tmp_path: Path, kind: str, suffix: str, record_property: Any) -> None:
    data = "".join(json.dumps({"text": f"line {index**7}"}) + "\n" for index in range(5000)).encode()
    whole = pack(data, suffix)
    for cut in (len(whole) - 7, len(whole) * 3 // 4):
        path = tmp_path / f"cut.{kind}{suffix}"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=rf"cut\.{kind}\{suffix}: is truncated") as caught:
            read(kind, path)
        record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


gz = partial(gzip.compress, mtime=0)  # the same bytes in every process of pytest-xdist, which compares test names
LINE = b'{"text": "one"}\n'


def long_zstd(data: bytes) -> bytes:
    """Return what ``zstd --long=31`` writes of a stream: its window is 2 GiB, however short the data."""
    stream = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=31)
    ).compressobj()
    return stream.compress(data) + stream.flush()


@pytest.mark.promise(
    text="Sound files are read, however they are compressed or named, with odd values that nobody reads",
    expected="every text",
)
@pytest.mark.parametrize(
    ("name", "data"),
    {
        "zstd --long=31": ("a.jsonl.zst", long_zstd(LINE)),
        "two zstd frames after one to skip": (
            "a.jsonl.zst",
            b"\x50\x2a\x4d\x18\2\0\0\0ab" + zstandard.compress(LINE[:5]) + zstandard.compress(LINE[5:]),
        ),
        "two gzip members": ("a.jsonl.gz", gz(LINE[:5]) + gz(LINE[5:])),
        "two bzip2 streams": ("a.jsonl.bz2", bz2.compress(LINE[:5]) + bz2.compress(LINE[5:])),
        "gzip without suffix": ("a.jsonl", gz(LINE)),
        "zstd without suffix": ("a.jsonl", zstandard.compress(LINE)),
        "bzip2 without suffix": ("a.jsonl", bz2.compress(LINE)),
        "xz without suffix": ("a.jsonl", lzma.compress(LINE)),
        "zstd called gzip": ("a.jsonl.gz", zstandard.compress(LINE)),
        "a BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINE),
        "a BOM and CRLF, compressed": ("a.jsonl.gz", gz(b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n"))),
        "NaN in another key": ("a.jsonl", b'{"text": "one", "score": NaN}\n'),
        "-Infinity in another key": ("a.jsonl", b'{"score": [-Infinity], "text": "one"}'),
        "half a pair in another key": ("a.jsonl", b'{"text": "one", "other": "\\ud800"}\n'),
        "an id that is no text": ("a.jsonl", b'{"text": "one", "id": {"a": 1}}\n'),
        "another key twice": ("a.jsonl", b'{"a": 1, "a": 2, "text": "one"}\n'),
        "the key inside another object": ("a.jsonl", b'{"text": "one", "inner": {"text": "two"}}\n'),
        "empty lines": ("a.jsonl", b"\n\r\n  \n" + LINE + b"\n"),
        "no line end": ("a.jsonl", LINE[:-1]),
    }.values(),
)
def test_sound_files(tmp_path: Path, name: str, data: bytes, record_property: Any) -> None:
    (tmp_path / name).write_bytes(data)
    assert [text for _, text in read("jsonl", tmp_path / name)] == ["one"]
    record_property("seen", "every text")


def test_a_huge_line_and_escaped_characters(tmp_path: Path) -> None:
    texts = ["x" * (1 << 24), "a\0b", 'the "text": "of a key', "\u2028\x85"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert [text for _, text in read("jsonl", path)] == texts


@pytest.mark.promise(
    text="A file that is not what its name or kind says is called by what it holds",
    expected="status 2, one line that names the file and the fault",
)
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a.jsonl:2: no key 'text', only txt; set text_key"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', r"a.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": 5}\n', r"a.jsonl:1: 'text' holds int, not text"),
        ("a.jsonl", b'{"text": NaN}\n', r"a.jsonl:1: 'text' holds float, not text"),
        ("a.jsonl", b'{"text": ["a"]}\n', r"a.jsonl:1: 'text' holds list, not text"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"a.jsonl:1: has the key 'text' twice"),
        ("a.jsonl", b'["text"]\n', r"a.jsonl:1: holds list, not an object; give one JSON object per line"),
        ("a.jsonl", LINE + b'{"text": "caf\xe9"}\n', r"a.jsonl:2: byte 14 of the line is not UTF-8"),
        ("a.jsonl", LINE + b'{"text": "\\ud83d x"}\n', r"a.jsonl:2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", LINE + b"\0" * 99, r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: not valid JSON"),
        ("a.jsonl", LINE.decode().encode("utf-16"), r"a.jsonl: holds UTF-16 text, not UTF-8 text; convert"),
        ("a.jsonl", LINE.decode().encode("utf-16-le"), r"a.jsonl: holds UTF-16 or binary data"),
        ("a.jsonl", LINE.decode().encode("utf-32"), r"a.jsonl: holds UTF-32 text"),
        ("a.txt", "text".encode("utf-16-be"), r"a.txt: holds UTF-16 or binary data"),
        ("a.jsonl", b"PAR1\x15\x04", r"a.jsonl: holds a parquet file, not UTF-8 text; set kind: parquet"),
        ("a.jsonl", b"PK\x03\x04\x14", r"a.jsonl: holds a zip archive, not UTF-8 text; unpack it"),
        ("a.txt.gz", gz(b"a" * 257 + b"ustar\0"), r"a.txt.gz: holds a tar archive"),
        ("a.txt.gz", gz(gz(b"a")), r"a.txt.gz: is compressed twice, the second time with gzip"),
        ("a.jsonl", b"", r"a.jsonl: is empty"),
        ("a.txt", b"", r"a.txt: is empty"),
        ("a.txt", b"ok \xff", r"a.txt: byte 3 is not UTF-8"),
        ("a.txt.gz", b"plain text", r"a.txt.gz: its name says gzip, but it holds something else"),
        ("a.txt.zst", b"plain text", r"a.txt.zst: its name says zstd"),
        ("a.txt.gz", gz(b"a") + b"rubbish", r"a.txt.gz: damaged, truncated or not readable \(Not a gzipped"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: damaged"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, data: bytes, message: str, record_property: Any) -> None:
    (tmp_path / name).write_bytes(data)
    kind = {".jsonl": "jsonl", ".parquet": "parquet"}.get(Path(name).suffix, "text")
    with pytest.raises(UserError, match=message) as caught:
        read(kind, tmp_path / name)
    assert "\n" not in str(caught.value)
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


def latin(rows: int, bad: int) -> pyarrow.Array:
    """Return a column of strings, one of which holds a Latin-1 byte that no writer has checked."""
    values = [b"ok"] * rows
    values[bad] = b"caf\xe9"
    return pyarrow.Array.from_buffers(pyarrow.string(), rows, pyarrow.array(values, pyarrow.binary()).buffers())


def test_kinds_of_parquet_columns(tmp_path: Path) -> None:
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.string_view()):
        table = pyarrow.table({"text": pyarrow.array(["é", None, "b"], kind), "n": [1, 2, 3]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert read("parquet", tmp_path / "a.parquet") == [("a.parquet/0", "é"), ("a.parquet/2", "b")]
    words = pyarrow.array(["é", "b", "é"]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": words}), tmp_path / "a.parquet")
    assert [text for _, text in read("parquet", tmp_path / "a.parquet")] == ["é", "b", "é"]


@pytest.mark.promise(
    text="A fault in a parquet file is named with the file and the row",
    expected="status 2, one line",
)
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": latin(2500, 2100)}, r"a.parquet:2101: byte 4 of a text is not UTF-8 \(0xe9\)"),
        ({"text": latin(2, 1).cast(pyarrow.binary())}, r"a.parquet:2: byte 4 of a text is not UTF-8 \(0xe9\)"),
        ({"text": [1, 2]}, r"a.parquet:1: 'text' holds int, not text"),
        ({"text": [["a"], ["b"]]}, r"a.parquet:1: 'text' holds list, not text"),
        ({"text": [{"a": "b"}]}, r"a.parquet:1: 'text' holds dict, not text"),
        ({"body": ["a"]}, r"a.parquet: has no column 'text', only body; set text_key"),
    ],
)
def test_bad_parquet_is_named(tmp_path: Path, columns: Any, message: str, record_property: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message) as caught:
        read("parquet", tmp_path / "a.parquet")
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns 'text'; rename one of them"):
        read("parquet", tmp_path / "a.parquet")


ODD = [
    "exp[1]",
    "a*b",
    "w?",
    "{x,y}",
    "#1",
    "50%",
    "two words ",
    "-dash",
    "größe 世界",
    "a::b",
    "$HOME",
    "[!a]",
    "\nline",
]


@pytest.mark.promise(
    text="A path is read as it is written, whatever characters it holds; only what does not exist is a pattern",
    expected="the files named, and no others",
)
@pytest.mark.parametrize("name", ODD)
def test_paths_with_odd_characters(tmp_path: Path, name: str, record_property: Any, monkeypatch: Any) -> None:
    folder = tmp_path / name
    for where, text in (
        (folder / f"{name}.jsonl", "a"),
        (folder / "b.jsonl", "b"),
        (tmp_path / "exp1" / "b.jsonl", "no"),
    ):
        where.parent.mkdir(exist_ok=True)
        write_jsonl(where, [{"text": text}])
    assert [text for _, text in read("jsonl", folder / f"{name}.jsonl")] == ["a"]
    assert sorted(text for _, text in read("jsonl", folder / "*.jsonl")) == ["a", "b"]
    monkeypatch.chdir(tmp_path)  # a path that begins with the odd name
    assert [text for _, text in read("jsonl", Path(name) / "b.jsonl")] == ["b"]
    record_property("seen", "the files named, and no others")


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "caf\udce9.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match=r"caf\\udce9.jsonl' is not UTF-8; rename it"):
        read("jsonl", tmp_path / "*.jsonl")
