"""Configuration of ``python -m data_pipeline.tokenize``: sources, deduplication, tokenizer, split and executor.

The checks here need only the values. Files and folders are checked when they are opened, before any work starts.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.token_file import NO_LOSS
from looplm import chat
from looplm.bounds import at_least, check_bounds, non_empty, path_field, positive, require

FilterName = Literal["gopher_quality", "gopher_repetition", "c4", "fineweb_quality"]
Difference = Literal["case", "punctuation", "accents", "numbers"]

BYTE_ALPHABET = 256  # a byte-level tokenizer contains every byte, so no text is unknown to it
SPECIAL_TOKENS = 3  # bos, eos, pad
TOKENIZER, CHAT_TEMPLATE = "tokenizer", "chat_template"  # inputs of a build beside its sources, under these names
MAX_VOCAB_SIZE = NO_LOSS  # larger ids would contain the bit that marks tokens without loss


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Keys of the conversation in a source's records.

    Args:
        messages_key: a list of messages {role, content}, role system, user or assistant; or ShareGPT's {from, value}.
        prompt_key: instead of messages_key: the question, a text or a list of messages.
        answer_key: with prompt_key: its answer, a text.
        roles: further names of roles, each as NAME=ROLE, such as bot=assistant.
        ignore: keys of messages and records that are dropped although they may hold something, such as tool_calls.
    """

    messages_key: str | None = None
    prompt_key: str | None = None
    answer_key: str | None = None
    roles: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fix = f"give NAME=ROLE, with one of the roles {', '.join(chat.ROLES)}"
        known = all(name and role in chat.ROLES for name, _, role in (entry.partition("=") for entry in self.roles))
        require(known, "sources[].chat.roles", list(self.roles), fix)
        key, pair = self.messages_key, (self.prompt_key, self.answer_key)
        one_form = None not in pair if key is None else pair == (None, None)
        require(one_form, "sources[].chat.messages_key", key, "give either messages_key, or prompt_key and answer_key")

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are set."""
        return tuple(key for key in (self.messages_key, self.prompt_key, self.answer_key) if key is not None)

    @property
    def role_names(self) -> dict[str, str]:
        """The further names of roles, with the role of each."""
        return {name: role for name, _, role in (entry.partition("=") for entry in self.roles)}


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of text, written to the prefixes OUTPUT_DIR/NAME_train and OUTPUT_DIR/NAME_valid.

    Args:
        name: identifies the source in the names of its prefixes.
        kind: python-stdlib (this interpreter's own source files), text (one document per file), jsonl or parquet.
        paths: files or globs, including **; not for python-stdlib. The longest start that exists under exactly that
            name is no glob. gzip, zstd, bzip2 and xz are decompressed, by content.
        text_key: jsonl and parquet, without chat: the key or column of the text.
        chat: jsonl and parquet: the records are conversations, trained on their answers only; null: plain text.
        filters: quality filters, applied in this order; they were made for prose and reject source code.
        language: with filters: datatrove's language code, by which they split words and sentences, and gopher_quality
            knows stop words. A filter that cannot judge the language is refused.
        min_chars: shorter documents are dropped.
        max_chars: longer documents are dropped; null: no limit.
        limit: read only this many documents, in one task, for a trial; null: read all.
        validation_fraction: share of this source's documents held out; 0 holds out none; null: that of the whole.
    """

    name: str
    kind: Literal["python-stdlib", "text", "jsonl", "parquet"]
    paths: tuple[str, ...] = path_field(())
    text_key: str = "text"
    chat: ChatConfig | None = None
    filters: tuple[FilterName, ...] = ()
    language: str = "eng"
    min_chars: int = at_least(1, 1)
    max_chars: int | None = None
    limit: int | None = positive(None)
    validation_fraction: float | None = at_least(0, None, below=1)

    def __post_init__(self) -> None:
        plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) is not None
        require(plain, "sources[].name", self.name, "it is part of file names: give letters, digits, '.', '_' and '-'")
        free, fix = (
            self.name not in (TOKENIZER, CHAT_TEMPLATE),
            "a build's record has that name for its own; give another",
        )
        require(free, "sources[].name", self.name, fix)
        section, paths, most = f"sources.{self.name}", list(self.paths), self.max_chars
        check_bounds(self, section)
        own = self.kind == "python-stdlib"
        fix = "kind=python-stdlib finds its own files; leave it out" if own else "name at least one file or glob"
        require(own != bool(paths), f"{section}.paths", paths, fix)
        records, key = self.kind in ("jsonl", "parquet"), self.text_key
        fix = "only kind=jsonl or parquet without chat has it; leave it out"
        keyed = (records and self.chat is None) or key == SourceConfig.text_key
        require(keyed, f"{section}.text_key", key, fix)
        plain = bool(self.filters) or self.language == SourceConfig.language
        require(plain, f"{section}.language", self.language, "only filters read it; name one, or leave it out")
        if self.chat is not None:
            require(records, f"{section}.chat", self.chat, "conversations are read from kind=jsonl or parquet")
            fix = "c4 rewrites text, which would change a conversation; leave it out"
            require("c4" not in self.filters, f"{section}.filters", list(self.filters), fix)
        fix = f"give null or at least min_chars={self.min_chars}"
        require(most is None or most >= self.min_chars, f"{section}.max_chars", most, fix)


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Deduplication over all sources together, so that no document of one source reappears in another.

    The copy of the source that is listed first stays; within a source, the first copy in the order of the output.

    Args:
        exact: drop documents whose texts are equal byte for byte.
        minhash: drop near-duplicates (MinHash signatures, locality-sensitive hashing).
        ignore: minhash only: differences that near-duplicates may have in any number; numbers makes all numbers equal,
            so that tables, sums or dates of one form are near-duplicates.
        ngram: minhash only: words per shingle; documents with fewer words have no near-duplicates.
        buckets: minhash only: bands of the signature; more bands also match less similar documents.
        hashes_per_bucket: minhash only: hashes that must agree in a band; more hashes require more similarity.
        language: minhash only: null splits words at white space (fast), and scripts without spaces into characters; a
            datatrove code such as cmn uses that language's tokenizer.
    """

    exact: bool = True
    minhash: bool = True
    ignore: tuple[Difference, ...] = ("case", "punctuation", "accents")
    ngram: int = positive(5)
    buckets: int = positive(14)
    hashes_per_bucket: int = positive(8)
    language: str | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "dedup")
        for key in ("ignore", "ngram", "buckets", "hashes_per_bucket", "language"):
            value, fix = getattr(self, key), "it has no effect without dedup.minhash; give that too, or leave it out"
            require(self.minhash or value == getattr(DedupConfig, key), f"dedup.{key}", value, fix)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Either a byte-level BPE to train (vocab_size) or an existing tokenizer.json (path).

    Every document ends in eos, which separates the documents of a packed sample. bos is written only if an existing
    tokenizer puts it before each text, as Llama's does; otherwise the preceding eos marks the start of a document. bos
    still has its own id, because fine-tuning formats and Hugging Face exports expect one. pad must be an id that no
    text contains, because padded positions are masked by it.

    Args:
        vocab_size: tokens of a tokenizer trained on this data, including the 256 bytes and bos, eos, pad.
        path: an existing tokenizer.json. Names of its control tokens in a text stay text.
        chat_template: folder of the model of an existing tokenizer, with its chat_template.jinja or
            tokenizer_config.json: conversations are packed as that template renders them; null: in ChatML.
        allow_loss: an existing tokenizer may drop characters that it has no token for; they are counted.
        train_chars: with vocab_size: characters of text on which a tokenizer is trained, from all training files in
            proportion to their sizes.
        bos_token: beginning of a sequence; null if an existing tokenizer has none.
        eos_token: end of a document.
        pad_token: padding.
        special_tokens: further tokens of a trained tokenizer that no text contains, such as a chat template's.
    """

    vocab_size: int | None = None
    path: str | None = path_field(None)
    chat_template: str | None = path_field(None)
    allow_loss: bool = False
    train_chars: int = positive(1_000_000_000)
    bos_token: str | None = "<|bos|>"
    eos_token: str = "<|eos|>"
    pad_token: str = "<|pad|>"
    special_tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_bounds(self, "tokenizer")
        further, size, bos, pad = self.special_tokens, self.vocab_size, self.bos_token, self.pad_token
        least = BYTE_ALPHABET + SPECIAL_TOKENS + len(further)
        one_given = (size is None) != (self.path is None)
        require(one_given, "tokenizer.vocab_size", size, "give either vocab_size, to train a tokenizer, or path")
        fix = f"give a number from {least} (bytes and special tokens) to {MAX_VOCAB_SIZE}"
        require(size is None or least <= size <= MAX_VOCAB_SIZE, "tokenizer.vocab_size", size, fix)
        require(pad != self.eos_token, "tokenizer.pad_token", pad, "it must differ from eos_token")
        if self.path is not None:
            fix = "an existing tokenizer has its own; leave it out"
            require(not further, "tokenizer.special_tokens", list(further), fix)
            characters, fix = self.train_chars, "an existing tokenizer is not trained; leave it out"
            require(characters == TokenizerConfig.train_chars, "tokenizer.train_chars", characters, fix)
            return
        fix = "it belongs to an existing tokenizer; name that in tokenizer.path"
        require(self.chat_template is None, "tokenizer.chat_template", self.chat_template, fix)
        fix = "a trained tokenizer has a token for every byte; leave it out"
        require(not self.allow_loss, "tokenizer.allow_loss", True, fix)
        fix = "a trained tokenizer needs one that differs from eos_token and pad_token"
        require(bos not in (None, self.eos_token, pad), "tokenizer.bos_token", bos, fix)
        distinct = "" not in further and len({bos, self.eos_token, pad, *further}) == SPECIAL_TOKENS + len(further)
        fix = "they must differ from each other and from bos, eos and pad"
        require(distinct, "tokenizer.special_tokens", list(further), fix)


