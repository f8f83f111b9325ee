"""What ``python -m data_pipeline.tokenize`` is asked to do: sources, deduplication, tokenizer, split, executor.

Every check here needs nothing but the values; files and folders are checked where they are opened, before any work.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from looplm import chat
from looplm.cli import require

FilterName = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb_quality"]

BYTE_ALPHABET = 256  # a byte-level tokenizer holds every byte, so that no text is unknown to it
SPECIAL_TOKENS = 3  # bos, eos, pad
MAX_VOCAB_SIZE = 2**30  # ids above 65,535 are stored as int32, whose highest bit marks tokens without loss


def _check(config: object, section: str, key: str, allowed: bool, fix: str) -> None:
    require(allowed, f"{section}{key}", getattr(config, key), fix)


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Where a record of a source holds its conversation.

    Args:
        messages_key: a list of messages: {role, content}, role one of system, user, assistant; or ShareGPT's {from, value}.
        prompt_key: in place of messages_key: the question, a text or a list of messages.
        answer_key: with prompt_key: its answer, a text.
    """

    messages_key: str | None = None
    prompt_key: str | None = None
    answer_key: str | None = None

    def __post_init__(self) -> None:
        pair = (self.prompt_key, self.answer_key)
        one = None not in pair if self.messages_key is None else pair == (None, None)
        _check(self, "sources[].chat.", "messages_key", one, "give either messages_key, or prompt_key and answer_key")

    @property
    def keys(self) -> tuple[str, ...]:
        """Those that are given."""
        return tuple(key for key in (self.messages_key, self.prompt_key, self.answer_key) if key is not None)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One body of text; it becomes the prefixes OUTPUT_DIR/NAME_train and OUTPUT_DIR/NAME_valid.

    Args:
        name: names the prefixes and the source in training configs.
        kind: python-stdlib (this interpreter's own source files), text (a document per file), jsonl or parquet.
        paths: files or globs, ** included; .gz, .zst and .zstd are unpacked; not for python-stdlib.
        text_key: jsonl and parquet: the key or column that holds the text.
        chat: jsonl and parquet: the records are conversations, of which the answers are learnt; null: plain text.
        filters: quality filters, in this order; they were made for prose and reject source code.
        language: datatrove's code of the language, for the filters that count words or sentences.
        min_chars: shorter documents are dropped.
        max_chars: longer documents are dropped; null keeps them.
        limit: read only so many documents, in one task, to try things out; null reads all.
    """

    name: str
    kind: Literal["python-stdlib", "text", "jsonl", "parquet"]
    paths: tuple[str, ...] = ()
    text_key: str = "text"
    chat: ChatConfig | None = None
    filters: tuple[FilterName, ...] = ()
    language: str = "eng"
    min_chars: int = 1
    max_chars: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        _check(self, "sources[].", "name", plain, "it names files: give letters, digits, '.', '_' and '-'")
        check = partial(_check, self, f"sources.{self.name}.")
        if self.kind == "python-stdlib":
            check("paths", not self.paths, "kind=python-stdlib finds its own files; leave it out")
        else:
            check("paths", len(self.paths) > 0, "name at least one file or glob")
        if self.chat is not None:
            check("chat", self.kind in ("jsonl", "parquet"), "conversations are read from kind=jsonl or parquet")
            check(
                "filters", "c4" not in self.filters, "c4 rewrites text and a conversation stays as it is; leave it out"
            )
        most = self.max_chars
        check("min_chars", self.min_chars >= 1, "give 1 or more")
        check("max_chars", most is None or most >= self.min_chars, f"give null or at least min_chars={self.min_chars}")
        check("limit", self.limit is None or self.limit > 0, "give null or a number above 0")


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Duplicates, looked for over all sources together, so that no document of one reappears in another.

    Args:
        exact: drop documents whose text is the same, byte for byte.
        minhash: drop near-duplicates (MinHash signatures, locality-sensitive hashing).
        ngram: words in a shingle.
        buckets: bands of the signature; more find less similar documents.
        hashes_per_bucket: hashes that must agree in a band; more ask for more similarity.
        language: null splits words at white space (fast); a datatrove code such as cmn uses that language's tokenizer.
    """

    exact: bool = True
    minhash: bool = True
    ngram: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8
    language: str | None = None

    def __post_init__(self) -> None:
        for key in ("ngram", "buckets", "hashes_per_bucket"):
            _check(self, "dedup.", key, getattr(self, key) > 0, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Either train a byte-level BPE (vocab_size) or take a given tokenizer.json (path).

    Documents end in eos, which is what separates them in a packed sample. bos is never written into the data: a prompt
    starts a document by the eos before it. It has an id of its own because fine-tuning formats and Hugging Face
    exports expect one. pad must be an id that no text contains, since padded positions are masked out by it.

    Args:
        vocab_size: tokens of a tokenizer trained on this data, the 256 bytes and bos, eos, pad included.
        path: a tokenizer.json to use as it is.
        train_chars: characters of text, spread over all training files, that a tokenizer is trained on.
        bos_token: beginning of a sequence; null for a given tokenizer that has none.
        eos_token: end of a document.
        pad_token: filler.
        special_tokens: further tokens that a trained tokenizer holds and no text contains, such as a chat template's.
    """

    vocab_size: int | None = None
    path: str | None = None
    train_chars: int = 1_000_000_000
    bos_token: str | None = "<|bos|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check, further, size = partial(_check, self, "tokenizer."), self.special_tokens, self.vocab_size
        least = BYTE_ALPHABET + SPECIAL_TOKENS + len(further)
        check("vocab_size", (size is None) != (self.path is None), "give either vocab_size, to train one, or path")
        fits = size is None or least <= size <= MAX_VOCAB_SIZE
        check("vocab_size", fits, f"give a number from {least} (bytes and special tokens) to {MAX_VOCAB_SIZE}")
        check("train_chars", self.train_chars > 0, "give a number above 0")
        check("pad_token", self.pad_token != self.eos_token, "it must differ from eos_token")
        if self.path is None:
            own = self.bos_token not in (None, self.eos_token, self.pad_token)
            check("bos_token", own, "a trained tokenizer has one; it must differ from eos_token and pad_token")
            apart = len({self.bos_token, self.eos_token, self.pad_token, *further}) == SPECIAL_TOKENS + len(further)
            check("special_tokens", apart and "" not in further, "they must differ from each other, bos, eos and pad")
        else:
            check("special_tokens", not further, "a given tokenizer has its own; leave it out")


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Run every stage as a Slurm job array; the command itself stays in front, submits, waits and merges.

    OUTPUT_DIR and the sources must lie on a file system that all nodes share.

    Args:
        partition: where the jobs go.
        time: limit of a job, HH:MM:SS.
        cpus_per_task: cores of a task.
        mem_per_cpu_gb: memory per core.
        qos: quality of service.
        max_array_size: the cluster's limit on a job array.
        poll_seconds: how often to look whether a stage is done.
    """

    partition: str
    time: str = "08:00:00"
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    qos: str = "normal"
    max_array_size: int = 1001
    poll_seconds: float = 15.0

    def __post_init__(self) -> None:
        for key in ("cpus_per_task", "mem_per_cpu_gb", "max_array_size", "poll_seconds"):
            _check(self, "executor.slurm.", key, getattr(self, key) > 0, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """How the work is cut and who does it.

    Args:
        tasks: pieces every stage is cut into; fixes the order of documents, so it is part of the result.
        workers: pieces worked on at the same time; changes nothing but the speed.
        slurm: null works on this machine.
    """

    tasks: int = 8
    workers: int = 2
    slurm: SlurmConfig | None = None

    def __post_init__(self) -> None:
        for key in ("tasks", "workers"):
            _check(self, "executor.", key, getattr(self, key) > 0, "give a number above 0")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Raw text in, token files with manifests out.

    Args:
        output_dir: a folder of its own for token files, manifests, tokenizer and logs.
        sources: the bodies of text.
        tokenizer: trained or given.
        dedup: which duplicates are dropped.
        executor: this machine or Slurm.
        validation_fraction: share of the documents held out, drawn by document id; 0 holds out none.
        seed: of that draw.
        replace: rebuild an output_dir that was made with other settings, instead of refusing.
        verbose: show datatrove's own log on the terminal; it is always in OUTPUT_DIR/logs.
    """

    output_dir: str
    sources: tuple[SourceConfig, ...]
    tokenizer: TokenizerConfig
    dedup: DedupConfig = field(default_factory=DedupConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    validation_fraction: float = 0.01
    seed: int = 1234
    replace: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        check, names = partial(_check, self, ""), [source.name for source in self.sources]
        check("output_dir", self.output_dir != "", "name a folder")
        check("sources", len(names) > 0, "name at least one: [{name: NAME, kind: python-stdlib}]")
        require(len(set(names)) == len(names), "sources[].name", names, "every source needs a name of its own")
        asks = next((source.name for source in self.sources if source.chat is not None), None)
        given = self.tokenizer.special_tokens
        if asks is not None and self.tokenizer.path is None:
            fix = f"sources.{asks}.chat needs {list(chat.SPECIAL_TOKENS)} in it"
            require(set(given) >= set(chat.SPECIAL_TOKENS), "tokenizer.special_tokens", list(given), fix)
        check("validation_fraction", 0 <= self.validation_fraction < 1, "give a number in [0, 1)")
        check("seed", self.seed >= 0, "give a whole number of at least 0")
