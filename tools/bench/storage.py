"""Rates of tokenization, saving and verification, against those of the library and the disk that they use."""

import os
import shutil
import sysconfig
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from datatrove.data import Document
from megatron.core.process_groups_config import ProcessGroupCollection
from tokenizers import Tokenizer

from data_pipeline.config import TokenizerConfig
from data_pipeline.folders import Folder
from data_pipeline.shards import MegatronTokenizer
from data_pipeline.train_tokenizer import train_tokenizer
from looplm import checkpoint
from looplm.checkpoint import step_folder
from looplm.config import RunConfig
from looplm.files import fsync, sha256_of
from looplm.model import LoopLM
from tools.bench.timing import per_second, rates
from tools.bench.verdicts import Figure

CHARACTERS, VOCABULARY, BATCH = 4_000_000, 4096, 1000


def bench_storage(recipe: RunConfig, groups: ProcessGroupCollection, repeats: int) -> Iterator[Figure]:
    """Print and yield the rates; the checkpoint is of the recipe's weights, in one process."""
    with TemporaryDirectory() as folder:
        tokenizer = yield from _tokenization(Path(folder), repeats)
        yield from _checkpoints(recipe, groups, tokenizer, Path(folder), repeats)


def _tokenization(folder: Path, repeats: int) -> Generator[Figure, None, Path]:
    texts, config = list(_texts(CHARACTERS)), TokenizerConfig(vocab_size=VOCABULARY)
    path = folder / "tokenizer.json"
    train_tokenizer(texts, config).save(str(path))
    raw, documents = Tokenizer.from_file(str(path)), [Document(text, str(n)) for n, text in enumerate(texts)]
    characters = sum(map(len, texts))

    def raw_encoding() -> None:
        for begin in range(0, len(texts), BATCH):
            raw.encode_batch(texts[begin : begin + BATCH], add_special_tokens=False)

    def pipeline() -> None:
        MegatronTokenizer(Folder(str(folder / "shards")), str(path), config).run(iter(documents))

    rates = per_second({"encode_batch": raw_encoding, "pipeline": pipeline}, characters, repeats)
    print(f"\ntokenization, {characters / 1e6:.0f} million characters")
    for name, rate in rates.items():
        print(f"  {name:<28}{rate / 1e6:>10.2f} million characters/s")
    yield Figure("speed of tokenization / encode_batch alone", rates["pipeline"] / rates["encode_batch"], 0.9)
    return path


def _texts(characters: int) -> Iterator[str]:
    """Yield sources of the running Python, up to a number of characters."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if characters > 0:
            text = path.read_text(encoding="utf-8")
            characters -= len(text)
            yield text


def _checkpoints(
    recipe: RunConfig, groups: ProcessGroupCollection, tokenizer: Path, folder: Path, repeats: int
) -> Iterator[Figure]:
    model = LoopLM(recipe.model, recipe.gate, groups)
    about = checkpoint.About.for_weights(tokenizer, (1,), None, None, False, next(model.parameters()).dtype)
    final, raw = folder / step_folder.step_name(0), folder / "raw"
    content = os.urandom(sum(parameter.nbytes for parameter in model.parameters()))

    def write() -> Callable[[], None]:
        raw.unlink(missing_ok=True)  # each contender makes new files: to write over old ones costs time
        return write_new

    def write_new() -> None:
        raw.write_bytes(content)
        fsync(raw)

    def save() -> Callable[[], None]:
        shutil.rmtree(final, ignore_errors=True)
        return lambda: checkpoint.save_weights(final, model, recipe.gate, about, tokenizer)

    def verify() -> None:
        fault = step_folder.find_fault(final)
        assert fault is None, fault

    runs = {"write and fsync": write, "save": save, "sha256": lambda: lambda: sha256_of(raw), "verify": lambda: verify}
    found = rates(runs, len(content), repeats)
    print(f"\ncheckpoint of {len(content) / 1e6:,.0f} MB of weights")
    for name, rate in found.items():
        print(f"  {name:<28}{rate / 1e6:>10,.0f} MB/s")
    yield Figure("speed of a save / of the disk", found["save"] / found["write and fsync"], 0.8)
    yield Figure("speed of verification / of sha256", found["verify"] / found["sha256"], 0.8)
