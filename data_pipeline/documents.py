"""Split documents from sources: read, filter, drop duplicates, and divide into training and validation."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.config import PipelineConfig
from data_pipeline.executor import StepRunner
from data_pipeline.filters import build_filters, find_duplicates
from data_pipeline.sources import MESSAGES, make_reader
from looplm.cli import UserError

TRAIN, VALID = "train", "valid"


def split_documents(config: PipelineConfig, files: dict[str, list[Path]], work: Path, runner: StepRunner) -> None:
    """Read, filter, deduplicate and split all sources into WORK/split/SOURCE_SPLIT/TASK.jsonl.zst."""
    documents, tasks = work / "documents", config.executor.tasks
    documents.mkdir(exist_ok=True)
    for source in config.sources:
        reader = make_reader(source, files[source.name], work / f"{source.name}.paths")
        pipeline: list[Callable] = [reader, *build_filters(source), _writer(documents / source.name, "${rank}.jsonl")]
        counts = runner.run(f"read-{source.name}", pipeline, tasks if source.limit is None else 1)
        reasons = {key: count for key, count in sum(counts[1:-1], Counter()).items() if key.startswith("dropped_")}
        dropped = _dropped({key.removeprefix("dropped_"): count for key, count in reasons.items()})
        if not counts[-1]["total"]:
            fix = f"loosen sources.{source.name}.filters or min_chars"
            raise UserError(f"sources.{source.name}: no document is left after its filters ({dropped}); {fix}")
        runner.report(f"read {source.name}", counts[-1]["total"], dropped)
    filters = find_duplicates(config.dedup, documents, work, runner)
    split = partial(_add_prefix, config.seed, config.validation_fraction)
    pipeline = [JsonlReader(str(documents)), *filters, split, _writer(work / "split", "${prefix}/${rank}.jsonl")]
    counts = runner.run("split", pipeline)
    kinds = ["exact duplicates"] * config.dedup.exact + ["near-duplicates"] * config.dedup.minhash
    duplicates = dict(zip(kinds, (count["dropped"] for count in counts[1:-1]), strict=True))
    runner.report("deduplicate and split", counts[-1]["total"], _dropped(duplicates))
    for source in config.sources:
        for part in (TRAIN, VALID) if config.validation_fraction else (TRAIN,):
            if not (work / "split" / f"{source.name}_{part}").exists():
                fix = "change validation_fraction or give it more documents"
                raise UserError(f"sources.{source.name}: no document is left for its {part} split; {fix}")


def split_of(source: str, document_id: str, seed: int, validation_fraction: float) -> str:
    """Return ``train`` or ``valid``, independent of the number of workers and of all other documents."""
    digest = hashlib.sha256(f"{seed}/{source}/{document_id}".encode()).digest()
    return VALID if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else TRAIN


def _add_prefix(
    seed: int, validation_fraction: float, documents: Iterator[Document], rank: int, world_size: int
) -> Iterator[Document]:
    """Add ``prefix`` (SOURCE_train or SOURCE_valid) to each document's metadata, for the writer."""
    for document in documents:
        source = document.metadata["source"]
        document.metadata["prefix"] = f"{source}_{split_of(source, document.id, seed, validation_fraction)}"
        yield document


def _writer(folder: Path, name: str) -> JsonlWriter:
    return JsonlWriter(str(folder), name, compression="zstd", adapter=_text_and_source)


def _text_and_source(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """Return what later steps need, without the metadata that datatrove's steps collect on the way."""
    kept = {key: document.metadata[key] for key in ("source", MESSAGES) if key in document.metadata}
    return {"text": document.text, "id": document.id, "metadata": kept}


def _dropped(counts: dict[str, int]) -> str:
    return "dropped " + (", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none")
