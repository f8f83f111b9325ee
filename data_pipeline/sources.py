"""Readers of python-stdlib, text, jsonl and parquet sources, plain text or conversations, that refuse damaged files.

datatrove's own readers skip a broken JSON line with a warning, and zstandard's ends silently after the first frame and
at a truncated end. Lost text must be noticed, so files are opened here and every fault is a one-line
:class:`UserError`.
"""

import io
import json
import os
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson
import pyarrow
import pyarrow.parquet
from datatrove.data import Document
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader

from data_pipeline.config import ChatConfig, SourceConfig
from looplm.chat import ANSWERS, ROLES, Message
from looplm.cli import UserError

Record = dict[str, Any]  # a JSON object or a row of a table

MESSAGES = "messages"  # key of a conversation in a document's metadata: [role, content] pairs
_ROLE_NAMES = {**{role: role for role in ROLES}, "human": "user", "gpt": "assistant"}  # the last two are ShareGPT's
_COMPRESSION = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_INSTALLED = {"site-packages", "dist-packages"}  # inside the standard library's folder, but different on every machine


def find_files(source: SourceConfig) -> list[Path]:
    """Return the source's files, absolute and sorted.

    Raises:
        UserError: a path or glob matches no file.
    """
    if source.kind == "python-stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for path in library.rglob("*.py") if not _INSTALLED & set(path.parts))
        if not files:
            raise UserError(f"sources.{source.name}: {library} holds no source files; use an interpreter that has them")
        return files
    found: set[Path] = set()
    for pattern in source.paths:
        names = [pattern] if os.path.exists(pattern) else glob(pattern, recursive=True)
        matches = [Path(os.path.abspath(name)) for name in names if os.path.isfile(name)]
        if not matches:
            fix = "give a file or a glob such as DIR/*.jsonl.gz"
            raise UserError(f"sources.{source.name}.paths: {pattern!r} matches no file; {fix}")
        found.update(matches)
    return sorted(found)


def check_files(source: SourceConfig, files: list[Path]) -> None:
    """Raise a :class:`UserError` if a file is empty, damaged at its start, or lacks the text key in its first record.

    The reading step, which comes first, finds faults further in.
    """
    reader = make_reader(source, files)
    for path, name in zip(files, _relative(files), strict=True):
        with _readable(path):
            if source.kind != "python-stdlib" and path.stat().st_size == 0:
                raise UserError(f"{path}: is empty; remove it from sources.{source.name}.paths or write it again")
            if source.kind in ("jsonl", "parquet"):
                next(reader.read_file(name), None)
            else:
                with open_binary(path) as stream:
                    stream.read(1)


def make_reader(source: SourceConfig, files: list[Path], paths_file: Path | None = None) -> BaseDiskReader:
    """Return the datatrove reader of ``files``.

    Args:
        paths_file: file to write, a list of ``files`` relative to their common folder, from which datatrove assigns
            files to its tasks. Document ids start with that relative path, so they are the same wherever the data is.
    """
    if paths_file is not None:
        paths_file.write_text("".join(f"{name}\n" for name in _relative(files)), encoding="utf-8")
    options: dict[str, Any] = {
        "data_folder": str(common_folder(files)),
        "paths_file": str(paths_file) if paths_file else None,
        "limit": -1 if source.limit is None else source.limit,
        "text_key": source.text_key if source.chat is None else source.chat.keys[0],
        "adapter": partial(_adapt, source.chat),
        "default_metadata": {"source": source.name},
    }
    if source.kind == "jsonl":
        return JsonLinesReader(**options)
    if source.kind == "parquet":
        several = source.chat is not None and len(source.chat.keys) > 1
        return CheckedParquetReader(read_metadata=several, **options)  # which reads all columns
    return TextReader(skip_undecodable=source.kind == "python-stdlib", **(options | {"text_key": "text"}))


