"""Megatron shards, one per file of split documents, and the plan by which :mod:`data_pipeline.merge` joins them."""

import time
from collections.abc import Iterator
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

from datatrove.data import Document
from datatrove.io import DataFolder
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from tokenizers import Tokenizer

from data_pipeline.chat import MESSAGES, write_conversations
from data_pipeline.executor import Stages, say
from looplm.chat import ChatTemplate


def write_shards(eos_token: str, work: Path, stages: Stages) -> dict[str, list[str]]:
    """Turn every split file into a shard.

    Returns:
        Each output prefix with its shards, in the order of the tasks that wrote the documents.
    """
    started = time.time()
    shards = work / "shards"
    names = DataFolder(str(work / "split")).list_files()  # the reader below gives task i the i-th file of this list
    tokenizer = MegatronTokenizer(str(shards), str(work / "final" / "tokenizer.json"), eos_token)
    counts = stages.run("tokenise", [JsonlReader(str(work / "split")), tokenizer], tasks=len(names))
    say("tokenise", counts[0]["input_files"], f"{counts[1]['tokens']:,} tokens", started, unit="shards")
    plan: dict[str, list[str]] = {}
    for task, name in enumerate(names):
        plan.setdefault(str(work / "final" / Path(name).parent), []).append(str(shards / f"{task:05d}_tokens"))
    return plan


class MegatronTokenizer(MegatronDocumentTokenizer):
    """datatrove's writer of Megatron shards, extended to conversations.

    Every document ends in eos. No other special token occurs, except those of the chat template in a conversation.
    """

    def __init__(self, output_folder: str, tokenizer: str, eos_token: str) -> None:
        super().__init__(output_folder, tokenizer_name_or_path=tokenizer, eos_token=eos_token, batch_size=1000)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = super().tokenizer
        tokenizer.encode_special_tokens = True  # "<|eos|>" in a text is text
        tokenizer.no_truncation()  # an existing tokenizer.json may carry settings of the model it was made for
        tokenizer.no_padding()
        return tokenizer

    def write_tokens(self, data: Iterator[Document], filename: str) -> MegatronTokenizedFile:
        documents = iter(data)
        first = list(islice(documents, 1))  # all documents of a shard are of one source
        documents = chain(first, documents)
        if not any(MESSAGES in document.metadata for document in first):
            return super().write_tokens(documents, filename)
        template = ChatTemplate(self.tokenizer, self.tokenizer_name_or_path)
        shard = MegatronTokenizedFile(self.output_folder, filename, token_size=4)  # the marks need int32
        eos_id = self.tokenizer.token_to_id(self.eos_token)
        assert eos_id is not None  # checked by special_ids
        for tokens in write_conversations(documents, shard, template, eos_id, self.batch_size):
            self.stat_update("tokens", value=tokens)
        shard.close()
        return shard
