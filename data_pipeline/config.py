"""What ``python -m data_pipeline.tokenize`` is asked to do: sources, deduplication, tokenizer, split, executor.

Every check here needs nothing but the values; files and folders are checked where they are opened, before any work.
"""

import re
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from looplm.cli import require

FilterName = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb_quality"]

BYTE_ALPHABET = 256  # a byte-level tokenizer holds every byte, so that no text is unknown to it
SPECIAL_TOKENS = 3  # bos, eos, pad
MAX_VOCAB_SIZE = 2**31 - 1  # ids above 65,535 are stored as int32


def _check(config: object, section: str, key: str, allowed: bool, fix: str) -> None:
    require(allowed, f"{section}{key}", getattr(config, key), fix)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One body of text; it becomes the prefixes OUTPUT_DIR/NAME_train and OUTPUT_DIR/NAME_valid.

    Args:
        name: names the prefixes and the source in training configs.
        kind: python-stdlib (this interpreter's own source files), text (a document per file), jsonl or parquet.
        paths: files or globs, ** included; .gz and .zst are unpacked; not for python-stdlib.
        text_key: jsonl and parquet: the key or column that holds the text.
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
    """

    vocab_size: int | None = None
    path: str | None = None
    train_chars: int = 1_000_000_000
    bos_token: str | None = "<|bos|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"

    def __post_init__(self) -> None:
        check, least, size = partial(_check, self, "tokenizer."), BYTE_ALPHABET + SPECIAL_TOKENS, self.vocab_size
        check("vocab_size", (size is None) != (self.path is None), "give either vocab_size, to train one, or path")
        fits = size is None or least <= size <= MAX_VOCAB_SIZE
        check("vocab_size", fits, f"give a number from {least} (bytes and special tokens) to {MAX_VOCAB_SIZE}")
        check("train_chars", self.train_chars > 0, "give a number above 0")
        check("pad_token", self.pad_token != self.eos_token, "it must differ from eos_token")
        if self.path is None:
            own = self.bos_token not in (None, self.eos_token, self.pad_token)
            check("bos_token", own, "a trained tokenizer has one; it must differ from eos_token and pad_token")


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
        check("validation_fraction", 0 <= self.validation_fraction < 1, "give a number in [0, 1)")
        check("seed", self.seed >= 0, "give a whole number of at least 0")
