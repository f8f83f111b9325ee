"""Filters that drop documents: by length, without an answer, of low quality, and duplicates over all sources.

Only those of datatrove's quality filters are offered that work without a network: C4's list of bad words and all
model-based filters would be downloaded. Words and sentences are split by spaCy's blank pipelines, whose rules are part
of the package.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline import dedup, filters
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.text import TextNormConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.config import DedupConfig, SourceConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.executor import StepRunner
from data_pipeline.folders import Folder
from data_pipeline.languages import stop_words
from data_pipeline.readers import JsonLinesReader
from looplm.chat import ANSWERS, Message
from looplm.files import raise_file_limit

MAX_FILES = 2**16 - 1  # of documents, if exact duplicates are dropped: datatrove stores their order in 16 bits
_OTHER_FILES = 100  # libraries, logs, pipes
_SHINGLES = 4096  # of a document, hashed at a time
_QUALITY = {
    "gopher_quality": filters.GopherQualityFilter,  # Rae et al. 2021, section A.1.1
    "gopher_repetition": filters.GopherRepetitionFilter,  # Rae et al. 2021, table A1
    "c4": filters.C4QualityFilter,  # Raffel et al. 2020, section 2.2; cuts lines without final punctuation
    "fineweb_quality": filters.FineWebQualityFilter,  # Penedo et al. 2024, section 3.6
}


def build_filters(source: SourceConfig) -> list[BaseFilter]:
    """Return the length filter, for conversations the answer filter, then the quality filters in the source's order."""
    quality = []
    for name in source.filters:
        words = {"stop_words": stop_words(source.language)} if name == "gopher_quality" else {}
        quality.append(_QUALITY[name](language=source.language, **words))
    answered = [] if source.chat is None else [AnswerFilter()]
    return [LengthFilter(source.min_chars, source.max_chars), *answered, *quality]


def find_duplicates(config: DedupConfig, documents: Folder, work: Path, runner: StepRunner) -> list[PipelineStep]:
    """Find duplicates, and return the filters that drop them from ``documents``, in the order in which they must run.

    The first of equal or similar documents stays. Each step reads each file in a task of its own, because datatrove
    identifies a document by its task and its position in that task's input: so the order of two documents is that of
    their tasks, then that of their positions.

    Args:
        documents: folder of datatrove's JSON lines, with its files in the order that decides which document stays.
        work: folder for signatures and results.
    """
    found: list[PipelineStep] = []
    reader, tasks = JsonLinesReader(documents), len(documents.list_files())
    if config.exact:
        signatures, results = (Folder(str(work / name)) for name in ("exact", "exact-found"))
        exact = dedup.ExactDedupConfig(content_getter=_content)
        runner.run("exact-signatures", [reader, _ExactSignatures(signatures, exact)], tasks)
        # One task: with more, datatrove 0.10.1 looks for a file named ".c4_sig", does not find it and drops nothing.
        runner.run("exact-find", [_allow_files, dedup.ExactFindDedups(signatures, results, exact)], tasks=1)
        found.append(dedup.ExactDedupFilter(results, exact))
    if config.minhash:
        signatures, pairs, results = (
            Folder(str(work / f"minhash-{part}")) for part in ("signatures", "pairs", "found")
        )
        sizes = {"num_buckets": config.buckets, "hashes_per_bucket": config.hashes_per_bucket}
        minhash = dedup.MinhashConfig(n_grams=config.ngram, norm_config=_normalization(config), **sizes)
        signature = _Signatures(signatures, minhash, language=config.language or _WhiteSpace())
        counts = runner.run("minhash-signatures", [reader, *found, signature], tasks)[-1]
        if short := counts["too_short"]:
            note = f"{short:,} others have fewer than dedup.ngram={config.ngram} words, too few to compare"
            runner.report("compare documents", counts["total"] - short, note)
        buckets = dedup.MinhashDedupBuckets(signatures, pairs, config=minhash)
        runner.run("minhash-buckets", [_allow_files, buckets], config.buckets)
        clusters = _Clusters(pairs, results, minhash, save_cluster_id=True)
        runner.run("minhash-cluster", [_allow_files, clusters], tasks=1)
        found.append(dedup.MinhashDedupFilter(results))
    return found


