"""Generated text, small configs and builds."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer

from data_pipeline import tokenize
from data_pipeline.config import DedupConfig, ExecutorConfig, PipelineConfig, SourceConfig, TokenizerConfig


class Corpus:
    """Prose-like documents: common words around random ones, so that all documents differ."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def word(self) -> str:
        return "".join(self.random.choices("abcdefghijklmnopqrstuvwxyz", k=self.random.randint(3, 8)))

    def document(self, sentences: int = 8) -> str:
        def sentence() -> str:
            one, two, three, four, five, six = (self.word() for _ in range(6))
            return f"The {one} of the {two} {three} and {four} that have {five} with {six}."

        return " ".join(sentence() for _ in range(sentences))

    def documents(self, count: int, sentences: int = 8) -> list[str]:
        return [self.document(sentences) for _ in range(count)]


@pytest.fixture
def corpus() -> Corpus:
    return Corpus()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[str, list[str]], Path]:
    """Return ``write(name, texts)``, which writes NAME.jsonl with one document per line."""

    def write(name: str, texts: list[str]) -> Path:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., PipelineConfig]:
    """Return ``config({"name": path}, seed=3)``: small, of jsonl sources; tasks=, workers= and dedup= are shortcuts."""

    def make(sources: dict[str, Path], **changes: Any) -> PipelineConfig:
        executor = ExecutorConfig(tasks=changes.pop("tasks", 2), workers=changes.pop("workers", 1))
        dedup = DedupConfig() if changes.pop("dedup", False) else DedupConfig(exact=False, minhash=False)
        found = tuple(SourceConfig(name=name, kind="jsonl", paths=(str(path),)) for name, path in sources.items())
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "out"),
            "sources": found,
            "tokenizer": TokenizerConfig(vocab_size=320),
            "validation_fraction": 0.2,
            "dedup": dedup,
            "executor": executor,
        }
        return PipelineConfig(**(defaults | changes))

    return make


@pytest.fixture
def build() -> Callable[[PipelineConfig], Path]:
    """Return ``build(config)``, which returns the output folder."""

    def run(config: PipelineConfig) -> Path:
        tokenize.build(config)
        return Path(config.output_dir)

    return run


@pytest.fixture
def decoded() -> Callable[[Path], list[str]]:
    """Return ``decoded(prefix)``: its documents as text, without the eos at their ends."""

    def decode(prefix: Path) -> list[str]:
        tokenizer = Tokenizer.from_file(str(prefix.parent / "tokenizer.json"))
        dataset = IndexedDataset(str(prefix))
        documents = [np.array(dataset[index]).tolist() for index in range(len(dataset))]
        eos = tokenizer.token_to_id("<|eos|>")
        assert all(ids[-1] == eos and eos not in ids[:-1] for ids in documents)
        return [tokenizer.decode(ids[:-1], skip_special_tokens=False) for ids in documents]

    return decode
