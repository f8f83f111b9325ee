"""Exact and near-duplicates over the documents of all sources, found by datatrove's steps.

Each step reads the same files with the same number of tasks, because datatrove identifies a document by its task and its
position in that task's input.
"""

from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.utils.word_tokenizers import WordTokenizer

from data_pipeline.config import DedupConfig
from data_pipeline.executor import StepRunner


def find_duplicates(config: DedupConfig, documents: Path, work: Path, runner: StepRunner) -> list[PipelineStep]:
    """Find duplicates, and return the filters that drop them from ``documents``, in the order in which they must run.

    Args:
        documents: folder of datatrove's JSON lines.
        work: folder for signatures and results.
    """
    filters: list[PipelineStep] = []
    if config.exact:
        exact = ExactDedupConfig(content_getter=_text)
        runner.run("exact-signatures", [JsonlReader(str(documents)), ExactDedupSignature(str(work / "exact"), exact)])
        # One task: with more, datatrove 0.10.1 looks for a file named ".c4_sig", does not find it and drops nothing.
        runner.run("exact-find", [ExactFindDedups(str(work / "exact"), str(work / "exact-found"), exact)], tasks=1)
        filters.append(ExactDedupFilter(str(work / "exact-found"), exact))
    if config.minhash:
        sizes = {"num_buckets": config.buckets, "hashes_per_bucket": config.hashes_per_bucket}
        minhash = MinhashConfig(n_grams=config.ngram, **sizes)
        signatures, pairs, found = (str(work / f"minhash-{part}") for part in ("signatures", "pairs", "found"))
        signature = MinhashDedupSignature(signatures, minhash, language=config.language or _WhiteSpace())
        runner.run("minhash-signatures", [JsonlReader(str(documents)), *filters, signature])
        runner.run("minhash-buckets", [MinhashDedupBuckets(signatures, pairs, config=minhash)], tasks=config.buckets)
        runner.run("minhash-cluster", [MinhashDedupCluster(pairs, found, minhash)], tasks=1)
        filters.append(MinhashDedupFilter(found))
    return filters


def _text(document: Document) -> str:
    return document.text


class _WhiteSpace(WordTokenizer):
    """Splitter of simplified text (lower case, no punctuation) at white space, 12 times faster than spaCy's rules."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
