"""Duplicates are dropped within and across sources; the split depends only on ids and seed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import DedupConfig
from data_pipeline.documents import split_of

pytestmark = pytest.mark.slow  # every test here starts a process or trains


def near(text: str) -> str:
    """Return ``text`` with one word changed."""
    words = text.split(" ")
    return " ".join([*words[:40], "changed", *words[41:]])


def run(build: Callable, decoded: Callable, config: Any) -> dict[str, list[str]]:
    output = build(config)
    return {path.stem: decoded(path.with_suffix("")) for path in sorted(output.glob("*.idx"))}


@pytest.fixture
def sources(corpus: Any, jsonl: Callable) -> dict[str, Path]:
    """a: 20 documents, the first three twice. b: 10 own documents, 2 copies and 3 near-copies of documents of a."""
    first, second = corpus.documents(20, 20), corpus.documents(10, 20)
    a = jsonl("a", [*first, *first[:3]])
    b = jsonl("b", [*second, *first[3:5], *map(near, first[5:8])])
    return {"a": a, "b": b}


@pytest.mark.parametrize(("exact", "minhash", "left"), [(True, True, 30), (True, False, 33), (False, True, 30)])
def test_duplicates_are_dropped_over_all_sources(
    sources: Any, config: Any, build: Any, decoded: Any, exact: bool, minhash: bool, left: int
) -> None:
    fewer: dict[str, Any] = {"buckets": 6} if minhash else {}
    dedup = DedupConfig(exact=exact, minhash=minhash, **fewer)
    settings = replace(config(sources, validation_fraction=0.0), dedup=dedup)
    texts = run(build, decoded, settings)
    everything = [text for found in texts.values() for text in found]
    assert set(texts) == {"a_train", "b_train"}
    assert len(everything) == len(set(everything)) == left


def test_without_deduplication_every_document_stays(sources: Any, config: Any, build: Any, decoded: Any) -> None:
    texts = run(build, decoded, config(sources, validation_fraction=0.0))
    assert (len(texts["a_train"]), len(texts["b_train"])) == (23, 15)


def test_split_by_document(corpus: Any, jsonl: Any, config: Any, build: Any, decoded: Any, tmp_path: Path) -> None:
    written = corpus.documents(60, 2)
    half = {"a": jsonl("a", written[:30]), "b": jsonl("b", written[30:])}
    one = run(build, decoded, config(half, tasks=1))
    many = run(build, decoded, config(half, tasks=5, output_dir=str(tmp_path / "many")))
    other = run(build, decoded, config(half, seed=7, output_dir=str(tmp_path / "other")))
    assert {name: sorted(texts) for name, texts in one.items()} == {name: sorted(texts) for name, texts in many.items()}
    assert sorted(text for texts in one.values() for text in texts) == sorted(written)
    assert 4 <= len(one["a_valid"]) + len(one["b_valid"]) <= 20
    assert sorted(one["a_valid"]) != sorted(other["a_valid"])


def test_split_share_and_independence() -> None:
    texts = [str(index) for index in range(20_000)]
    valid = {text for text in texts if split_of(text, 1, 0.05) == "valid"}
    assert len(valid) == pytest.approx(1000, rel=0.1)
    assert valid <= {
        text for text in texts if split_of(text, 1, 0.1) == "valid"
    }  # a larger share keeps the smaller one
    assert valid != {text for text in texts if split_of(text, 2, 0.05) == "valid"}
    assert all(split_of(text, 1, 0.0) == "train" for text in texts)
