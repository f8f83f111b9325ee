"""A corpus of a few thousand tokens and a model of a few thousand parameters for tests that train."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.manifest import TokenizerRecord, write_manifest
from data_pipeline.token_file import mark
from looplm.chat import SPECIAL_TOKENS, ChatTemplate, Message
from looplm.checkpoint import WEIGHTS_ONLY, About, versions
from looplm.config import DataConfig, DataSource, GateConfig, LoggingConfig, ModelConfig, OptimConfig, RunConfig
from looplm.files import sha256_of

VOCAB = 320
BOS, EOS, PAD = 0, 1, 2
TEXTS = [f"def add_{n}(a, b):\n    return a + b * {n}\n\n\nprint(add_{n}({n}, {n * n}))\n" for n in range(200)]
CONVERSATIONS = [
    [
        *([Message("system", "Be brief.")] if n % 3 == 0 else []),
        *(Message(role, f"{n} + {n}?" if role == "user" else f"It is {2 * n}.") for role in ("user", "assistant")),
        *([Message("user", "Sure?"), Message("assistant", "Yes" * (n % 7))] if n % 4 == 0 else []),
    ]
    for n in range(60)
]

MODEL = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_loops=3,
    num_attention_heads=2,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_sequence_length=64,
)


def write_corpus(folder: Path) -> None:
    """Write the prefixes ``train`` and ``valid`` with their tokenizer and manifests."""
    tokenizer, record = write_tokenizer(folder, TEXTS)
    for split, texts in (("train", TEXTS[:180]), ("valid", TEXTS[180:])):
        write_prefix(folder / split, [[*tokenizer.encode(text).ids, EOS] for text in texts], record, split)


def write_chat_corpus(folder: Path) -> None:
    """Write the prefixes ``train`` and ``valid`` of conversations, and ``plain`` of text with the same tokenizer."""
    contents = [message.content for messages in CONVERSATIONS for message in messages]
    tokenizer, record = write_tokenizer(folder, [*TEXTS, *contents], SPECIAL_TOKENS)
    template = ChatTemplate(tokenizer, "tiny")
    marked = [mark([*ids, EOS], [*learned, False]) for ids, learned in template.encode(CONVERSATIONS)]
    for split, documents in (("train", marked[:50]), ("valid", marked[50:])):
        write_prefix(folder / split, documents, record, split, template.end_id)
    write_prefix(folder / "plain", [[*tokenizer.encode(text).ids, EOS] for text in TEXTS], record, "train")


def write_tokenizer(folder: Path, texts: list[str], special: tuple[str, ...] = ()) -> tuple[Tokenizer, TokenizerRecord]:
    """Train a byte-level BPE and write it to ``folder``; ``special`` tokens come after the usual three."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<bos>", "<eos>", "<pad>", *special]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return tokenizer, TokenizerRecord(path=path.name, sha256=sha256_of(path), bos_id=BOS, eos_id=EOS, pad_id=PAD)


def write_prefix(
    prefix: Path, documents: list[list[int]], tokenizer: TokenizerRecord, split: str, end_id: int | None = None
) -> None:
    """Write a Megatron prefix with its manifest. With ``end_id``, the documents are conversations."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16 if end_id is None else np.int32)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    write_manifest(
        prefix,
        source="tiny",
        split=split,
        vocab_size=VOCAB,
        tokenizer=tokenizer,
        config_sha256="tiny",
        end_id=end_id,
    )


def run_config(corpus: Path, output: Path, **sections: Any) -> RunConfig:
    """Return a run of six steps on the tiny corpus; ``sections`` override its keys: ``optim={"lr": 1e-3}``."""
    config = RunConfig(
        output_dir=str(output),
        model=MODEL,
        gate=GateConfig(state_size=8),
        optim=OptimConfig(train_steps=6, lr=1e-2, warmup_steps=2, decay_steps=2, precision="fp32"),
        data=DataConfig(
            train=(DataSource(prefix=str(corpus / "train")),),
            valid=(DataSource(prefix=str(corpus / "valid")),),
            seq_length=32,
            micro_batch_size=2,
            global_batch_size=4,
        ),
        logging=LoggingConfig(eval_samples=8),
    )
    changed = {
        key: dataclasses.replace(getattr(config, key), **value) if isinstance(value, dict) else value
        for key, value in sections.items()
    }
    return dataclasses.replace(config, **changed)


def train_rows(folder: Path | str) -> list[dict[str, Any]]:
    """Return the training rows of a run's metrics.jsonl."""
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


def about_weights(dtype: str, tokenizer: Path | None = None) -> About:
    """Return the metadata of weights that do not come from a run; they can be opened with their tokenizer."""
    return About(
        step=0,
        samples=0,
        tokens=0,
        horizon_samples=0,
        objective=WEIGHTS_ONLY,
        gate_trained=True,
        tokenizer_sha256="" if tokenizer is None else sha256_of(tokenizer),
        eos_ids=(EOS,),
        data_order="",
        versions=versions(),
        git_revision="",
        bos_id=BOS,
        pad_id=PAD,
        dtype=dtype,
    )
