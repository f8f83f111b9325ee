"""Turn raw text into Megatron token files with manifests.

Each step is a datatrove pipeline: read and filter every source; find exact and near-duplicates over all sources; drop
them and split by document; train a tokenizer on the training documents (or take an existing one); tokenize. The shards
are then merged into OUTPUT_DIR/SOURCE_train and OUTPUT_DIR/SOURCE_valid (.bin, .idx, .manifest.json). Nothing is
downloaded. A run that was interrupted, or ended by an error, continues when the command is repeated.

    python -m data_pipeline.tokenize --config data.yaml
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.data import Document
from tokenizers import Tokenizer

from data_pipeline.config import PipelineConfig
from data_pipeline.documents import TRAIN, VALID, check_count, split_documents
from data_pipeline.executor import StepRunner
from data_pipeline.filters import build_filters
from data_pipeline.folders import Folder
from data_pipeline.languages import check_filters, check_language
from data_pipeline.manifest import TokenizerRecord, write_manifest
from data_pipeline.readers import JsonLinesReader
from data_pipeline.shards import LOST, UNKNOWN, batches, write_prefixes
from data_pipeline.sources import check_files, find_files, read_documents
from data_pipeline.text_encoder import TextEncoder, open_template, rewriting
from data_pipeline.train_tokenizer import (
    TextStream,
    load_tokenizer,
    sample_texts,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from data_pipeline.verify import check_prefix
from data_pipeline.workspace import identity_hash, identity_of, is_finished, require_unchanged, stamps_of, workspace
from looplm.chat import TEMPLATE_FILE
from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from looplm.files import sha256_of, write_whole, writing
from looplm.imported_template import ImportedTemplate

_TRIED_DOCUMENTS = 100  # of each source, by an existing tokenizer before any work


def main(argv: list[str]) -> None:
    config = parse_config(PipelineConfig, argv, prog="python -m data_pipeline.tokenize", description=__doc__ or "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # inherited by the workers: nothing here may ask the hub
    build(config)


def build(config: PipelineConfig) -> None:
    """Build OUTPUT_DIR unless it is already complete.

    Raises:
        UserError: bad input.
        StepFailed: a task was killed.
        StorageFailure: the disk failed. After each of them the next run continues.
    """
    multiprocess.set_forkserver_preload(["data_pipeline.documents", "data_pipeline.shards"])  # once, not per worker
    output = Path(config.output_dir).resolve()
    encoder = _open_encoder(config)
    files = {source.name: find_files(source) for source in config.sources}
    stamps, identity = stamps_of(config, files), identity_of(config, files)
    if not is_finished(output, identity, config.replace):
        _check_inputs(config, files, encoder)
        with writing(output), workspace(output, identity, config.replace) as work:
            runner = StepRunner(config.executor, work / "final" / "logs", config.verbose)
            split_documents(config, files, work, runner)
            _make_tokenizer(config, work / "split", work / "final" / "tokenizer.json", runner)
            counts = write_prefixes(config.tokenizer, work, runner)
            _write_manifests(config, work / "final", identity_hash(identity), counts)
            require_unchanged(stamps, stamps_of(config, {source.name: find_files(source) for source in config.sources}))
    for prefix in sorted(path.with_suffix("") for path in output.glob("*.idx")):
        manifest = check_prefix(prefix, deep=False)
        print(f"{os.path.relpath(prefix)}: {manifest.describe()}, {manifest.vocab_size:,} ids")


def _open_encoder(config: PipelineConfig) -> TextEncoder | None:
    """Return the encoder of an existing tokenizer, after every check of it that needs no data."""
    if config.tokenizer.path is None:
        return None
    tokenizer, where = load_tokenizer(config.tokenizer), f"tokenizer.path: {config.tokenizer.path}"
    encoder = TextEncoder(tokenizer, config.tokenizer, where)
    if any(source.chat is not None for source in config.sources):
        _ = encoder.template.end_id  # refuses a template in which nothing can be packed
    return encoder


def _check_inputs(config: PipelineConfig, files: dict[str, list[Path]], encoder: TextEncoder | None) -> None:
    """Check everything that needs no work on the data before hours of it begin."""
    for command in ("sbatch", "squeue") if config.executor.slurm is not None else ():
        if shutil.which(command) is None:
            raise UserError(f"executor.slurm: {command} is not on this machine; start on a login node or leave it null")
    if config.dedup.language is not None:
        check_language(config.dedup.language, "dedup.language")
    for source in config.sources:
        check_filters(source)
        check_files(source, files[source.name])
        if encoder is not None:  # a loss shows in the first documents, not after hours
            documents: Iterable[Document] = islice(read_documents(source, files[source.name]), _TRIED_DOCUMENTS)
            for step in build_filters(source):
                documents = step.run(documents)
            encode = encoder.encode_texts if source.chat is None else encoder.encode_conversations
            for batch in batches(documents):
                list(encode(batch))
    check_count(config, files)


def _make_tokenizer(config: PipelineConfig, split: Path, path: Path, runner: StepRunner) -> None:
    """Write tokenizer.json: a copy of the existing one, or one trained on the training documents."""
    if path.exists():
        return
    if config.tokenizer.path is not None:
        write_whole(path, Path(config.tokenizer.path).read_text(encoding="utf-8"))
    else:
        names = Folder(str(split)).list_files()  # SOURCE_SPLIT/TASK.jsonl.zst
        training = [name for name in names if Path(name).parent.name.endswith(f"_{TRAIN}")]
        reader = JsonLinesReader(Folder(str(split)))
        streams = [TextStream((split / name).stat().st_size, partial(reader.read_file, name)) for name in training]
        texts = sample_texts(streams, config.tokenizer.train_chars)
        write_whole(path, train_tokenizer(texts, config.tokenizer).to_str(pretty=True))
    tokenizer = Tokenizer.from_file(str(path))
    tokens, rewritten = vocab_size(tokenizer), rewriting(tokenizer)
    wanted = config.tokenizer.vocab_size or tokens
    note = "" if tokens == wanted else f"fewer than vocab_size={wanted:,}, because there is little text"
    note = f"it changes the text: {rewritten}" if rewritten else note
    runner.report("tokenizer", tokens, note, unit="tokens")


def _write_manifests(
    config: PipelineConfig, final: Path, config_sha256: str, counts: Mapping[str, Counter[str]]
) -> None:
    path = final / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    ids, size = special_ids(tokenizer, config.tokenizer), vocab_size(tokenizer)
    special: dict[str, Any] = {f"{name}_id": value for name, value in ids._asdict().items()}
    record = TokenizerRecord(path=path.name, sha256=sha256_of(path), **special)
    template, imported = None, None
    if any(source.chat is not None for source in config.sources):
        template = open_template(tokenizer, config.tokenizer, str(path))
    if isinstance(template, ImportedTemplate):
        imported = final / TEMPLATE_FILE
        write_whole(imported, template.source)
    for source in config.sources:
        settings: dict[str, Any] = {"source": source.name, "vocab_size": size, "config_sha256": config_sha256}
        if template is not None and source.chat is not None:
            settings |= {"end_id": template.end_id, "template": imported}
        for split in (TRAIN, VALID):
            prefix = final / f"{source.name}_{split}"
            if Path(f"{prefix}.idx").exists():
                settings |= {key: counts[prefix.name][key] for key in (UNKNOWN, LOST)}
                write_manifest(prefix, split=split, tokenizer=record, **settings)


if __name__ == "__main__":
    run_main(main)
