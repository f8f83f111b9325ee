"""Fuzz tokenizer.json, as the commands and the data pipeline read it."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_pipeline.config import TokenizerConfig
from data_pipeline.train_tokenizer import load_tokenizer
from looplm.chat import ChatTemplate
from looplm.encoding import begin_id, encode, read_tokenizer
from looplm.plain_text import as_text
from tests.fuzz.mutate import Edit, changed, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import write_chat_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_chat_corpus(folder)
    return folder


def use(path: Path) -> None:
    """Do what the commands do with a tokenizer.json."""
    tokenizer = read_tokenizer(path)
    encode(tokenizer, "def f(): 🙂", begin_id(tokenizer))
    plain = as_text(tokenizer, ["<eos>", "<pad>"], path)
    plain.encode("<eos> a")
    ChatTemplate(tokenizer, str(path))


def load(path: Path) -> None:
    """Do what the data pipeline does with a tokenizer.json."""
    config = TokenizerConfig(path=str(path), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    tokenizer: Tokenizer = load_tokenizer(config)
    assert tokenizer is not None


@given(data=st.data())
def test_tokenizers_of_changed_values(data: st.DataObject, folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["vocab"] = dict(list(values["model"]["vocab"].items()))
    path = folder / "changed" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    small = {key: value for key, value in values.items() if key != "model"}
    model = {key: value for key, value in values["model"].items() if key not in ("vocab", "merges")}
    found = data.draw(changed({**small, "model": model}))
    if isinstance(found, dict) and isinstance(found.get("model"), dict) and data.draw(st.booleans()):
        found["model"] = {"vocab": values["model"]["vocab"], "merges": values["model"]["merges"], **found["model"]}
    path.write_text(json.dumps(found))
    outcome(lambda: use(path), [path])
    outcome(lambda: load(path), [path])


@given(changes=edits)
@example(changes=[Edit("insert", 0.0, 1, b"[" * 2000)])
@example(
    changes=[Edit("flip", 0.6186032433353345, 1, b"\xec\xaa\x9f\xcb\xd4"), Edit("drop", 0.22600647125387857, 15, b"x")]
)
def test_tokenizers_of_changed_bytes(changes: list[Edit], folder: Path) -> None:
    path = folder / "changed" / "tokenizer.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(edited((folder / "tokenizer.json").read_bytes(), changes))
    outcome(lambda: use(path), [path])
    outcome(lambda: load(path), [path])