class LengthFilter(BaseFilter):
    """Filter that keeps documents of ``min_chars`` to ``max_chars`` characters."""

    name = "📏 Length"

    def __init__(self, min_chars: int, max_chars: int | None) -> None:
        super().__init__()
        self.min_chars, self.max_chars = min_chars, max_chars

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        if len(doc.text) < self.min_chars:
            return False, "too_short"
        if self.max_chars is not None and len(doc.text) > self.max_chars:
            return False, "too_long"
        return True


class AnswerFilter(BaseFilter):
    """Filter that drops conversations without an answer to learn, which would have no token with loss."""

    name = "💬 Answers"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        messages = (Message(*message) for message in doc.metadata[MESSAGES])
        answered = any(role == ANSWERS and content.strip() and learned for role, content, learned in messages)
        return answered or (False, "without_answer")


class _ExactSignatures(dedup.ExactDedupSignature):
    """datatrove's step, which gives documents of earlier tasks a higher priority.

    Of equal documents, the one with the highest priority stays; within a task, the first.
    """

    config: dedup.ExactDedupConfig

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        self.config = replace(self.config, document_priority=lambda _: MAX_FILES - rank)
        super().run(data, rank, world_size)


class _Clusters(dedup.MinhashDedupCluster):
    """datatrove's step, which keeps the first document of a cluster; datatrove's choice depends on the pairs' order."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        super().run(data, rank, world_size)
        kept = set[int]()
        for name in self.output_folder.list_files(glob_pattern="*.clusters"):
            with self.output_folder.open(name, "rb") as stream:  # pairs of a document and the number of its cluster
                pairs = np.frombuffer(stream.read(), "<u4").reshape(-1, 2).tolist()
            removed = list[int]()
            for document, cluster in pairs:
                if cluster in kept:
                    removed.append(document)
                kept.add(cluster)
            with self.output_folder.open(name.replace(".clusters", ".remove"), "wb") as stream:
                stream.write(np.array(removed, "<u4").tobytes())


class _Signatures(dedup.MinhashDedupSignature):
    """datatrove's step in bounded memory, which counts the documents that are too short for it as ``too_short``."""

    def get_shingles(self, text: str) -> np.ndarray:
        shingles = super().get_shingles(text)
        if not shingles.size:
            self.stat_update("too_short")
        return shingles

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return datatrove's signature, from blocks of shingles; all at once take 1.8 kB for each word of a text."""
        least = super().get_signature(shingles[:_SHINGLES])
        for start in range(_SHINGLES, len(shingles), _SHINGLES):
            least = np.minimum(least, super().get_signature(shingles[start : start + _SHINGLES])).tolist()
        return least


def files_needed(config: DedupConfig, documents: int) -> int:
    """Return the number of files that a step has open at most, for a number of files of documents.

    The search for exact duplicates opens three for each (signatures, duplicates, numbers of copies), the clustering of
    near-duplicates two (members, documents to remove).
    """
    return documents * max(3 * config.exact, 2 * config.minhash) + _OTHER_FILES


def _allow_files(data: None, rank: int, world_size: int) -> None:
    """Raise the limit of open files, in a task's process, which may be on another machine."""
    raise_file_limit()


def _normalization(config: DedupConfig) -> TextNormConfig:
    return TextNormConfig(
        lowercase="case" in config.ignore,
        remove_punctuation="punctuation" in config.ignore,
        norm_unicode_diacritics="accents" in config.ignore,
        norm_numbers="numbers" in config.ignore,
    )


def _content(document: Document) -> str:
    """Return everything that tokens are made of: conversations may have equal texts and other turns."""
    return json.dumps(document.metadata[MESSAGES]) if MESSAGES in document.metadata else document.text


class _WhiteSpace(WordTokenizer):
    """Splitter at white space, 12 times faster than spaCy's rules. Each character of a script without spaces is a word.

    Otherwise a Chinese, Japanese, Thai, Lao, Burmese or Khmer text would be a few long words, fewer than a shingle has.
    """

    _UNSPACED = re.compile(
        "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    )

    def word_tokenize(self, text: str) -> list[str]:
        return (text if text.isascii() else self._UNSPACED.sub(r" \g<0> ", text)).split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
