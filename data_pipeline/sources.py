"""The readers: python-stdlib, text, jsonl and parquet files, as datatrove readers that refuse what is damaged.

datatrove's own readers skip a broken JSON line with a warning, and fsspec's zstd stream ends quietly where a truncated
file ends. Lost text should be noticed, so files are opened here and every fault is one :class:`UserError`.
"""

import gzip
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow
import pyarrow.parquet
import zstandard
from datatrove.data import Document
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data_pipeline.chat import as_document, read_conversation
from data_pipeline.config import ChatConfig, SourceConfig
from looplm.cli import UserError


def find_files(source: SourceConfig) -> list[Path]:
    """The source's files, absolute and sorted.

    Raises:
        UserError: a path or glob that matches no file.
    """
    if source.kind == "python-stdlib":
        return _stdlib_files(source)
    found: set[Path] = set()
    for pattern in source.paths:
        names = [pattern] if os.path.exists(pattern) else glob(pattern, recursive=True)
        files = [Path(os.path.abspath(name)) for name in names if os.path.isfile(name)]
        if not files:
            fix = "give a file or a glob such as DIR/*.jsonl.gz"
            raise UserError(f"sources.{source.name}.paths: {pattern!r} matches no file; {fix}")
        found.update(files)
    return sorted(found)


def check_files(source: SourceConfig, files: list[Path]) -> None:
    """Look at the head of every file: what is empty, damaged from the start or lacks the text key is refused here.

    A fault further in stops the reading stage, the first one.
    """
    root, reader = common_folder(files), make_reader(source, files)
    for path in files:
        with _readable(path):
            if source.kind == "python-stdlib":
                path.open("rb").close()
            elif path.stat().st_size == 0:
                raise UserError(f"{path}: is empty; take it out of sources.{source.name}.paths or write it again")
            elif source.kind == "text":
                with open_binary(path) as stream:
                    stream.read(1)
            else:
                next(reader.read_file(os.path.relpath(path, root)), None)


def make_reader(source: SourceConfig, files: list[Path], paths_file: Path | None = None) -> BaseDiskReader:
    """The datatrove reader of ``files``.

    Args:
        paths_file: is written: the files, one a line, relative to their common folder, as datatrove deals them out to
            its tasks. Document ids start with that relative path, so they do not depend on where the data lies.
    """
    root = common_folder(files)
    if paths_file is not None:
        paths_file.write_text("".join(f"{os.path.relpath(path, root)}\n" for path in files), encoding="utf-8")
    options: dict[str, Any] = {
        "data_folder": str(root),
        "paths_file": str(paths_file) if paths_file else None,
        "limit": -1 if source.limit is None else source.limit,
        "text_key": source.text_key if source.chat is None else source.chat.keys[0],
        "adapter": _adapt if source.chat is None else partial(_adapt_conversation, source.chat),
        "default_metadata": {"source": source.name},
    }
    if source.kind == "jsonl":
        return JsonLinesReader(**options)
    if source.kind == "parquet":
        several = source.chat is not None and len(source.chat.keys) > 1
        return CheckedParquetReader(read_metadata=several, **options)  # then all columns are read
    return TextReader(skip_undecodable=source.kind == "python-stdlib", **(options | {"text_key": "text"}))


