"""Turn raw text into Megatron token files with manifests.

Stages, each a datatrove pipeline: read and filter every source; find exact and near-duplicates over all of them; drop
those and split by document; train the tokenizer on the training documents (or take a given one); tokenise. Megatron's
builder then merges the shards into OUTPUT_DIR/SOURCE_train and OUTPUT_DIR/SOURCE_valid (.bin, .idx, .manifest.json).
Nothing is downloaded.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import multiprocess
from datatrove.io import DataFolder
from datatrove.pipeline.readers import JsonlReader
from tokenizers import Tokenizer

from data_pipeline.config import PipelineConfig
from data_pipeline.documents import TRAIN, VALID, split_documents
from data_pipeline.executor import Stages, check_slurm, say
from data_pipeline.filters import check_language
from data_pipeline.manifest import TokenizerRecord, write_manifest
from data_pipeline.shards import write_shards
from data_pipeline.sources import check_files, find_files
from data_pipeline.train_tokenizer import load_tokenizer, sample_texts, special_ids, train_tokenizer, vocab_size
from data_pipeline.verify import check_prefix
from data_pipeline.workspace import identity_hash, identity_of, is_finished, workspace
from looplm import chat
from looplm.cli import UserError, parse_config, run_main
from looplm.files import sha256_of


def main(argv: list[str]) -> None:
    config = parse_config(PipelineConfig, argv, prog="python -m data_pipeline.tokenize", description=__doc__ or "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # for the workers: nothing here may ask the hub
    build(config)


def build(config: PipelineConfig) -> None:
    """Make OUTPUT_DIR, unless it is there already.

    Raises:
        UserError: bad input; nothing is left behind.
    """
    multiprocess.set_forkserver_preload(["data_pipeline.documents", "data_pipeline.shards"])  # once, not per worker
    output = Path(config.output_dir).resolve()
    files = _check_inputs(config)
    identity = identity_of(config, files)
    if not is_finished(output, identity, config.replace):
        with workspace(output, identity) as work:
            stages = Stages(config.executor, work / "final" / "logs", config.verbose)
            split_documents(config, files, work, stages)
            _make_tokenizer(config, work / "split", work / "final" / "tokenizer.json")
            plan = write_shards(config.tokenizer.eos_token, work, stages)
            _merge(plan, work)
            _describe(config, work / "final", identity_hash(identity))
    for prefix in sorted(path.with_suffix("") for path in output.glob("*.idx")):
        manifest = check_prefix(prefix, deep=False)
        shown = os.path.relpath(prefix)
        print(f"{shown}: {manifest.describe()}, {manifest.vocab_size:,} ids")


def _check_inputs(config: PipelineConfig) -> dict[str, list[Path]]:
    """Refuse what can be refused before any work; returns each source's files."""
    if config.executor.slurm is not None:
        check_slurm()
    if config.tokenizer.path is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        if any(source.chat is not None for source in config.sources):
            chat.special_ids(tokenizer, f"tokenizer.path: {config.tokenizer.path}")
    if config.dedup.language is not None:
        check_language(config.dedup.language, "dedup.language")
    files = {}
    for source in config.sources:
        if source.filters:
            check_language(source.language, f"sources.{source.name}.language")
        files[source.name] = find_files(source)
        check_files(source, files[source.name])
    return files


def _make_tokenizer(config: PipelineConfig, split: Path, path: Path) -> None:
    """Write tokenizer.json: the given one, or one trained on the training documents."""
    if path.exists():
        return
    started, unfinished = time.time(), path.with_suffix(".partial")
    if config.tokenizer.path is not None:
        shutil.copyfile(config.tokenizer.path, unfinished)
    else:
        folder = DataFolder(str(split))
        streams = [partial(_texts, str(split), name) for name in folder.list_files() if _split_of(name) == TRAIN]
        tokenizer = train_tokenizer(sample_texts(streams, config.tokenizer.train_chars), config.tokenizer)
        tokenizer.save(str(unfinished))
    os.replace(unfinished, path)
    tokens = vocab_size(Tokenizer.from_file(str(path)))
    asked = config.tokenizer.vocab_size or tokens
    note = "" if tokens == asked else f"fewer than the {asked:,} asked for, from so little text"
    say("tokenizer", tokens, note, started, unit="tokens")


def _merge(plan: dict[str, list[str]], work: Path) -> None:
    """Merge in a process of its own, see :mod:`data_pipeline.merge`."""
    started, plan_path = time.time(), work / "merge.json"
    plan_path.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "data_pipeline.merge", str(plan_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise UserError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"merging failed:\n{done.stderr}")
    say("merge", len(plan), "", started, unit="prefixes")


def _describe(config: PipelineConfig, final: Path, config_sha256: str) -> None:
    """Write every manifest, the last thing before the folder is put in place."""
    path = final / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    ids = special_ids(tokenizer, config.tokenizer)
    record = TokenizerRecord(path=path.name, sha256=sha256_of(path), bos_id=ids.bos, eos_id=ids.eos, pad_id=ids.pad)
    for source in config.sources:
        for split in (TRAIN, VALID):
            prefix = final / f"{source.name}_{split}"
            if Path(f"{prefix}.idx").exists():
                write_manifest(
                    prefix,
                    source=source.name,
                    split=split,
                    vocab_size=vocab_size(tokenizer),
                    tokenizer=record,
                    config_sha256=config_sha256,
                    end_id=None if source.chat is None else tokenizer.token_to_id(chat.END),
                )


def _texts(folder: str, name: str) -> Iterator[str]:
    return (document.text for document in JsonlReader(folder).read_file(name))


def _split_of(name: str) -> str:
    """The split in SOURCE_SPLIT/TASK.jsonl.zst."""
    return Path(name).parent.name.rsplit("_", 1)[1]


if __name__ == "__main__":
    run_main(main)
