"""Duplicates are dropped within and across sources, the first one stays; the split depends on texts and seed."""

import resource
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupSignature

from data_pipeline.config import DedupConfig
from data_pipeline.documents import check_count, split_documents, split_of
from data_pipeline.executor import StepRunner
from data_pipeline.filters import _Signatures, _WhiteSpace, find_duplicates
from data_pipeline.folders import Folder
from data_pipeline.readers import JsonLinesReader
from data_pipeline.sources import find_files
from looplm.failures import UserError

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


def split_texts(config: Any, work: Path) -> list[str]:
    """Return the texts of WORK/split, in the order of the sources, then of the output."""
    (work / "final").mkdir(parents=True)
    files = {source.name: find_files(source) for source in config.sources}
    split_documents(config, files, work, StepRunner(config.executor, work / "final" / "logs"))
    folders = (work / "split" / f"{source.name}_train" for source in config.sources)
    return [document.text for folder in folders for document in JsonLinesReader(Folder(str(folder))).run()]


@pytest.mark.parametrize("shingles", [1, 4096, 4097, 20_000])
def test_signatures_of_long_documents_are_the_librarys(shingles: int, corpus: Any, tmp_path: Path) -> None:
    text = " ".join(corpus.word() for _ in range(shingles + 4))
    ours, library = (
        step(Folder(str(tmp_path)), MinhashConfig(), language=_WhiteSpace())
        for step in (_Signatures, MinhashDedupSignature)
    )
    hashed = ours.get_shingles(text)
    assert len(hashed) == shingles
    tracemalloc.start()
    signature = ours.get_signature(hashed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert signature == library.get_signature(hashed)
    assert peak < 12 * 2**20, f"{peak:,} bytes"


@pytest.mark.parametrize(
    ("kind", "tasks", "workers"), [("exact", 1, 1), ("exact", 3, 2), ("minhash", 1, 1), ("minhash", 3, 2)]
)
def test_the_first_copy_stays(
    kind: str, tasks: int, workers: int, corpus: Any, jsonl: Any, config: Any, tmp_path: Path
) -> None:
    """Sources and files are listed against the alphabet, the copies are in disorder."""
    own = corpus.documents(24, 10)
    copies = own if kind == "exact" else [text.replace("that", "which", 3) for text in own]
    for index in range(4):
        texts = [*copies[index:16:4], *own[16:], *corpus.documents(3, 10)]
        jsonl(f"b{index}", corpus.random.sample(texts, len(texts)))
    sources = {
        "c": jsonl("c", own[:8]),
        "b": tmp_path / "b*.jsonl",
        "a": jsonl("a", [*copies, *corpus.documents(1, 10)]),
    }
    settings = config(sources, tasks=tasks, workers=workers, validation_fraction=0.0)
    everything = split_texts(settings, tmp_path / "all")
    first = {text.replace("which", "that"): text for text in reversed(everything)}
    expected = [text for text in dict.fromkeys(everything) if first[text.replace("which", "that")] == text]
    near = DedupConfig(exact=False, buckets=8, hashes_per_bucket=4)  # some copies agree before the original joins them
    dedup = near if kind == "minhash" else DedupConfig(minhash=False)
    assert split_texts(replace(settings, dedup=dedup), tmp_path / "some") == expected
    assert len(everything) == 8 + 4 * 15 + 25 and len(expected) == 24 + 13


def test_more_files_than_can_be_ordered_are_refused(jsonl: Any, config: Any, monkeypatch: Any) -> None:
    path = jsonl("a", ["a"])
    settings = config({"a": path, "b": path}, tasks=3, dedup=True)
    monkeypatch.setattr("data_pipeline.documents.MAX_FILES", 4)
    check_count(settings, {"a": [path] * 9, "b": [path]})
    with pytest.raises(UserError) as caught:
        check_count(settings, {"a": [path] * 9, "b": [path] * 2})
    fix = "it makes up to 5 files of documents, and dedup.exact orders 4; lower it"
    assert str(caught.value) == f"executor.tasks: 3 is not allowed; {fix}"
    check_count(replace(settings, dedup=DedupConfig(exact=False)), {"a": [path] * 9, "b": [path] * 2})
    limited = tuple(replace(source, limit=1) for source in settings.sources)
    check_count(replace(settings, sources=limited), {"a": [path] * 9, "b": [path] * 2})


@pytest.mark.parametrize(("exact", "minhash", "needed"), [(True, True, 109), (False, True, 106), (False, False, 100)])
def test_more_files_than_may_be_open_are_refused(
    exact: bool, minhash: bool, needed: int, jsonl: Any, config: Any, build: Any, monkeypatch: Any
) -> None:
    path = jsonl("a", ["a"])
    settings = replace(config({"a": path}, tasks=3), dedup=DedupConfig(exact=exact, minhash=minhash))
    monkeypatch.setattr("data_pipeline.documents.raise_file_limit", lambda: needed)
    check_count(settings, {"a": [path] * 9})
    monkeypatch.setattr("data_pipeline.documents.raise_file_limit", lambda: needed - 1)
    with pytest.raises(UserError) as caught:
        check_count(settings, {"a": [path] * 9})
    opened = f"a search for duplicates opens up to {needed} files, `ulimit -Hn` allows {needed - 1}"
    assert str(caught.value) == f"executor.tasks: 3 is not allowed; {opened}; lower it or raise that"
    monkeypatch.setattr("data_pipeline.documents.raise_file_limit", lambda: 99)
    with pytest.raises(UserError, match="lower it or raise that"):
        build(settings)


def test_steps_that_open_many_files_raise_the_limit(tmp_path: Path) -> None:
    runner, limits = Mock(), resource.getrlimit(resource.RLIMIT_NOFILE)
    runner.run.return_value = [Counter()]
    find_duplicates(DedupConfig(), Folder(str(tmp_path), ("a",)), tmp_path, runner)
    pipelines = {call.args[0]: call.args[1] for call in runner.run.call_args_list}
    for name in ("exact-find", "minhash-buckets", "minhash-cluster"):
        resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1] - 1, limits[1]))
        pipelines[name][0](None, 0, 1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_keys_of_minhash_reach_its_steps(tmp_path: Path) -> None:
    runner, config = Mock(), DedupConfig(exact=False, ngram=3, buckets=5, hashes_per_bucket=2, language="deu")
    runner.run.return_value = [Counter()]
    find_duplicates(config, Folder(str(tmp_path), ("a",)), tmp_path, runner)
    signatures, buckets, clusters = (call.args[1][-1] for call in runner.run.call_args_list)
    for step in (signatures, buckets, clusters):
        assert (step.config.n_grams, step.config.num_buckets, step.config.hashes_per_bucket) == (3, 5, 2)
    assert signatures.language == "deu"


def test_a_limit_holds_for_all_files_together(corpus: Any, jsonl: Any, config: Any, tmp_path: Path) -> None:
    for name in "abc":
        jsonl(name, corpus.documents(3, 1))
    settings = config({"a": tmp_path / "[abc].jsonl"}, tasks=3, validation_fraction=0.0)
    limited = replace(settings, sources=(replace(settings.sources[0], limit=4),))
    assert len(split_texts(limited, tmp_path / "work")) == 4


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


def test_a_source_may_have_its_own_share(corpus: Any, jsonl: Any, config: Any, build: Any, decoded: Any) -> None:
    settings = config({name: jsonl(name, corpus.documents(20, 2)) for name in "abc"}, validation_fraction=0.02)
    small, large, whole = settings.sources
    own = (replace(small, validation_fraction=0.0), replace(large, validation_fraction=0.5), whole)
    settings = replace(settings, sources=own, dedup=DedupConfig(minhash=False), validation_fraction=0.2)
    texts = run(build, decoded, settings)
    assert set(texts) == {"a_train", "b_train", "b_valid", "c_train", "c_valid"}
    for name, fraction in (("b", 0.5), ("c", 0.2)):
        assert all(split_of(text, settings.seed, fraction) == "valid" for text in texts[f"{name}_valid"])
        assert all(split_of(text, settings.seed, fraction) == "train" for text in texts[f"{name}_train"])
    with pytest.raises(UserError) as caught:
        replace(settings, dedup=DedupConfig(exact=False))
    fix = "without dedup.exact, a text of two sources would be in both splits; give all sources the same"
    assert str(caught.value) == f"sources.b.validation_fraction: 0.5 is not allowed; {fix}"


def test_split_share_and_independence() -> None:
    texts = [str(index) for index in range(20_000)]
    valid = {text for text in texts if split_of(text, 1, 0.05) == "valid"}
    assert len(valid) == pytest.approx(1000, rel=0.1)
    assert valid <= {
        text for text in texts if split_of(text, 1, 0.1) == "valid"
    }  # a larger share keeps the smaller one
    assert valid != {text for text in texts if split_of(text, 2, 0.05) == "valid"}
    assert all(split_of(text, 1, 0.0) == "train" for text in texts)
