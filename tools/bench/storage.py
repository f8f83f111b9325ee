"""Rates of tokenization, saving and verification, against those of the library and the disk that they use."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from datatrove.data import Document
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer

from data_pipeline.config import TokenizerConfig
from data_pipeline.folders import Folder
from data_pipeline.shards import MegatronTokenizer
from data_pipeline.train_tokenizer import train_tokenizer
from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.checkpoint.saving import Saving
from looplm.checkpoint.state import sharded_state
from looplm.cli import to_dict
from looplm.config import RunConfig
from looplm.files import fsync, xxh3_of
from looplm.megatron import process_groups
from looplm.model import LoopLM
from pretrain.trainer import Trainer
from tools.bench.memory import random_batch
from tools.bench.new_process import in_new_process
from tools.bench.timing import PrepareRun, Rates, per_second, rates
from tools.bench.verdicts import Figure

CHARACTERS, VOCABULARY, BATCH = 4_000_000, 4096, 1000


class StorageRates(NamedTuple):
    """Characters and bytes a second by name, and the bytes of a checkpoint's large files."""

    characters: Rates
    bytes: Rates
    checkpoint: int


def bench_storage(recipe: RunConfig, repeats: int, text: int = CHARACTERS) -> Iterator[Figure]:
    """Print and yield the rates, of so many characters of text and of a checkpoint of the recipe's training.

    They are measured in a process that holds nothing else.
    """
    characters, in_bytes, size = in_new_process(measured_rates, recipe, repeats, text)
    print(f"\ntokenization, {text / 1e6:.0f} million characters")
    for name, rate in characters.items():
        print(f"  {name:<28}{rate / 1e6:>10.2f} million characters/s")
    print(f"\ncheckpoint of {size / 1e6:,.0f} MB of weights and AdamW's moments")
    for name, rate in in_bytes.items():
        print(f"  {name:<28}{rate / 1e6:>10,.0f} MB/s")
    tokenization = characters.ratio("pipeline", "encode_batch")
    yield Figure("speed of tokenization / encode_batch alone", tokenization, 0.9)
    yield Figure("speed of a save / of the disk", in_bytes.ratio("save", "write and fsync"), 0.8)
    yield Figure("speed of verification / of reading and hashing", in_bytes.ratio("verify", "read and hash"), 0.8)


def measured_rates(recipe: RunConfig, repeats: int, text: int) -> StorageRates:
    """Measure, with files in a temporary folder."""
    groups = process_groups.start(recipe.seed)
    try:
        with TemporaryDirectory() as folder:
            tokenizer = Path(folder) / "tokenizer.json"
            characters = _tokenization(tokenizer, text, repeats)
            return StorageRates(characters, *_checkpoints(recipe, groups, tokenizer, repeats))
    finally:
        process_groups.stop()


def _tokenization(path: Path, characters: int, repeats: int) -> Rates:
    """Train a tokenizer at ``path``, and return the rates with it."""
    texts, config = list(_texts(characters)), TokenizerConfig(vocab_size=VOCABULARY)
    train_tokenizer(texts, config).save(str(path))
    raw, documents = Tokenizer.from_file(str(path)), [Document(text, str(n)) for n, text in enumerate(texts)]

    def raw_encoding() -> None:
        for begin in range(0, len(texts), BATCH):
            raw.encode_batch(texts[begin : begin + BATCH], add_special_tokens=False)

    def pipeline() -> None:
        MegatronTokenizer(Folder(str(path.parent / "shards")), str(path), config).run(iter(documents))

    return per_second({"encode_batch": raw_encoding, "pipeline": pipeline}, sum(map(len, texts)), repeats)


def _texts(characters: int) -> Iterator[str]:
    """Yield sources of the running Python, up to a number of characters."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if characters > 0:
            text = path.read_text(encoding="utf-8")
            characters -= len(text)
            yield text


def _checkpoints(recipe: RunConfig, groups: ProcessGroupCollection, tokenizer: Path, repeats: int) -> tuple[Rates, int]:
    """Return the rates, and the bytes of the weights and the optimizer's state."""
    model = LoopLM(recipe.model, recipe.gate, groups)
    trainer = Trainer(model, recipe.loss, recipe.optim, recipe.parallel, groups)
    trainer.train(repeat(random_batch(recipe, recipe.data.micro_batch_size)), 1)
    about = checkpoint.About.for_weights(tokenizer, (1,), None, None, False, next(model.parameters()).dtype)
    final, raw = tokenizer.parent / step_folder.step_name(0), tokenizer.parent / "raw"
    content = os.urandom(3 * sum(parameter.nbytes for parameter in model.parameters()))

    def write() -> Callable[[], None]:
        raw.unlink(missing_ok=True)  # each contender makes new files: to write over old ones costs time
        return write_new

    def write_new() -> None:
        raw.write_bytes(content)
        fsync(raw)

    def save() -> Callable[[], None]:
        shutil.rmtree(final, ignore_errors=True)
        return save_new

    def save_new() -> None:
        Saving(final, sharded_state(trainer.state), to_dict(recipe), about, tokenizer).wait()

    def verify() -> None:
        fault = step_folder.find_fault(final)
        assert fault is None, fault

    runs: dict[str, PrepareRun] = {"write and fsync": write, "save": save}
    runs |= {"read and hash": lambda: lambda: xxh3_of(raw), "verify": lambda: verify}
    return rates(runs, len(content), repeats), len(content)
