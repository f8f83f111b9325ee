"""From sources to split documents: read, filter, drop duplicates, divide into training and validation."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from data_pipeline.chat import MESSAGES
from data_pipeline.config import PipelineConfig
from data_pipeline.dedup import find_duplicates
from data_pipeline.executor import Stages, say
from data_pipeline.filters import build_filters
from data_pipeline.sources import make_reader
from data_pipeline.split import TRAIN, VALID, Split
from looplm.cli import UserError


def split_documents(config: PipelineConfig, files: dict[str, list[Path]], work: Path, stages: Stages) -> None:
    """Read, filter, deduplicate and split: leaves WORK/split/SOURCE_SPLIT/TASK.jsonl.zst."""
    documents, tasks = work / "documents", config.executor.tasks
    documents.mkdir(exist_ok=True)
    for source in config.sources:
        started = time.time()
        reader = make_reader(source, files[source.name], work / f"{source.name}.paths")
        steps = [reader, *build_filters(source), _writer(documents / source.name, "${rank}.jsonl")]
        counts = stages.run(f"read-{source.name}", steps, tasks if source.limit is None else 1)
        dropped = _listed(_reasons(sum(counts[1:-1], Counter())))
        if not counts[-1]["total"]:
            fix = f"loosen sources.{source.name}.filters or min_chars"
            raise UserError(f"sources.{source.name}: no document is left after its filters ({dropped}); {fix}")
        say(f"read {source.name}", counts[-1]["total"], dropped, started)
    started = time.time()
    filters = find_duplicates(config.dedup, documents, work, stages)
    split = Split(config.seed, config.validation_fraction)
    steps = [JsonlReader(str(documents)), *filters, split, _writer(work / "split", "${prefix}/${rank}.jsonl")]
    counts = stages.run("split", steps)
    found = dict(zip(_kinds_of_duplicates(config), (count["dropped"] for count in counts[1:-2]), strict=True))
    say("deduplicate and split", counts[-1]["total"], _listed(found), started)
    for source in config.sources:
        for part in (TRAIN, VALID) if config.validation_fraction else (TRAIN,):
            if not (work / "split" / f"{source.name}_{part}").exists():
                fix = "change validation_fraction or give it more documents"
                raise UserError(f"sources.{source.name}: no document is left for its {part} split; {fix}")


def _writer(folder: Path, name: str) -> JsonlWriter:
    return JsonlWriter(str(folder), name, compression="zstd", adapter=_text_and_source)


def _text_and_source(self: JsonlWriter, document: Document) -> dict[str, Any]:
    """Keeps what later stages need and drops the metadata that datatrove's steps collect on the way."""
    kept = {key: document.metadata[key] for key in ("source", MESSAGES) if key in document.metadata}
    return {"text": document.text, "id": document.id, "metadata": kept}


def _kinds_of_duplicates(config: PipelineConfig) -> list[str]:
    return ["exact duplicates"] * config.dedup.exact + ["near-duplicates"] * config.dedup.minhash


def _reasons(counts: Counter[str]) -> dict[str, int]:
    return {key.removeprefix("dropped_"): count for key, count in counts.items() if key.startswith("dropped_")}


def _listed(dropped: dict[str, int]) -> str:
    return "dropped " + (", ".join(f"{count:,} {reason}" for reason, count in dropped.items() if count) or "none")
