"""Megatron shards, one per file of split documents, and the prefixes into which they are merged."""

import shutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from datatrove.utils.batching import batched
from tokenizers import Tokenizer
from tqdm import tqdm

from data_pipeline.conversations import MESSAGES
from data_pipeline.executor import StepRunner
from data_pipeline.folders import Folder
from data_pipeline.readers import JsonLinesReader
from data_pipeline.token_file import mark, read_index, write_index
from looplm.chat import ChatTemplate, Message
from looplm.cli import UserError


def write_prefixes(eos_token: str, work: Path, runner: StepRunner) -> None:
    """Turn every file of WORK/split into a shard, and merge the shards of each prefix into WORK/final.

    Shards are merged in the order of the tasks that wrote their documents.
    """
    split, shards, final = (work / name for name in ("split", "shards", "final"))
    names = Folder(str(split)).list_files()  # the reader below gives task i the i-th file of this list
    tokenizer = MegatronTokenizer(Folder(str(shards)), None, str(final / "tokenizer.json"), eos_token, batch_size=1000)
    counts = runner.run("tokenize", [JsonLinesReader(Folder(str(split))), tokenizer], tasks=len(names))
    runner.report("tokenize", counts[0]["input_files"], f"{counts[1]['tokens']:,} tokens", unit="shards")
    plan: dict[str, list[str]] = {}
    for task, name in enumerate(names):
        plan.setdefault(str(final / Path(name).parent), []).append(str(shards / f"{task:05d}_tokens"))
    for prefix, parts in tqdm(plan.items(), desc="merge", unit="prefix", leave=False, disable=None):
        merge_shards(parts, prefix)
    runner.report("merge", len(plan), "", unit="prefixes")


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


class MegatronTokenizer(MegatronDocumentTokenizer):
    """datatrove's writer of Megatron shards, extended to conversations.

    Every document ends in eos. No other special token occurs, except those of the chat template in a conversation.
    """

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is text
        tokenizer.no_truncation()  # an existing tokenizer.json may carry settings of the model it was made for
        tokenizer.no_padding()
        return tokenizer

    def write_tokens(self, data: Iterator[Document], filename: str) -> MegatronTokenizedFile:
        documents = iter(data)
        first = list(islice(documents, 1))
        documents = chain(first, documents)
        if not any(MESSAGES in document.metadata for document in first):  # all documents of a shard are of one source
            return super().write_tokens(documents, filename)
        template = ChatTemplate(self.tokenizer, self.tokenizer_name_or_path)
        shard = MegatronTokenizedFile(self.output_folder, filename, token_size=4)  # the marks need int32
        eos_id = self.tokenizer.token_to_id(self.eos_token)
        assert eos_id is not None  # checked by special_ids
        for batch in batched(documents, self.batch_size):
            conversations = [[Message(*pair) for pair in document.metadata[MESSAGES]] for document in batch]
            for ids, has_loss in template.encode(conversations):
                marked = mark([*ids, eos_id], [*has_loss, False])
                shard.write(marked)
                self.stat_update("tokens", value=len(marked))
        shard.close()
        return shard