def read_documents(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    """The source's documents, unfiltered, in this process."""
    root = common_folder(files)
    return make_reader(source, files).read_files_shard([os.path.relpath(path, root) for path in files])


class TextReader(BaseDiskReader):
    """One document per UTF-8 file, without byte order mark, line ends made ``\\n``."""

    name = "📄 Text"

    def __init__(self, *args: Any, skip_undecodable: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.skip_undecodable = skip_undecodable

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = Path(self.data_folder.resolve_paths(filepath))
        with _readable(path), open_binary(path) as stream:
            data = stream.read()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if not self.skip_undecodable:
                raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file or leave it out") from error
            self.stat_update("undecodable")
            return
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        document = self.get_document_from_dict({"text": text, "id": filepath}, filepath, 0)
        if document is not None:
            yield document


class JsonLinesReader(BaseDiskReader):
    """One document per line; a line that is not a JSON object with a text stops the run."""

    name = "🐿 Checked jsonl"

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = Path(self.data_folder.resolve_paths(filepath))
        with _readable(path), open_binary(path) as stream:
            for number, line in enumerate(stream):
                if not line.strip():
                    continue
                try:
                    record = orjson.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{path}:{number + 1}: not valid JSON ({error.msg}); mend or remove the line"
                    ) from error
                if not isinstance(record, dict):
                    raise UserError(f"{path}:{number + 1}: holds {type(record).__name__}, not an object with a text")
                document = self.get_document_from_dict(record, filepath, number)
                if document is not None:
                    yield document


class CheckedParquetReader(ParquetReader):
    """datatrove's, with a look at the schema first: a missing column would read as documents without text."""

    name = "📒 Checked parquet"

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = Path(self.data_folder.resolve_paths(filepath))
        with _readable(path):
            schema = pyarrow.parquet.read_schema(path)
            if self.text_key not in schema.names:
                raise UserError(
                    f"{path}: has no column {self.text_key!r}, only {', '.join(schema.names)}; set text_key"
                )
            yield from super().read_file(filepath)


def _adapt(self: BaseDiskReader, data: dict[str, Any], path: str, id_in_file: int) -> dict[str, Any]:
    """datatrove's hook from a record to a document: text and id, no other metadata. Null counts as no text."""
    where = f"{self.data_folder.resolve_paths(path)}:{id_in_file + 1}"
    if self.text_key not in data:
        raise UserError(f"{where}: no key {self.text_key!r}, only {', '.join(map(str, data))}; set text_key")
    text = data[self.text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {self.text_key!r} holds {type(text).__name__}, not text")
    return {"text": text, "id": str(data.get(self.id_key, f"{path}/{id_in_file}")), "metadata": {}}


def _adapt_conversation(
    chat: ChatConfig, self: BaseDiskReader, data: dict[str, Any], path: str, id_in_file: int
) -> dict[str, Any]:
    """The same for a record that holds a conversation."""
    messages = read_conversation(data, chat, f"{self.data_folder.resolve_paths(path)}:{id_in_file + 1}")
    return {"id": str(data.get(self.id_key, f"{path}/{id_in_file}")), **as_document(messages)}


def open_binary(path: Path) -> BinaryIO:
    """The file's bytes, unpacked where the name ends in .gz, .zst or .zstd. A truncated pack raises EOFError when read."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix in (".zst", ".zstd"):
        return io.BufferedReader(_ZstdStream(path.open("rb")))
    return path.open("rb")


class _ZstdStream(io.RawIOBase):
    """Unpacks zstd frame after frame. (zstandard's reader stops after the first, and does not mind a missing end.)"""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._frame, self._inside = packed, zstandard.ZstdDecompressor().decompressobj(), False
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._packed.read(1 << 20)
            if not self._input:
                if self._inside:
                    raise EOFError("the last zstd frame does not end")
                return 0
            self._inside = True
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._inside = self._frame.unused_data, False
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._output))
        buffer[:size], self._output = self._output[:size], self._output[size:]
        return size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, zstandard.ZstdError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, truncated or not readable ({reason}); write the file again") from error


def _stdlib_files(source: SourceConfig) -> list[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    packages = {"site-packages", "dist-packages"}  # what was installed beside it differs from machine to machine
    files = sorted(path for path in library.rglob("*.py") if not packages & set(path.parts))
    if not files:
        raise UserError(f"sources.{source.name}: {library} holds no source files; use an interpreter that has them")
    return files


def common_folder(files: list[Path]) -> Path:
    """The innermost folder that holds all files."""
    return Path(os.path.commonpath([path.parent for path in files]))
