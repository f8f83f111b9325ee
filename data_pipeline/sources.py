"""Sources of text: python-stdlib, text, jsonl and parquet, plain text or conversations."""

import os
import sysconfig
from collections.abc import Iterator
from functools import partial
from glob import escape, glob
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader

from data_pipeline.config import ChatConfig, SourceConfig
from data_pipeline.conversations import MESSAGE_KEYS, MESSAGES, RECORD_KEYS, read_conversation
from data_pipeline.folders import Folder
from data_pipeline.readers import JsonLinesReader, ParquetReader, Record, SourceReader, TextReader
from looplm.failures import UserError
from looplm.files import is_unicode

_INSTALLED = {"site-packages", "dist-packages"}  # inside the standard library's folder, but different on every machine


def find_files(source: SourceConfig) -> list[Path]:
    """Return the source's files, absolute and sorted.

    Raises:
        UserError: a path or glob matches no file, or the name of a file is not UTF-8.
    """
    if source.kind == "python-stdlib":
        library = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(path for path in library.rglob("*.py") if not _INSTALLED & set(path.parts))
        if not files:
            raise UserError(f"sources.{source.name}: {library} holds no source files; use an interpreter that has them")
        return files
    found: set[Path] = set()
    for pattern in source.paths:
        names = glob(_literal_start(pattern), recursive=True)
        matches = [Path(os.path.abspath(name)) for name in names if os.path.isfile(name)]
        if not matches:
            fix = "give a file or a glob such as DIR/*.jsonl.gz"
            raise UserError(f"sources.{source.name}.paths: {pattern!r} matches no file; {fix}")
        for path in matches:
            if not is_unicode(str(path)):
                raise UserError(f"sources.{source.name}.paths: the name of {str(path)!r} is not UTF-8; rename it")
        found.update(matches)
    return sorted(found)


def _literal_start(pattern: str) -> str:
    """Return the pattern with the characters of globs escaped in its longest start that exists under that name."""
    parts = pattern.split("/")
    for size in range(len(parts), 0, -1):
        start = "/".join(parts[:size])
        if start and os.path.lexists(start):
            return "/".join([escape(start), *parts[size:]])
    return pattern


def check_files(source: SourceConfig, files: list[Path]) -> None:
    """Raise a :class:`UserError` if a file is empty, damaged at its start, or lacks the text key there.

    The reading step, which comes first, finds faults further in.
    """
    reader = make_reader(source, files)
    for path, name in zip(files, _relative(files), strict=True):
        if source.kind != "python-stdlib" and path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; remove it from sources.{source.name}.paths or write it again")
        reader.check_start(name)


def make_reader(source: SourceConfig, files: list[Path]) -> SourceReader:
    """Return the datatrove reader of ``files``, which it divides among its tasks.

    Document ids start with the path relative to the files' common folder, so they are the same wherever the data is.
    """
    keys = (source.text_key,) if source.chat is None else source.chat.keys
    options: dict[str, Any] = {
        "data_folder": Folder(str(common_folder(files)), tuple(_relative(files))),
        "limit": -1 if source.limit is None else source.limit,
        "text_key": keys[0],
        "adapter": partial(_adapt, source.chat),
        "default_metadata": {"source": source.name},
    }
    if source.kind == "jsonl":
        return JsonLinesReader(once=keys if source.chat is None else keys + RECORD_KEYS + MESSAGE_KEYS, **options)
    if source.kind == "parquet":
        return ParquetReader(columns=keys, optional=() if source.chat is None else RECORD_KEYS, **options)
    return TextReader(skip_undecodable=source.kind == "python-stdlib", **(options | {"text_key": "text"}))


def read_documents(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    """Return the source's documents, unfiltered, read in this process."""
    return make_reader(source, files).read_files_shard(_relative(files))


def _adapt(chat: ChatConfig | None, self: BaseDiskReader, data: Record, path: str, id_in_file: int) -> dict[str, Any]:
    """Return a document's id, text and metadata from a record, as datatrove's hook ``adapter``; null is no text."""
    where = f"{self.data_folder.resolve_paths(path)}:{id_in_file + 1}"
    document_id = f"{path}/{id_in_file}"
    if chat is not None:
        messages = read_conversation(data, chat, where)
        text = "\n\n".join(message.content for message in messages)  # for length, duplicates and tokenizer training
        return {
            "id": document_id,
            "text": text or "\n",
            "metadata": {MESSAGES: [list(message) for message in messages]},
        }
    if self.text_key not in data:
        raise UserError(f"{where}: no key {self.text_key!r}, only {', '.join(map(str, data))}; set text_key")
    text = data[self.text_key]
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {self.text_key!r} holds {type(text).__name__}, not text; fix it or set text_key")
    return {"id": document_id, "text": text, "metadata": {}}


def common_folder(files: list[Path]) -> Path:
    """Return the innermost folder that contains all files."""
    return Path(os.path.commonpath([path.parent for path in files]))


def _relative(files: list[Path]) -> list[str]:
    root = common_folder(files)
    return [os.path.relpath(path, root) for path in files]
