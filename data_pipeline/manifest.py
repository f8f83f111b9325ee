"""PREFIX.manifest.json: what a prefix holds, and whether the files beside it still are those that were written."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data_pipeline.index_file import IndexFile, read_index
from data_pipeline.loss_marks import unmark
from looplm import chat
from looplm.cli import UserError, from_dict
from looplm.files import sha256_of, write_whole

_BLOCK = 1 << 24  # tokens read at a time


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer a prefix was made with.

    Args:
        path: the tokenizer.json, relative to the manifest's folder.
        sha256: of that file.
        bos_id: beginning of a sequence; None where the tokenizer has none. Not in the data.
        eos_id: ends every document.
        pad_id: filler; not in the data.
    """

    path: str
    sha256: str
    bos_id: int | None
    eos_id: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """What a prefix of conversations says of them.

    Args:
        template: name of the chat template they were written in.
        end_id: the token that ends an answer.
        answer_tokens: tokens that are learnt: the answers with their ends.
    """

    template: str
    end_id: int
    answer_tokens: int


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and content of one file.

    Args:
        bytes: its size.
        sha256: of its content.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How much of something there is.

    Args:
        documents: number of documents.
        tokens: number of tokens, the eos of each document included.
    """

    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prefix holds.

    Args:
        documents: number of documents.
        tokens: number of tokens, the eos of each document included.
        vocab_size: one more than the largest id the tokenizer can give.
        split: train or valid.
        sources: what each source gave.
        tokenizer: what the ids mean.
        files: the .bin and the .idx by name.
        fingerprint: SHA-256 over content and tokenizer: equal fingerprints mean equal data.
        config_sha256: of the settings and input files, see data_pipeline.json beside.
        chat: None where the documents are plain text.
    """

    documents: int
    tokens: int
    vocab_size: int
    split: str
    sources: dict[str, Counts]
    tokenizer: TokenizerRecord
    files: dict[str, FileRecord]
    fingerprint: str
    config_sha256: str
    chat: ChatRecord | None = None