def read_documents(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    """Return the source's documents, unfiltered, read in this process."""
    return make_reader(source, files).read_files_shard(_relative(files))


class TextReader(BaseDiskReader):
    """Reader of one document per UTF-8 file, without its byte order mark and with ``\\n`` as line end."""

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
    """Reader of one document per line, which raises at a line that is not a JSON object with a text."""

    name = "🐿 Checked jsonl"

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = Path(self.data_folder.resolve_paths(filepath))
        with _readable(path), open_binary(path) as stream:
            for number, line in enumerate(stream):
                if not line.strip():
                    continue
                where = f"{path}:{number + 1}"
                try:
                    record = orjson.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(f"{where}: not valid JSON ({error.msg}); fix or remove the line") from error
                if not isinstance(record, dict):
                    raise UserError(f"{where}: holds {type(record).__name__}, not an object; fix or remove the line")
                document = self.get_document_from_dict(record, filepath, number)
                if document is not None:
                    yield document


class CheckedParquetReader(ParquetReader):
    """datatrove's reader, after a check of the schema: a missing column would be read as documents without text."""

    name = "📒 Checked parquet"

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = Path(self.data_folder.resolve_paths(filepath))
        with _readable(path):
            columns = pyarrow.parquet.read_schema(path).names
            if self.text_key not in columns:
                raise UserError(f"{path}: has no column {self.text_key!r}, only {', '.join(columns)}; set text_key")
            yield from super().read_file(filepath)


def _adapt(chat: ChatConfig | None, self: BaseDiskReader, data: Record, path: str, id_in_file: int) -> dict[str, Any]:
    """Return a document's id, text and metadata from a record, as datatrove's hook ``adapter``; null is no text."""
    where = f"{self.data_folder.resolve_paths(path)}:{id_in_file + 1}"
    document_id = str(data.get(self.id_key, f"{path}/{id_in_file}"))
    if chat is not None:
        messages = read_conversation(data, chat, where)
        text = "\n\n".join(message.content for message in messages)  # for length, duplicates and tokenizer training
        return {"id": document_id, "text": text or "\n", "metadata": {MESSAGES: [list(pair) for pair in messages]}}
    if self.text_key not in data:
        raise UserError(f"{where}: no key {self.text_key!r}, only {', '.join(map(str, data))}; set text_key")
    text = data[self.text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {self.text_key!r} holds {type(text).__name__}, not text; fix it or set text_key")
    return {"id": document_id, "text": text, "metadata": {}}


def read_conversation(record: Record, chat: ChatConfig, where: str) -> list[Message]:
    """Return the messages of a record; ``where`` is FILE:LINE, for error messages.

    Raises:
        UserError: not a list of messages, an unknown role, or content that is not text.
    """
    for key in chat.keys:
        if key not in record:
            found = ", ".join(map(str, record))
            raise UserError(f"{where}: no key {key!r}, only {found}; name the right one under chat")
    if chat.messages_key is not None:
        return _messages(record[chat.messages_key], where)
    question, answer = (record[key] for key in chat.keys)
    prompt = [Message("user", question)] if isinstance(question, str) else _messages(question, where)
    return [*prompt, *_messages([{"role": ANSWERS, "content": answer}], where)]


def _messages(value: object, where: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: holds {type(value).__name__}, not a list of messages; fix or remove the line")
    messages = []
    for number, entry in enumerate(value, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: message {number} is {type(entry).__name__}, not an object with role and content")
        role, content = (entry.get(key, entry.get(other)) for key, other in (("role", "from"), ("content", "value")))
        if role not in _ROLE_NAMES:
            raise UserError(f"{where}: message {number} has the role {role!r}; give one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise UserError(f"{where}: message {number} holds {type(content).__name__}, not text; fix the line")
        messages.append(Message(_ROLE_NAMES[role], content))
    return messages


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name ends in .gz, .zst or .zstd; a truncated one raises OSError."""
    stream = pyarrow.input_stream(str(path), compression=_COMPRESSION.get(path.suffix))
    return cast(BinaryIO, io.BufferedReader(stream, 1 << 20))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise UserError(f"{path}: damaged, truncated or not readable ({reason}); write the file again") from error


def common_folder(files: list[Path]) -> Path:
    """Return the innermost folder that contains all files."""
    return Path(os.path.commonpath([path.parent for path in files]))


def _relative(files: list[Path]) -> list[str]:
    root = common_folder(files)
    return [os.path.relpath(path, root) for path in files]
