"""Exact and near-duplicates over the documents of all sources, found by datatrove.

Each step reads the same files with the same number of tasks, because datatrove identifies a document by its task and
its position in that task's input.
"""

from pathlib import Path

from datatrove.pipeline import dedup
from datatrove.pipeline.base import PipelineStep
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
    reader = JsonlReader(str(documents))
    if config.exact:
        signatures, found = str(work / "exact"), str(work / "exact-found")
        exact = dedup.ExactDedupConfig(content_getter=lambda document: document.text)
        runner.run("exact-signatures", [reader, dedup.ExactDedupSignature(signatures, exact)])
        # One task: with more, datatrove 0.10.1 looks for a file named ".c4_sig", does not find it and drops nothing.
        runner.run("exact-find", [dedup.ExactFindDedups(signatures, found, exact)], tasks=1)
        filters.append(dedup.ExactDedupFilter(found, exact))
    if config.minhash:
        signatures, pairs, found = (str(work / f"minhash-{part}") for part in ("signatures", "pairs", "found"))
        sizes = {"num_buckets": config.buckets, "hashes_per_bucket": config.hashes_per_bucket}
        minhash = dedup.MinhashConfig(n_grams=config.ngram, **sizes)
        signature = dedup.MinhashDedupSignature(signatures, minhash, language=config.language or _WhiteSpace())
        runner.run("minhash-signatures", [reader, *filters, signature])
        runner.run("minhash-buckets", [dedup.MinhashDedupBuckets(signatures, pairs, config=minhash)], config.buckets)
        runner.run("minhash-cluster", [dedup.MinhashDedupCluster(pairs, found, minhash)], tasks=1)
        filters.append(dedup.MinhashDedupFilter(found))
    return filters


class _WhiteSpace(WordTokenizer):
    """Splitter of simplified text (lower case, no punctuation) at white space, 12 times faster than spaCy's rules."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]