def manifest_path(prefix: str | Path) -> Path:
    """PREFIX.manifest.json."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(
    prefix: Path,
    *,
    source: str,
    split: str,
    vocab_size: int,
    tokenizer: TokenizerRecord,
    config_sha256: str,
    end_id: int | None = None,
) -> Manifest:
    """Describe the whole and finished PREFIX.bin and PREFIX.idx, atomically; ``end_id`` if they hold conversations."""
    index = read_index(Path(f"{prefix}.idx"))
    counts = Counts(documents=index.documents, tokens=index.tokens)
    files = {
        path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    }
    manifest = Manifest(
        documents=counts.documents,
        tokens=counts.tokens,
        vocab_size=vocab_size,
        split=split,
        sources={source: counts},
        tokenizer=tokenizer,
        files=files,
        fingerprint=_fingerprint(files, tokenizer),
        config_sha256=config_sha256,
        chat=None if end_id is None else _describe_chat(prefix, index, end_id),
    )
    write_whole(manifest_path(prefix), json.dumps(asdict(manifest), indent=2) + "\n")
    return manifest


def read_manifest(prefix: str | Path) -> Manifest:
    """The prefix's manifest.

    Raises:
        UserError: it is missing, not JSON, or not a manifest.
    """
    path = manifest_path(prefix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fix = "give a prefix written by data_pipeline.tokenize, without .bin"
        raise UserError(f"{path}: cannot be read ({error.strerror}); {fix}") from error
    except ValueError as error:
        raise _broken(path, f"not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise _broken(path, "not a manifest")
    return from_dict(Manifest, values, where=str(path))


def describe(manifest: Manifest) -> str:
    """How much a prefix holds, for the terminal."""
    kind, learnt = ("documents", "") if manifest.chat is None else ("conversations", f", {manifest.chat.answer_tokens:,} learnt")  # fmt: skip
    return f"{manifest.documents:,} {kind}, {manifest.tokens:,} tokens{learnt}"


def check_prefix(prefix: str | Path, deep: bool) -> Manifest:
    """Check the files beside the manifest against it.

    Args:
        deep: also read everything: hashes, ids below the vocabulary, an eos at the end of every document. Without it
            the time does not depend on the amount of data.

    Raises:
        UserError: the first difference.
    """
    manifest, folder = read_manifest(prefix), Path(prefix).parent
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    if set(manifest.files) != {bin_path.name, idx_path.name}:
        raise _broken(manifest_path(prefix), f"describes {' and '.join(manifest.files)}, which were renamed")
    for name, record in manifest.files.items():
        if not (folder / name).is_file():
            raise _broken(folder / name, "is missing")
        if (size := (folder / name).stat().st_size) != record.bytes:
            raise _broken(folder / name, f"{size} bytes, the manifest says {record.bytes}; truncated or replaced")
    if not manifest.documents:
        raise _broken(manifest_path(prefix), "describes no document")
    index = read_index(idx_path)
    found = (index.documents, index.tokens, index.bin_bytes)
    told = (manifest.documents, manifest.tokens, manifest.files[bin_path.name].bytes)
    if found != told:
        raise _broken(idx_path, f"documents, tokens, bytes are {found}, not {told}; it belongs to another data set")
    tokenizer_path = folder / manifest.tokenizer.path
    if not tokenizer_path.is_file():
        raise _broken(tokenizer_path, "the tokenizer is missing", "put it back or build the data again")
    if sha256_of(tokenizer_path) != manifest.tokenizer.sha256:
        raise _broken(tokenizer_path, f"not the tokenizer that {prefix} was made with", "put that one back")
    if deep:
        _check_content(manifest, bin_path, index)
    return manifest


def _check_content(manifest: Manifest, bin_path: Path, index: IndexFile) -> None:
    for name, record in manifest.files.items():
        if sha256_of(bin_path.parent / name) != record.sha256:
            raise _broken(bin_path.parent / name, "its content is not what was written")
    if manifest.fingerprint != _fingerprint(manifest.files, manifest.tokenizer):
        raise _broken(manifest_path(bin_path.with_suffix("")), "its fingerprint is not that of the files")
    size, eos, learnt = manifest.vocab_size, manifest.tokenizer.eos_id, 0
    with bin_path.open("rb") as stream:
        while (tokens := np.fromfile(stream, index.dtype, _BLOCK)).size:
            if manifest.chat is not None:
                tokens, learnt_N = unmark(tokens)
                learnt += int(learnt_N.sum())
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= size:
                raise _broken(bin_path, f"holds token id {low if low < 0 else high}, the vocabulary has {size}")
    if manifest.chat is not None and learnt != manifest.chat.answer_tokens:
        raise _broken(bin_path, f"marks {learnt} tokens as learnt, the manifest says {manifest.chat.answer_tokens}")
    ends = np.cumsum(index.lengths(), dtype=np.int64)
    data = np.memmap(bin_path, index.dtype, mode="r")
    last = data[ends - 1] if manifest.chat is None else unmark(data[ends - 1])[0]
    if int(ends[-1]) != data.size or bool((last != eos).any()):
        raise _broken(bin_path, f"a document does not end in eos ({eos}); the index belongs to another data set")


def _describe_chat(prefix: Path, index: IndexFile, end_id: int) -> ChatRecord:
    learnt = 0
    with Path(f"{prefix}.bin").open("rb") as stream:
        while (tokens := np.fromfile(stream, index.dtype, _BLOCK)).size:
            learnt += int(unmark(tokens)[1].sum())
    return ChatRecord(template=chat.NAME, end_id=end_id, answer_tokens=learnt)


def _broken(path: Path, what: str, fix: str = "build the data again") -> UserError:
    return UserError(f"{path}: {what}; {fix}")


def _fingerprint(files: dict[str, FileRecord], tokenizer: TokenizerRecord) -> str:
    """Over content alone: the same data under another name has the same fingerprint."""
    parts = [files[name].sha256 for name in sorted(files)] + [tokenizer.sha256]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
