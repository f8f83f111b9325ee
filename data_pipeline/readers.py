"""datatrove readers of text, JSON lines and parquet that raise a one-line :class:`UserError` at every fault.

datatrove's own readers skip a broken JSON line with a warning. Lost text must be noticed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow
import pyarrow.parquet
from datatrove.data import Document
from datatrove.pipeline.readers.base import BaseDiskReader

from data_pipeline.compression import open_binary, readable, refuse_foreign
from looplm.failures import UserError

Record = dict[str, Any]  # a JSON object or a row of a table

_BOM = b"\xef\xbb\xbf"
_ROWS = 1000  # rows of a table read at a time


class SourceReader(BaseDiskReader):
    """Base of the readers. Documents without text are counted as dropped."""

    def path_of(self, name: str) -> Path:
        return Path(self.data_folder.resolve_paths(name))

    def document_of(self, record: Record, name: str, index: int) -> Iterator[Document]:
        document = self.get_document_from_dict(record, name, index)
        if document is None:
            self.stat_update("dropped_without_text")
        else:
            yield document

    def check_start(self, name: str) -> None:
        """Raise a :class:`UserError` if the file cannot be read, or its first record is at fault."""
        next(self.read_file(name), None)


class TextReader(SourceReader):
    """Reader of one document per UTF-8 file, without its byte order mark and with ``\\n`` as line end."""

    name = "📄 Text"

    def __init__(self, *args: Any, skip_undecodable: bool, **options: Any) -> None:
        super().__init__(*args, **options)
        self.skip_undecodable = skip_undecodable

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = self.path_of(filepath)
        with readable(path), open_binary(path) as stream:
            data = stream.read()
        try:
            if not self.skip_undecodable:
                refuse_foreign(path, data[:512])
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            if not self.skip_undecodable:
                raise UserError(f"{path}: byte {error.start} is not UTF-8; convert the file or leave it out") from error
            self.stat_update("dropped_not_utf8")
            return
        text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        yield from self.document_of({"text": text}, filepath, 0)

    def check_start(self, name: str) -> None:
        path = self.path_of(name)
        with readable(path), open_binary(path) as stream:
            head = stream.read(512)
        if not self.skip_undecodable:
            refuse_foreign(path, head)


class JsonLinesReader(SourceReader):
    """Reader of one document per line, which raises at a line that is not a JSON object with a text.

    Args:
        once: keys that may not appear twice in an object, because only one of their values could be read.
    """

    name = "🐿 Checked jsonl"

    def __init__(self, *args: Any, once: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.once = once

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = self.path_of(filepath)
        with readable(path), open_binary(path) as stream:
            for number, line in enumerate(stream):
                if number == 0:
                    refuse_foreign(path, line[:512])
                line = line.removeprefix(_BOM)
                if not line.strip():
                    continue
                where = f"{path}:{number + 1}"
                record, is_checked = _parse(line, where, self.once)
                if not isinstance(record, dict):
                    fix = "give one JSON object per line"
                    raise UserError(f"{where}: holds {type(record).__name__}, not an object; {fix}")
                for document in self.document_of(record, filepath, number):
                    if not is_checked:
                        _refuse_surrogates(document, where)
                    yield document


class ParquetReader(SourceReader):
    """Reader of one document per row.

    Args:
        columns: the columns that it reads.
        optional: columns that it also reads where a file has them.
    """

    name = "📒 Checked parquet"

    def __init__(self, *args: Any, columns: tuple[str, ...], optional: tuple[str, ...] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self.columns, self.optional = columns, optional

    def read_file(self, filepath: str) -> Iterator[Document]:
        path, first = self.path_of(filepath), 0
        with readable(path), pyarrow.parquet.ParquetFile(path) as table:
            columns = self._columns_of(table, path)
            for batch in table.iter_batches(batch_size=_ROWS, columns=columns):
                for index, record in enumerate(_rows(batch, path, first)):
                    yield from self.document_of(record, filepath, first + index)
                first += batch.num_rows

    def check_start(self, name: str) -> None:
        """Check the columns alone: the first record lies in a row group, which would be read whole."""
        path = self.path_of(name)
        with readable(path), pyarrow.parquet.ParquetFile(path) as table:
            self._columns_of(table, path)

    def _columns_of(self, table: pyarrow.parquet.ParquetFile, path: Path) -> list[str]:
        names = table.schema_arrow.names
        columns = [*self.columns, *(name for name in self.optional if name in {*names} - {*self.columns})]
        for column in columns:
            if column not in names:
                raise UserError(f"{path}: has no column {column!r}, only {', '.join(names)}; set text_key")
            if names.count(column) > 1:
                raise UserError(f"{path}: has {names.count(column)} columns {column!r}; rename one of them")
        return columns


def _parse(line: bytes, where: str, once: tuple[str, ...]) -> tuple[Any, bool]:
    """Return a line's value, and False if it may hold halves of surrogate pairs.

    orjson is fast, but refuses NaN, Infinity and such halves also under keys that nobody reads, and of two equal keys
    it takes the last without a word. The standard library reads those lines.
    """
    try:
        if not any(line.count(b'"%s"' % key.encode()) > 1 for key in once):
            return orjson.loads(line), True
        reason = "unknown"
    except orjson.JSONDecodeError as error:
        reason = error.msg
    try:
        return json.loads(line.decode(), object_pairs_hook=lambda pairs: _object(pairs, where, once)), False
    except UnicodeDecodeError as error:
        fix = "convert the file to UTF-8, or fix or remove the line"
        raise UserError(f"{where}: byte {error.start + 1} of the line is not UTF-8; {fix}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({reason}); fix or remove the line") from error


def _object(pairs: list[tuple[str, Any]], where: str, once: tuple[str, ...]) -> Record:
    values = dict(pairs)
    for key in once if len(values) < len(pairs) else ():
        if sum(name == key for name, _ in pairs) > 1:
            raise UserError(f"{where}: has the key {key!r} twice; fix or remove the line")
    return values


def _refuse_surrogates(document: Document, where: str) -> None:
    try:
        json.dumps([document.text, document.metadata], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = str(error.object)[error.start]
        raise UserError(f"{where}: \\u{ord(half):04x} is half of a surrogate pair; fix or remove the line") from error


def _rows(batch: pyarrow.RecordBatch, path: Path, first: int) -> list[Record]:
    """Return the rows of a batch; bytes that are not UTF-8 raise, with their row counted from 1 at the file's start."""
    try:
        return [_decoded(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        pass
    for index in range(batch.num_rows):  # find the row
        try:
            _decoded(batch.slice(index, 1).to_pylist()[0])
        except UnicodeDecodeError as error:
            fault = f"byte {error.start + 1} of a text is not UTF-8 (0x{error.object[error.start]:02x})"
            fix = "convert the column to UTF-8, or leave the row out"
            raise UserError(f"{path}:{first + index + 1}: {fault}; {fix}") from error
    raise AssertionError("a fault in a batch is in one of its rows")


def _decoded(row: Record) -> Record:
    return {key: value.decode() if isinstance(value, bytes) else value for key, value in row.items()}