@dataclass(frozen=True, kw_only=True)
class SlurmConfig:
    """Slurm job arrays, one per step of the pipeline. The command stays in the foreground, submits, waits and merges.

    OUTPUT_DIR and the sources must be on a file system that all nodes share.

    Args:
        partition: partition of the jobs.
        time: time limit of a job, HH:MM:SS.
        cpus_per_task: cores per task.
        mem_per_cpu_gb: memory per core, in GB.
        qos: quality of service.
        max_array_size: the cluster's limit on the size of a job array.
        poll_seconds: seconds between two checks whether a step has finished.
    """

    partition: str
    time: str = "08:00:00"
    cpus_per_task: int = positive(1)
    mem_per_cpu_gb: int = positive(4)
    qos: str = "normal"
    max_array_size: int = positive(1001)
    poll_seconds: float = positive(15.0)

    def __post_init__(self) -> None:
        check_bounds(self, "executor.slurm")


@dataclass(frozen=True, kw_only=True)
class ExecutorConfig:
    """Division of the work, and the machines that do it.

    Args:
        tasks: tasks per step of the pipeline; they fix the order of the documents, so they are part of the result.
        workers: tasks that run at the same time; they change only the speed.
        slurm: null runs on this machine.
    """

    tasks: int = positive(8)
    workers: int = positive(2)
    slurm: SlurmConfig | None = None

    def __post_init__(self) -> None:
        check_bounds(self, "executor")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Sources and settings of one output folder of token files with manifests.

    Args:
        output_dir: a folder that holds only token files, manifests, tokenizer and logs.
        sources: the sources of text; of a document that several have, the source listed first keeps its copy.
        tokenizer: the tokenizer, trained or existing.
        dedup: deduplication over all sources.
        executor: division of the work, on this machine or Slurm.
        validation_fraction: share of the documents held out, chosen by a hash of their texts; 0 holds out none. A
            source may have its own.
        seed: seed of that choice.
        replace: rebuild an output_dir, or finished steps of an unfinished one, that were made with other settings or
            input files instead of refusing.
        verbose: show datatrove's own log on the terminal; it is always in OUTPUT_DIR/logs.
    """

    output_dir: str = path_field(fix="name a directory")
    sources: tuple[SourceConfig, ...] = non_empty()
    tokenizer: TokenizerConfig
    dedup: DedupConfig = field(default_factory=DedupConfig)
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    validation_fraction: float = at_least(0, 0.01, below=1)
    seed: int = at_least(0, 1234)
    replace: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        check_bounds(self, "")
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "sources[].name", names, "every source needs its own name")
        for source in self.sources:
            one_share = self.fraction_of(source) == self.fraction_of(self.sources[0])
            fix = "without dedup.exact, a text of two sources would be in both splits; give all sources the same"
            key, share = f"sources.{source.name}.validation_fraction", self.fraction_of(source)
            require(one_share or self.dedup.exact, key, share, fix)
        conversational = next((source.name for source in self.sources if source.chat is not None), None)
        template, fix = self.tokenizer.chat_template, "no source has conversations; leave it out"
        require(template is None or conversational is not None, "tokenizer.chat_template", template, fix)
        if conversational is not None and self.tokenizer.path is None:
            given, needed = list(self.tokenizer.special_tokens), list(chat.SPECIAL_TOKENS)
            fix = f"sources.{conversational}.chat needs {needed} in it"
            require(set(given) >= set(needed), "tokenizer.special_tokens", given, fix)
        for key in ("eos_token", "pad_token"):
            name = getattr(self.tokenizer, key)
            fix = f"the turns of sources.{conversational}.chat use it; name another token"
            require(conversational is None or name not in chat.SPECIAL_TOKENS, f"tokenizer.{key}", name, fix)

    def fraction_of(self, source: SourceConfig) -> float:
        """Return the share of a source's documents that is held out."""
        return self.validation_fraction if source.validation_fraction is None else source.validation_fraction
