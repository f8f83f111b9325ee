"""Train a byte-level BPE on the filtered sources of a data config, including duplicates.

Several data sets can share the file that is written, through ``tokenizer.path``. ``data_pipeline.tokenize`` trains on
its own deduplicated training split instead.

    python -m data_pipeline.train_tokenizer --config data.yaml --output tokenizer.json
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.config import PipelineConfig, SourceConfig, TokenizerConfig
from data_pipeline.filters import build_filters
from data_pipeline.languages import check_filters
from data_pipeline.sources import check_files, find_files, read_documents
from looplm import chat
from looplm.bounds import path_field, require
from looplm.cli import parse_config, run_main
from looplm.encoding import added_ids, open_tokenizer
from looplm.failures import UserError
from looplm.files import write_whole
from looplm.plain_text import as_text


class SpecialIds(NamedTuple):
    """Ids of the special tokens; bos is None if an existing tokenizer does not have it.

    ``begin`` stands before each text if an existing tokenizer puts it there, as the post-processor of Llama's does.
    """

    bos: int | None
    eos: int
    pad: int
    begin: int | None = None


class TextStream(NamedTuple):
    """A part of the text from which a tokenizer learns: its size in bytes on disk, and a function that reads it."""

    size: int
    read: Callable[[], Iterable[Document]]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Train a byte-level BPE with single digits and without normalization, so that decoding restores the text.

    The same texts in the same order give the same tokenizer. Little text may give fewer than ``vocab_size`` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    digits, in_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    assert config.bos_token is not None and config.vocab_size is not None
    specials = [config.bos_token, config.eos_token, config.pad_token, *config.special_tokens]
    alphabet, on_terminal = sorted(pre_tokenizers.ByteLevel.alphabet()), sys.stderr.isatty()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=on_terminal
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load and check the existing tokenizer.json.

    Raises:
        UserError: no such file, not a tokenizer, special tokens are missing or not distinct, or arise from text.
    """
    path = Path(str(config.path))
    if not path.is_file():
        raise UserError(f"tokenizer.path: {config.path!r} is not a file; give the path of a tokenizer.json")
    tokenizer = open_tokenizer(path, "name a complete one in tokenizer.path")
    special_ids(tokenizer, config)
    as_text(tokenizer, control_names(config), f"tokenizer.path: {path}")
    count, ids = tokenizer.get_vocab_size(), vocab_size(tokenizer)
    if count <= 2**16 < ids:  # datatrove would choose uint16 by the count
        raise UserError(f"tokenizer.path: {path} has {count} tokens but ids up to {ids - 1}; renumber without gaps")
    return tokenizer


def special_ids(tokenizer: Tokenizer, config: TokenizerConfig) -> SpecialIds:
    """Return the ids of bos, eos and pad.

    Raises:
        UserError: one of them is not in the vocabulary, pad is the same token as eos or bos, or the tokenizer puts
            other tokens around a text.
    """
    ids = list[Any]()
    for key in ("bos_token", "eos_token", "pad_token"):
        token = getattr(config, key)
        ids.append(None if token is None else tokenizer.token_to_id(token))
        if token is not None and ids[-1] is None:
            raise UserError(f"tokenizer.{key}: {config.path} has no token {token!r}; name one that it has")
    bos, eos, pad = ids
    require(pad not in (eos, bos), "tokenizer.pad_token", config.pad_token, "pad needs its own id; name another token")
    before, after = added_ids(tokenizer)
    if len(before) > 1 or pad in before or after not in ([], [eos]):
        names = [[tokenizer.id_to_token(token) for token in found] for found in (before, after)]
        fix = "it may put one before it and eos_token after it; change its post_processor"
        raise UserError(
            f"tokenizer.path: {config.path} puts {names[0]} before each text and {names[1]} after it; {fix}"
        )
    return SpecialIds(bos, eos, pad, before[0] if before else None)


def control_names(config: TokenizerConfig) -> tuple[str | None, ...]:
    """Return the names of the tokens that no text may become."""
    return config.bos_token, config.eos_token, config.pad_token, *config.special_tokens, *chat.SPECIAL_TOKENS


def vocab_size(tokenizer: Tokenizer) -> int:
    """Return one more than the largest id: the rows that a model's embedding needs."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def sample_texts(streams: Sequence[TextStream], budget: float) -> Iterator[str]:
    """Yield texts of every stream, about ``budget`` characters in all, in proportion to the streams' sizes.

    Later streams share what a short one leaves unused. They are left out until they make up for a text that is longer
    than its stream's share, so that of many files with one text each, some of all are taken.
    """
    left, excess = sum(stream.size for stream in streams), 0.0
    for stream in streams:
        share = budget * stream.size / max(left, 1)
        budget, left = budget - share, left - stream.size
        share -= excess
        for document in stream.read() if share > 0 else ():
            yield document.text
            share -= len(document.text)
            if share <= 0:
                break
        budget, excess = budget + max(share, 0), max(-share, 0)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(PipelineConfig):
    """A data config, and the file to write.

    Args:
        output: tokenizer.json to write.
    """

    output: str = path_field("tokenizer.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        path = self.tokenizer.path
        require(path is None, "tokenizer.path", path, "this command trains a tokenizer; give vocab_size instead")
        require(not Path(self.output).is_dir(), "output", self.output, "it is a directory; name a file")


def main(argv: list[str]) -> None:
    config = parse_config(
        TrainTokenizerConfig, argv, prog="python -m data_pipeline.train_tokenizer", description=str(__doc__)
    )
    sources = sorted(config.sources, key=lambda source: source.limit is None)  # others share what a limit leaves unused
    streams = [stream for source in sources for stream in _streams_of(source)]
    tokenizer = train_tokenizer(sample_texts(streams, config.tokenizer.train_chars), config.tokenizer)
    write_whole(Path(config.output), tokenizer.to_str(pretty=True))
    ids = special_ids(tokenizer, config.tokenizer)
    print(f"{config.output}: {vocab_size(tokenizer):,} tokens, bos {ids.bos}, eos {ids.eos}, pad {ids.pad}")


def _streams_of(source: SourceConfig) -> Iterator[TextStream]:
    """Yield a stream for each file, or one in all if the source has a limit, which holds for all files together."""
    check_filters(source)
    files = find_files(source)
    check_files(source, files)
    for part in [[path] for path in files] if source.limit is None else [files]:
        yield TextStream(sum(path.stat().st_size for path in part), partial(_filtered, source, part))


def _filtered(source: SourceConfig, files: list[Path]) -> Iterator[Document]:
    documents = read_documents(source, files)
    for step in build_filters(source):
        documents = step.run(documents)
    return documents


if __name__ == "__main__":
    run_main(main)
