"""Fuzz what a model is asked: files of prompts, settings, and strings that stop a text."""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from looplm.cli import parse_config
from looplm.generate import GenerateConfig, read_prompts
from looplm.inference.text_stream import TextStream
from tests.fuzz.mutate import edited, edits
from tests.fuzz.outcome import outcome
from tests.support.tiny import TEXTS, write_tokenizer

SPECIAL = ("<bos>", "<eos>", "<pad>")  # of ids 0, 1, 2
PROMPTS = "Once upon a time\n---\ndef f():\r\n    é\n---\n🙂".encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Any:
    return write_tokenizer(folder, TEXTS)[0]


@given(content=st.one_of(st.builds(edited, st.just(PROMPTS), edits), st.binary(max_size=100)))
def test_files_of_prompts(content: bytes, folder: Path) -> None:
    path = folder / "prompts.txt"
    path.write_bytes(content)
    texts = outcome(lambda: read_prompts(str(path)), [path])
    assert texts is None or all(text.strip() for text in texts)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(prompt=texts, stop=st.lists(texts, max_size=3), seed=st.integers())
@example(prompt="🙂\0", stop=["🙂", "\n", "null", "\u2028"], seed=0)
@example(prompt="--x", stop=["1", "", "[a]"], seed=-1)
def test_flags_of_generation(prompt: str, stop: list[str], seed: int) -> None:
    argv = [f"--prompt={prompt}", "--checkpoint=x", "--stop", json.dumps(stop), "--seed", str(seed)]
    names = ["prompt", "stop", "seed"]
    found = outcome(lambda: parse_config(GenerateConfig, argv, prog="p", description=""), names)
    if found is not None:
        assert (found.prompt, list(found.stop), found.seed) == (prompt, stop, seed)


@given(ids=st.lists(st.integers(0, 319), max_size=40), stop=st.lists(texts.filter(bool), max_size=3))
@example(ids=[*range(3, 40)], stop=["<eos>"])
@example(ids=[129, 0, 97, 3], stop=["0"])
def test_stop_strings(ids: list[int], stop: list[str], tokenizer: Any) -> None:
    def stream() -> str:
        stream, shown = TextStream(tokenizer, [], stop), []
        for token in ids:
            shown += stream.push(token, 1)
            if stream.stopped:
                break
        return "".join(token.text for token in [*shown, *stream.close()])

    named = {token for token, name in enumerate(SPECIAL) if any(name in part for part in stop)}
    parts = [list(part) for is_named, part in groupby(ids, named.__contains__) if not is_named]
    text, whole = outcome(stream, []), "".join(tokenizer.decode(part) for part in parts)
    assert text is not None and whole.startswith(text.rstrip("\ufffd")), (text, whole)
    assert not [part for part in stop if part in text]
