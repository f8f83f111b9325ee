"""Megatron shards, one per file of split documents, and the prefixes into which they are merged."""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from tqdm import tqdm

from data_pipeline.config import TokenizerConfig
from data_pipeline.conversations import MESSAGES
from data_pipeline.executor import StepRunner
from data_pipeline.folders import Folder
from data_pipeline.readers import JsonLinesReader
from data_pipeline.text_encoder import TextEncoder
from data_pipeline.token_file import read_index, write_index
from looplm.failures import UserError

UNKNOWN, LOST = "unknown_tokens", "lost_characters"  # counters of a prefix
_DOCUMENTS, _CHARACTERS = 1000, 2**22  # of a batch; encoding takes some 22 bytes per character


def write_prefixes(config: TokenizerConfig, work: Path, runner: StepRunner) -> dict[str, Counter[str]]:
    """Turn every file of WORK/split into a shard, and merge the shards of each prefix into WORK/final.

    Shards are merged in the order of the tasks that wrote their documents.

    Returns:
        the counters :data:`UNKNOWN` and :data:`LOST` of each prefix, by its name.
    """
    split, shards, final = (work / name for name in ("split", "shards", "final"))
    names = Folder(str(split)).list_files()  # the reader below gives task i the i-th file of this list
    tokenizer = MegatronTokenizer(Folder(str(shards)), str(final / "tokenizer.json"), config)
    counts = runner.run("tokenize", [JsonLinesReader(Folder(str(split))), tokenizer], tasks=len(names))
    counted = [f"{counts[1][key]:,} {key.replace('_', ' ')}" for key in ("tokens", UNKNOWN, LOST) if counts[1][key]]
    runner.report("tokenize", counts[0]["input_files"], ", ".join(counted), unit="shards")
    plan, found = dict[str, list[str]](), dict[str, Counter[str]]()
    for task, (name, (_, counter)) in enumerate(zip(names, runner.counts_by_task("tokenize"), strict=True)):
        prefix = Path(name).parent.name
        plan.setdefault(prefix, []).append(str(shards / f"{task:05d}_tokens"))
        found.setdefault(prefix, Counter()).update(counter)
    for prefix, parts in tqdm(plan.items(), desc="merge", unit="prefix", leave=False, disable=None):
        merge_shards(parts, str(final / prefix))
    runner.report("merge", len(plan), "", unit="prefixes")
    return found


def merge_shards(shards: Sequence[str], prefix: str) -> None:
    """Write ``prefix``.bin and .idx with the documents of ``shards`` in the given order.

    The result is that of Megatron's IndexedDatasetBuilder, which takes seconds to import and keeps a Python number for
    every document in memory.

    Raises:
        UserError: a shard is truncated, the shards differ in their token type, or all of them are empty.
    """
    indices = [read_index(Path(f"{shard}.idx")) for shard in shards]
    for shard, index in zip(shards, indices, strict=True):
        if (size := Path(f"{shard}.bin").stat().st_size) != index.bin_bytes:
            raise UserError(f"{shard}.bin: {size} bytes, its .idx says {index.bin_bytes}; build the data again")
    dtypes = {index.dtype for index in indices if index.documents}
    if not dtypes:
        raise UserError(f"{prefix}: all {len(shards)} shards are empty; loosen the filters or add text")
    if len(dtypes) > 1:
        found = " and ".join(sorted(map(str, dtypes)))
        raise UserError(f"{prefix}: shards of {found}; tokenize all with one tokenizer")
    with Path(f"{prefix}.bin").open("wb") as merged:
        for shard in shards:
            with Path(f"{shard}.bin").open("rb") as stream:
                shutil.copyfileobj(stream, merged, 1 << 24)
    write_index(Path(f"{prefix}.idx"), np.concatenate([index.lengths() for index in indices]), dtypes.pop())


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield documents in lists, each of which ends with the document that fills it."""
    batch, characters = list[Document](), 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == _DOCUMENTS or characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class MegatronTokenizer(MegatronDocumentTokenizer):
    """datatrove's writer of Megatron shards, with every document encoded by :class:`TextEncoder`."""

    def __init__(self, shards: Folder, path: str, config: TokenizerConfig) -> None:
        super().__init__(shards, None, path, config.eos_token)
        self.config = config

    def write_tokens(self, data: Iterator[Document], filename: str) -> MegatronTokenizedFile:
        documents = iter(data)
        first = list(islice(documents, 1))
        documents = chain(first, documents)
        encoder = TextEncoder(self.tokenizer, self.config, self.config.path or self.tokenizer_name_or_path)
        encode, size = encoder.encode_texts, self.token_size
        if any(MESSAGES in document.metadata for document in first):  # all documents of a shard are of one source
            encode, size = encoder.encode_conversations, 4  # the marks need int32
        shard = MegatronTokenizedFile(self.output_folder, filename, token_size=size)
        for batch in batches(documents):
            for document in encode(batch):
                shard.write(document.tokens)
                self.stat_update("tokens", value=len(document.tokens))
                for counter, value in ((UNKNOWN, document.unknown), (LOST, document.lost)):
                    if value:
                        self.stat_update(counter, value=value)
        shard.close()
        return shard
