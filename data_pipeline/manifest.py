"""PREFIX.manifest.json: the contents of a prefix, by which :mod:`data_pipeline.verify` checks its files."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_pipeline.token_file import read_blocks, read_index, unmark
from looplm import chat
from looplm.cli import from_dict
from looplm.files import sha256_of, write_whole
from looplm.json_file import read_object


@dataclass(frozen=True, kw_only=True)
class TokenizerRecord:
    """The tokenizer of a prefix."""

    path: str  # the tokenizer.json, relative to the manifest's folder
    sha256: str
    bos_id: int | None  # beginning of a sequence; None if the tokenizer has no such token
    eos_id: int  # end of every document
    pad_id: int  # padding, not in the data
    begin_id: int | None = None  # before each plain text: the bos that the tokenizer adds, or eos; None if it adds none


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """The conversations of a prefix."""

    template: str  # name of our chat template, or file of an imported one in the manifest's folder
    end_id: int  # the token that ends an answer
    answer_tokens: int  # tokens with loss: the answers including their ends
    template_sha256: str | None = None  # of that file


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size and content of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Number of documents, and of tokens including the eos of each document."""

    documents: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of a prefix. The numbers of documents and tokens are those of :class:`Counts`, over all sources."""

    documents: int
    tokens: int
    vocab_size: int  # one more than the largest id of the tokenizer
    split: str  # train or valid
    sources: dict[str, Counts]
    tokenizer: TokenizerRecord
    files: dict[str, FileRecord]  # the .bin and the .idx by name
    fingerprint: str  # SHA-256 over content and tokenizer; equal fingerprints mean equal data
    config_sha256: str  # hash of the settings and input files in data_pipeline.json, in the same folder
    chat: ChatRecord | None = None  # None if the documents are plain text
    max_id: int | None = None  # largest token id in the .bin; None in manifests of older versions
    unknown_tokens: int = 0  # tokens that stand for text that the tokenizer does not know
    lost_characters: int = 0  # characters that the tokenizer dropped

    def describe(self) -> str:
        """Return the amount of data in words, for the terminal."""
        amounts = [(self.documents, "documents" if self.chat is None else "conversations"), (self.tokens, "tokens")]
        if self.chat is not None:
            amounts.append((self.chat.answer_tokens, "learned"))
        lacking = [(self.unknown_tokens, "unknown tokens"), (self.lost_characters, "lost characters")]
        amounts += [(amount, what) for amount, what in lacking if amount]
        return ", ".join(f"{amount:,} {what}" for amount, what in amounts)


def manifest_path(prefix: str | Path) -> Path:
    """Return PREFIX.manifest.json."""
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
    template: Path | None = None,
    unknown_tokens: int = 0,
    lost_characters: int = 0,
) -> None:
    """Describe the finished PREFIX.bin and PREFIX.idx in PREFIX.manifest.json, which is written atomically.

    Args:
        end_id: the token that ends an answer if the documents are conversations.
        template: with end_id, the file of an imported chat template, in the folder of the prefix; None for ours.
        unknown_tokens: tokens of text that the tokenizer does not know.
        lost_characters: characters that the tokenizer dropped.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    index, conversations, answer_tokens, max_id = read_index(idx_path), None, 0, 0
    for tokens_N in read_blocks(bin_path, index.dtype):
        if end_id is not None:
            tokens_N, has_loss_N = unmark(tokens_N)
            answer_tokens += int(has_loss_N.sum())
        max_id = max(max_id, int(tokens_N.max()))
    if end_id is not None:
        name, digest = (chat.NAME, None) if template is None else (template.name, sha256_of(template))
        conversations = ChatRecord(template=name, end_id=end_id, answer_tokens=answer_tokens, template_sha256=digest)
    files = {path.name: FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path)) for path in (bin_path, idx_path)}
    manifest = Manifest(
        documents=index.documents,
        tokens=index.tokens,
        vocab_size=vocab_size,
        split=split,
        sources={source: Counts(documents=index.documents, tokens=index.tokens)},
        tokenizer=tokenizer,
        files=files,
        fingerprint=fingerprint_of(files, tokenizer),
        config_sha256=config_sha256,
        chat=conversations,
        max_id=max_id,
        unknown_tokens=unknown_tokens,
        lost_characters=lost_characters,
    )
    write_whole(manifest_path(prefix), json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(prefix: str | Path) -> Manifest:
    """Load the manifest of ``prefix``.

    Raises:
        UserError: it is missing, not JSON, or not a manifest.
    """
    path = manifest_path(prefix)
    fix = "build the data again" if path.exists() else "give a prefix written by data_pipeline.tokenize, without .bin"
    return from_dict(Manifest, read_object(path, fix), where=str(path))


def fingerprint_of(files: dict[str, FileRecord], tokenizer: TokenizerRecord) -> str:
    """Return a hash of the content alone: the same data under another name has the same fingerprint."""
    hashes = [files[name].sha256 for name in sorted(files)] + [tokenizer.sha256]
    return hashlib.sha256("/".join(hashes).encode()).hexdigest()
