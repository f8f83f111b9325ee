"""Split documents from sources: read, filter, drop duplicates, and divide into training and validation."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.config import PipelineConfig, SourceConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.executor import StepRunner
from data_pipeline.filters import MAX_FILES, build_filters, files_needed, find_duplicates
from data_pipeline.folders import Folder
from data_pipeline.readers import JsonLinesReader
from data_pipeline.sources import make_reader
from data_pipeline.token_file import MAX_DOCUMENTS
from looplm.bounds import require
from looplm.failures import UserError
from looplm.files import raise_file_limit

TRAIN, VALID = "train", "valid"


def split_documents(config: PipelineConfig, files: dict[str, list[Path]], work: Path, runner: StepRunner) -> None:
    """Read, filter, deduplicate and split all sources into WORK/split/SOURCE_SPLIT/TASK.jsonl.zst."""
    documents, tasks = work / "documents", config.executor.tasks
    documents.mkdir(exist_ok=True)
    for source in config.sources:
        reader, writer = make_reader(source, files[source.name]), _writer(documents / source.name, "${rank}.jsonl")
        pipeline: list[Callable] = [reader, *build_filters(source), writer]
        counts = runner.run(f"read-{source.name}", pipeline, _tasks_of(source, tasks))
        reasons = {key: count for key, count in sum(counts[:-1], Counter()).items() if key.startswith("dropped_")}
        dropped = _dropped({key.removeprefix("dropped_"): count for key, count in reasons.items()})
        if not counts[-1]["total"]:
            fix = f"loosen sources.{source.name}.filters or min_chars, or add text"
            raise UserError(f"sources.{source.name}: no document is left after its filters ({dropped}); {fix}")
        if counts[-1]["total"] > MAX_DOCUMENTS:  # days before it would be a prefix that training refuses
            amounts = f"{counts[-1]['total']:,} documents, a prefix holds at most {MAX_DOCUMENTS:,}"
            raise UserError(f"sources.{source.name}: {amounts}; split its paths over several sources")
        runner.report(f"read {source.name}", counts[-1]["total"], dropped)
        found = _splits_of(documents / source.name, config.seed, config.fraction_of(source))
        _require_splits(config, source, found, "give it more documents")
    written = _in_order(config, documents)
    filters = find_duplicates(config.dedup, written, work, runner)
    fractions = {source.name: config.fraction_of(source) for source in config.sources}
    split = partial(_add_prefix, config.seed, fractions)
    pipeline = [JsonLinesReader(written), *filters, split, _writer(work / "split", "${prefix}/${rank}.jsonl")]
    counts = runner.run("split", pipeline, tasks=len(written.list_files()))
    kinds = ["exact duplicates"] * config.dedup.exact + ["near-duplicates"] * config.dedup.minhash
    duplicates = dict(zip(kinds, (count["dropped"] for count in counts[1:-1]), strict=True))
    note = f"{_dropped(duplicates)}; split by text" if any(fractions.values()) else _dropped(duplicates)
    runner.report("deduplicate and split", counts[-1]["total"], note)
    for source in config.sources:
        left = {part for part in (TRAIN, VALID) if (work / "split" / f"{source.name}_{part}").exists()}
        fix = "the others were duplicates, of each other or of sources listed before; list it earlier, give it more"
        _require_splits(config, source, left, fix)


def check_count(config: PipelineConfig, files: dict[str, list[Path]]) -> None:
    """Raise a :class:`UserError` if there could be more files of documents than the search for duplicates can take."""
    tasks = config.executor.tasks
    count = sum(min(len(files[source.name]), _tasks_of(source, tasks)) for source in config.sources)
    fix = f"it makes up to {count:,} files of documents, and dedup.exact orders {MAX_FILES:,}; lower it"
    require(count <= MAX_FILES or not config.dedup.exact, "executor.tasks", tasks, fix)
    needed, limit = files_needed(config.dedup, count), raise_file_limit()
    fix = f"a search for duplicates opens up to {needed:,} files, `ulimit -Hn` allows {limit:,}; lower it or raise that"
    require(needed <= limit, "executor.tasks", tasks, fix)


def _tasks_of(source: SourceConfig, tasks: int) -> int:
    return tasks if source.limit is None else 1  # the limit holds for each task


def _in_order(config: PipelineConfig, documents: Path) -> Folder:
    """Return the folder of what was read, with its files in the order of the sources, then of the tasks."""
    names = [
        f"{source.name}/{name}"
        for source in config.sources
        for name in Folder(str(documents / source.name)).list_files()
    ]
    return Folder(str(documents), tuple(names))


def _splits_of(folder: Path, seed: int, fraction: float) -> set[str]:
    """Return the splits into which the documents of a folder fall; no more are read than it takes to see all."""
    found = set[str]()
    for document in JsonLinesReader(Folder(str(folder))).run():
        found.add(split_of(document.text, seed, fraction))
        if len(found) == len(_splits(fraction)):
            break
    return found


def _splits(fraction: float) -> tuple[str, ...]:
    return (TRAIN, VALID) if fraction else (TRAIN,)


def _require_splits(config: PipelineConfig, source: SourceConfig, found: set[str], fix: str) -> None:
    """Raise a :class:`UserError` if a source has no document for one of the splits."""
    fraction, key = config.fraction_of(source), f"sources.{source.name}"
    for part in _splits(fraction):
        if part not in found:
            fix = f"{fix}, or change {key}.validation_fraction={fraction}"
            raise UserError(f"{key}: no document is left for its {part} split; {fix}")


def split_of(text: str, seed: int, validation_fraction: float) -> str:
    """Return ``train`` or ``valid``, independent of the number of workers and of all other documents.

    The text decides, because the ids of records may be missing, null, or the same in several files.
    """
    digest = hashlib.sha256(f"{seed}/{text}".encode()).digest()
    return VALID if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else TRAIN


def _add_prefix(
    seed: int, fractions: dict[str, float], documents: Iterator[Document], rank: int, world_size: int
) -> Iterator[Document]:
    """Add ``prefix`` (SOURCE_train or SOURCE_valid) to each document's metadata, for the writer."""
    for document in documents:
        source = document.metadata["source"]
        document.metadata["prefix"] = f"{source}_{split_of(document.text, seed, fractions[source])}"
        yield document


def _writer(folder: Path, name: str) -> JsonlWriter:
    return JsonlWriter(Folder(str(folder)), name, compression="zstd", adapter=_text_and_source)


def _text_and_source(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """Return what later steps need, without the metadata that datatrove's steps collect on the way."""
    kept = {key: document.metadata[key] for key in ("source", MESSAGES) if key in document.metadata}
    return {"text": document.text, "id": document.id, "metadata": kept}


def _dropped(counts: dict[str, int]) -> str:
    return "dropped " + (", ".join(f"{count:,} {reason}" for reason, count in counts.items() if count) or "none")
