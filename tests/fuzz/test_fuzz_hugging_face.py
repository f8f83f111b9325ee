"""Fuzz Hugging Face directories: config.json and the files beside it, safetensors and their index."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from looplm.config import GateConfig
from looplm.huggingface import companion_files, weight_files
from looplm.huggingface.config_json import HFDescription, TokenIds
from looplm.huggingface.convert import examine, with_tokens
from looplm.huggingface.inventory import inspect
from looplm.huggingface.names import stored_shapes
from tests.fuzz.mutate import Edit, changed, edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import BOS, EOS, MODEL, PAD, write_corpus

JSON = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
GATE = GateConfig(state_size=8)
BESIDE = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>", "model_max_length": 64}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A directory in our layout whose weights are in shards."""
    folder, corpus = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    shapes = stored_shapes(MODEL, GATE)
    weight_files.write_tensors(folder, shapes, torch.float32, 40_000, map(torch.ones, shapes.values()))
    description = HFDescription("looplm", MODEL, GATE, True, TokenIds(BOS, (EOS,), PAD))
    companion_files.write(
        folder, corpus / "absent", corpus / "tokenizer.json", description, torch.float32, may_cast=True
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(BESIDE))
    return folder


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def restore(whole: Path, damaged: Path) -> None:
    """Copy the whole directory."""
    shutil.rmtree(damaged)
    shutil.copytree(whole, damaged)


def check(whole: Path, damaged: Path) -> None:
    """Assert that the damaged directory is refused, or described by the same numbers as its own tensors."""
    names = [damaged, "token"]
    source = outcome(lambda: examine(damaged), names)
    outcome(lambda: inspect(damaged), names)
    if source is None:
        return
    outcome(lambda: with_tokens(source, {"eos": "<eos>"}), names)
    wanted = stored_shapes(source.description.model, source.description.gate)
    assert wanted.keys() == source.tensors.keys()
    for name, stored in source.tensors.items():
        tensor = outcome(partial(weight_files.read_tensor, name, stored), names)
        assert tensor is None or tuple(tensor.shape) == wanted[name]


@given(name=st.sampled_from(JSON), data=st.data())
def test_changed_values(name: str, data: st.DataObject, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    values = json.loads((whole / name).read_text())
    (damaged / name).write_text(json.dumps(data.draw(changed(values))))
    check(whole, damaged)


@given(data=st.data(), changes=edits)
def test_changed_bytes(data: st.DataObject, changes: list[Edit], whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    name = data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir() if path.suffix != ".py")))
    (damaged / name).write_bytes(edited((whole / name).read_bytes(), changes))
    check(whole, damaged)


OTHERS = [".", "..", "/dev/zero", "/etc/passwd", "config.json", "", "missing"]


@given(data=st.data(), other=st.sampled_from(OTHERS))
def test_files_that_are_something_else(data: st.DataObject, other: str, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    path = damaged / data.draw(st.sampled_from(sorted(path.name for path in whole.iterdir())))
    path.unlink()
    if other == "":
        path.mkdir()
    elif other != "missing":
        path.symlink_to(other)
    check(whole, damaged)


@given(data=st.data())
@example(data=None)
def test_headers_of_safetensors(data: st.DataObject | None, whole: Path, damaged: Path) -> None:
    restore(whole, damaged)
    path = sorted(damaged.glob("*.safetensors"))[0]
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    if data is None:
        header["../x"] = {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}
    else:
        header = data.draw(changed(header))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    check(whole, damaged)
