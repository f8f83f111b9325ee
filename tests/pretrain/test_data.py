"""Training data: order, masks, batch sizes, and errors."""

import dataclasses
import gc
import os
import re
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.token_file import read_index
from looplm import checkpoint
from looplm.cli import to_dict
from looplm.config import DataConfig, DataSource, ParallelConfig, RampUpConfig, RunConfig
from looplm.failures import StorageFailure, UserError
from looplm.files import sha256_of
from looplm.megatron import process_groups
from pretrain.batch_schedule import BatchSchedule
from pretrain.data import (
    build_train_set,
    build_valid_set,
    check_corpus,
    data_order,
    index_cache,
    matches_data_order,
    micro_batches,
    samples_without_repetition,
    valid_samples,
)
from pretrain.mix import describe_passes
from pretrain.progress import Progress, check_start, describe
from pretrain.train import main as train_main
from tests.support.tiny import EOS, VOCAB, run_config, write_prefix


def ids(batches) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.ids_BS]


def train_batches(config, samples: int):
    """Return all micro-batches of a training set of ``samples`` samples, for a single rank."""
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), samples, samples)
    return micro_batches(train_set, config.data, 0, 0, 1)


def test_order_depends_only_on_consumed_samples(corpus, tmp_path, single_process):
    """From any point on, two ranks with micro-batches of 1 read the samples of one rank with micro-batches of 2."""
    config = run_config(corpus, tmp_path)
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 24, 24)
    alone = ids(micro_batches(train_set, config.data, 0, 0, 1))
    assert len(alone) == 24
    assert ids(micro_batches(train_set, config.data, 8, 0, 1)) == alone[8:]
    single = dataclasses.replace(config.data, micro_batch_size=1)
    ranks = [ids(micro_batches(train_set, single, 4, rank, 2)) for rank in (0, 1)]
    assert [row for pair in zip(*ranks, strict=True) for row in pair] == alone[4:]


def read(config, found, samples: int, horizon: int, first: int = 0) -> list[tuple[int, ...]]:
    train_set = build_train_set(config, found, samples, horizon, first)
    return [tuple(row) for row in ids(micro_batches(train_set, config.data, first, 0, 1))]


@pytest.fixture
def varied(corpus, tmp_path):
    """Return a run's configuration on two sources of which no two samples are alike."""
    record, random = read_manifest(corpus / "train").tokenizer, np.random.default_rng(0)
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    for name in ("a", "b"):
        documents = [[*random.integers(10, 200, 40).tolist(), EOS] for _ in range(200)]
        write_prefix(tmp_path / name, documents, record, "train")
    sources = (DataSource(prefix=str(tmp_path / "a"), weight=2), DataSource(prefix=str(tmp_path / "b")))
    return run_config(corpus, tmp_path / "run", data={"train": sources, "micro_batch_size": 1})


@pytest.mark.parametrize(("sources", "held"), [(1, 256), (2, 382)])
def test_up_to_where_no_source_repeats_the_order_is_the_same_for_any_number_of_samples(
    sources, held, varied, single_process
):
    config = dataclasses.replace(varied, data=dataclasses.replace(varied.data, train=varied.data.train[:sources]))
    found = check_corpus(config.data, config.model.vocab_size)
    once = samples_without_repetition(config.data, found)
    every = read(config, found, once, once)
    assert len(every) == len(set(every)) == once, "no sample comes twice"
    assert 0.99 * held <= once <= held
    for samples in (24, 40, once - 1):
        assert read(config, found, samples, once) == every[:samples]
    assert read(config, found, once, once, 30) == every[30:]


@pytest.mark.promise(
    text="A run that is extended reads the same samples as before, then a new pass",
    expected="the same first samples, another order after them",
)
def test_beyond_the_data_an_extended_run_appends_a_pass(varied, single_process, record_property):
    config, found = varied, check_corpus(varied.data, varied.model.vocab_size)
    horizon = samples_without_repetition(config.data, found) + 24
    short, longer = read(config, found, horizon, horizon), read(config, found, horizon + 2, horizon)
    assert longer[:horizon] == short and len(longer) == 2 * horizon
    assert sorted(longer[horizon:]) != sorted(short) and longer[horizon:] != short
    assert read(config, found, horizon + 2, horizon, horizon) == longer[horizon:], "a pass that is over is not built"
    record_property("seen", "the same first samples, another order after them")


def test_a_rollback_seldom_needs_another_index(varied, tmp_path, single_process):
    found = check_corpus(varied.data, varied.model.vocab_size)
    for samples in (98, 99, 103):
        build_train_set(varied, found, samples, samples_without_repetition(varied.data, found))
    assert len(list(tmp_path.rglob("*-shuffle_index.npy"))) == 2, "one of each source"


def test_labels_are_the_next_tokens_and_masks_follow_documents(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, data={"seq_length": 64})
    seen_boundary = False
    for batch in train_batches(config, 8):
        ids_SB = batch.ids_BS.t()
        assert torch.equal(ids_SB[1:], batch.labels_SB[:-1])
        assert batch.document_start_SB is not None
        for column in range(ids_SB.size(1)):
            start = 0
            for position, token in enumerate(ids_SB[:, column].tolist()):
                assert batch.document_start_SB[position, column] == start
                assert batch.mask_SB[position, column] == float(
                    token != EOS
                )  # the first token of the next document cannot be predicted
                if token == EOS:
                    start, seen_boundary = position + 1, True
    assert seen_boundary


def test_without_document_masking_every_token_has_a_loss(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, data={"document_masking": False})
    batch = next(train_batches(config, 4))
    assert batch.document_start_SB is None and bool(batch.mask_SB.all())


def test_weights_decide_the_mix(corpus, tmp_path, single_process):
    """Two sources with different tokens are mixed 3 : 1."""
    record = read_manifest(corpus / "train").tokenizer
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    for name, token in (("a", 10), ("b", 20)):
        write_prefix(tmp_path / name, [[token] * 40 + [EOS]] * 30, record, "train")
    sources = (DataSource(prefix=str(tmp_path / "a"), weight=3), DataSource(prefix=str(tmp_path / "b")))
    config = run_config(corpus, tmp_path / "run", data={"train": sources})
    from_a = sum(10 in row for row in ids(train_batches(config, 40)))
    assert from_a == pytest.approx(30, abs=1)


def test_validation_is_always_the_same_for_every_seed(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, logging={"eval_samples": 4})
    found = check_corpus(config.data, config.model.vocab_size)
    rows = []
    for seed in (1, 1, 2):
        valid_set = build_valid_set(config.data, found, 8, seed, index_cache(config))
        assert valid_set is not None
        rows.append(ids(micro_batches(valid_set, config.data, 0, 0, 1)))
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) >= 4
    assert build_valid_set(dataclasses.replace(config.data, valid=()), found, 8, 1, index_cache(config)) is None


def test_a_validation_ends_when_it_has_read_all(varied, single_process):
    one, other = varied.data.train[:2]
    one = dataclasses.replace(one, weight=3 * other.weight)
    held = list[int]()
    for sources in ((one,), (other,), (one, other)):
        data = dataclasses.replace(varied.data, valid=sources)
        found = check_corpus(data, varied.model.vocab_size)
        samples = valid_samples(data, found)
        assert samples is not None
        held.append(samples)
        valid_set = build_valid_set(data, found, samples, 1, index_cache(varied))
        assert valid_set is not None
        rows = set(map(tuple, ids(islice(micro_batches(valid_set, data, 0, 0, 1), samples))))
        assert len(rows) >= 0.99 * sum(held[:2] if len(sources) > 1 else held[-1:]), "all that there is"
    assert held[2] == max(held[0] * 4 // 3, held[1] * 4)
    assert valid_samples(dataclasses.replace(data, valid=()), found) is None


@pytest.mark.promise(
    text="Data rewritten at the same prefix never uses the old index", expected="samples of the new data alone"
)
@pytest.mark.parametrize("same_size", [False, True])
def test_changed_data_never_uses_an_old_index(same_size, corpus, tmp_path, single_process, record_property):
    """Megatron reuses an index for a prefix of the same name; our cache is keyed by content."""
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    config = run_config(folder, tmp_path / "run")
    before, size = ids(train_batches(config, 4)), (folder / "train.bin").stat().st_size
    lengths = read_index(folder / "train.idx").lengths().tolist() if same_size else [51] * 20
    documents = [[7] * (length - 1) + [EOS] for length in lengths]
    write_prefix(folder / "train", documents, read_manifest(corpus / "train").tokenizer, "train")
    assert ((folder / "train.bin").stat().st_size == size) == same_size
    after = ids(train_batches(config, 4))
    assert before != after and all(set(row) <= {7, EOS} for row in after)
    record_property("seen", "samples of the new data alone")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


class _Payload:
    """An object that, unpickled, ends the process."""

    def __reduce__(self):
        return os._exit, (66,)


def _program(path: Path) -> None:
    np.save(path, np.array([_Payload()], object), allow_pickle=True)


DAMAGES = {
    "truncated": _cut,
    "a flipped byte": _flip,
    "empty": lambda path: path.write_bytes(b""),
    "a program": _program,
    "checksums gone": lambda path: (path.parent / "checksums.json").unlink(),
    "checksums truncated": lambda path: _cut(path.parent / "checksums.json"),
    "checksums that are a list": lambda path: (path.parent / "checksums.json").write_text("[]"),
    "an unfinished file of another run": lambda path: (path.parent / "new.npy").write_bytes(b"NUM"),
}


@pytest.mark.promise(
    text="A damaged index in a cache, or one that would run code, is named and computed again",
    expected="the same samples",
)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("array", ["document_index", "sample_index", "shuffle_index", "BlendedDataset-train-*index"])
def test_a_damaged_index_is_computed_again(array, damage, corpus, tmp_path, single_process, capsys, record_property):
    sources = (DataSource(prefix=str(corpus / "train")), DataSource(prefix=str(corpus / "valid")))
    config = run_config(corpus, tmp_path, data={"train": sources})
    before = ids(train_batches(config, 8))
    path = next((tmp_path / "index_cache").rglob(f"*{array}.npy"))
    capsys.readouterr()
    DAMAGES[damage](path)
    assert ids(train_batches(config, 8)) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.endswith("; computing it again") for line in lines)
    assert ids(train_batches(config, 8)) == before and not capsys.readouterr().out
    record_property("seen", "the same samples")


@pytest.mark.slow
@pytest.mark.promise(
    text="A disk that is full while sample indices are written ends the run, and a repetition is whole",
    expected="status 5, one line about the disk; then the same samples",
)
def test_a_full_disk(corpus, tmp_path, single_process, record_property):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a disk")
    try:
        config = run_config(corpus, tmp_path / "run", data={"cache_dir": str(disk)})
        for kilobytes in (92, 84, 76):
            (disk / "filler").write_bytes(bytes(kilobytes << 10))
            with pytest.raises(StorageFailure) as caught:
                train_batches(config, 4000)
            assert "\n" not in str(caught.value) and str(disk) in str(caught.value)
        (disk / "filler").unlink()
        rows = ids(train_batches(config, 40))
        assert rows == ids(train_batches(run_config(corpus, tmp_path / "other"), 40))
        record_property("seen", f"status {caught.value.status}: one line about the disk; then the same samples")
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.promise(
    text="No character of a path is read as a pattern by training", expected="the samples of the plain path"
)
def test_odd_paths(corpus, tmp_path, single_process, record_property):
    odd = tmp_path / "exp[1]*?{a,b} #%::-ü"
    shutil.copytree(corpus, odd / "data")
    config = run_config(odd / "data", odd / "run")
    plain = run_config(corpus, tmp_path / "run")
    assert ids(train_batches(config, 8)) == ids(train_batches(plain, 8)) == ids(train_batches(config, 8))
    record_property("seen", "the samples of the plain path")


def test_a_sample_outlives_its_dataset(corpus, tmp_path, single_process):
    """Megatron's token file ends its mapping with the dataset; a view of it would then be a segmentation fault."""
    config = run_config(corpus, tmp_path)
    train_set: Any = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 4, 4)
    sample = train_set[0]
    mapped = np.frombuffer(train_set.datasets[0].dataset.dataset.bin_reader._bin_buffer, np.uint16)
    assert not any(np.shares_memory(mapped, value.numpy()) for value in sample.values())
    kept = sample["tokens"].tolist()
    del mapped, train_set
    gc.collect()
    assert sample["tokens"].tolist() == kept


@pytest.mark.promise(
    text="A pad id that is also a real token changes neither that token nor the loss of any sample",
    expected="the ids and masks of another pad id",
)
@pytest.mark.parametrize("document_masking", [False, True])
def test_a_pad_id_inside_the_text(document_masking, corpus, tmp_path, single_process, monkeypatch, record_property):
    """Megatron-LM#6981: the first sample's mask is changed in place and used for all."""
    monkeypatch.setattr("pretrain.data.FULL_CHECK_BYTES", 0)  # the check of small files refuses such a pad
    documents = [[5, 6, 7, 8] * 10 + [EOS]] * 40
    rows = []
    for pad in (2, 6):
        record = dataclasses.replace(read_manifest(corpus / "train").tokenizer, pad_id=pad)
        folder = tmp_path / str(pad)
        folder.mkdir()
        shutil.copy(corpus / "tokenizer.json", folder)
        write_prefix(folder / "train", documents, record, "train")
        data = {"document_masking": document_masking, "train": (DataSource(prefix=str(folder / "train")),), "valid": ()}
        batches = list(train_batches(run_config(corpus, folder, data=data), 16))
        rows.append([(batch.ids_BS.tolist(), batch.labels_SB.tolist(), batch.mask_SB.tolist()) for batch in batches])
        assert all(6 in row for batch in batches for row in batch.ids_BS.tolist())
    assert rows[0] == rows[1]
    record_property("seen", "the ids and masks of another pad id")


def test_batch_ramp_up():
    data = DataConfig(
        train=(DataSource(prefix="x"),),
        micro_batch_size=2,
        global_batch_size=8,
        rampup=RampUpConfig(start=4, increment=2, samples=20),
    )
    schedule = BatchSchedule(data, data_parallel_size=1)
    assert schedule.at(0) == (2, 4) and schedule.at(10)[1] == 6 and schedule.at(10_000) == (4, 8)
    assert schedule.samples_of(2) == 8 and schedule.samples_of(0, 24) == schedule.samples_of(-1, 24) == 24
    for consumed in (0, 14, 20, 36):
        total = consumed
        for steps in range(1, 9):
            total += schedule.at(total)[1]
            assert schedule.samples_of(steps, consumed) == total
    assert schedule.at(0) == (2, 4), "asking about later steps changes nothing"


@pytest.mark.parametrize(
    ("ranks", "pipeline", "micro", "samples", "expected"),
    [(1, 1, 4, 64, 16), (1, 1, 4, 63, 16), (16, 4, 4, 64, 4), (1, 2, 1, 5, 6), (3, 1, 8, 64, 3)],
)
def test_a_validation_reads_whole_micro_batches_that_fill_the_pipeline(ranks, pipeline, micro, samples, expected):
    data = DataConfig(train=(DataSource(prefix="x"),), micro_batch_size=micro, global_batch_size=micro * 192)
    count = BatchSchedule(data, ranks, pipeline).validation(samples)
    assert count == expected and count % pipeline == 0 and count * micro * ranks >= samples


@pytest.mark.parametrize(("held", "expected"), [(99, 8), (32, 8), (31, 4), (16, 4), (15, 4)])
def test_a_validation_reads_no_more_than_its_data_hold(held, expected):
    """Two ranks of a pipeline with micro-batches of 4 on one replica; samples are asked for in units of 16."""
    data = DataConfig(train=(DataSource(prefix="x"),), micro_batch_size=4, global_batch_size=16)
    assert BatchSchedule(data, 1, 4).validation(32, held) == expected


@pytest.mark.parametrize(
    ("train", "valid", "key", "name", "same"),
    [
        (["train", "train"], ["valid"], "data.train", "train", "train in data.train"),
        (["train"], ["train"], "data.valid", "train", "train in data.train"),
        (["train"], ["copy"], "data.valid", "copy", "train in data.train"),
        (["train"], ["valid", "valid"], "data.valid", "valid", "valid in data.valid"),
        (["valid"], [], "data.train", "valid", ""),
    ],
)
def test_a_new_run_reads_no_source_twice_and_no_held_out_text(
    train, valid, key, name, same, corpus, tmp_path, monkeypatch
):
    shutil.copytree(corpus, tmp_path, dirs_exist_ok=True)
    for suffix in ("bin", "idx"):
        shutil.copy(corpus / f"train.{suffix}", tmp_path / f"copy.{suffix}")
    record, copy = read_manifest(corpus / "train").tokenizer, tmp_path / "copy"
    write_manifest(copy, source="other", split="valid", vocab_size=VOCAB, tokenizer=record, config_sha256="")
    sources = {
        key: tuple(DataSource(prefix=str(tmp_path / name)) for name in names)
        for key, names in (("train", train), ("valid", valid))
    }
    config = run_config(corpus, tmp_path / "run", data=sources)
    found = check_corpus(config.data, VOCAB)
    fix = "its manifest says that it is held out for validation; train on a prefix of split train"
    fix = f"it holds the same data as {tmp_path}/{same}; give them once" if same else fix
    line = f"{key}: '{tmp_path}/{name}' is not allowed; {fix}"
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        check_start(config, found, None, None)
    monkeypatch.setattr(checkpoint, "git_revision", lambda: "")
    about = describe(config, found, Progress(horizon_samples=1))
    check_start(config, found, about, None)  # begun by an earlier version


def test_passes_over_each_source_are_counted():
    sources = (DataSource(prefix="d/web", weight=3), DataSource(prefix="d/wiki"))
    web, many = "passes over the data: web 0.30, wiki 4.00", "more than 4 passes teach little (arXiv 2305.16264)"
    assert list(describe_passes(sources, (1000, 25), 400)) == [web]
    fix = "add data, lower the weight or train fewer steps"
    web, warning = "passes over the data: web 0.31, wiki 4.10", f"warning: wiki: {many}; {fix}"
    assert list(describe_passes(sources, (1000, 25), 410)) == [web, warning]
    alike = (DataSource(prefix="a/train"), DataSource(prefix="b/train"))
    assert list(describe_passes(alike, (10, 20), 20)) == ["passes over the data: a/train 1.00, b/train 0.50"]


@pytest.mark.parametrize(
    ("ranks", "key", "values"),
    [
        (3, "data.global_batch_size", {"global_batch_size": 4, "micro_batch_size": 2}),
        (2, "data.rampup.start", {"global_batch_size": 8, "rampup": RampUpConfig(start=2, increment=2, samples=4)}),
    ],
)
def test_a_batch_that_does_not_fit_the_ranks_raises(ranks, key, values):
    data = DataConfig(**{"train": (DataSource(prefix="x"),), "micro_batch_size": 2} | values)
    with pytest.raises(UserError, match=key):
        BatchSchedule(data, ranks)


def test_data_order_changes_with_what_decides_the_samples_and_with_nothing_else(corpus, tmp_path):
    config = run_config(corpus, tmp_path)

    def order(run: RunConfig) -> str:
        return data_order(run, check_corpus(run.data, run.model.vocab_size))

    same = dataclasses.replace(config, output_dir="elsewhere", optim=dataclasses.replace(config.optim, lr=1.0))
    unvalidated = run_config(corpus, tmp_path, data={"valid": ()})
    assert order(same) == order(unvalidated) == order(config)
    (source,) = config.data.train
    twice = (source, dataclasses.replace(source, weight=2.0))
    others = ({"seed": 9}, {"data": {"seq_length": 16}}, {"data": {"train": twice}}, {"data": {"train": twice[::-1]}})
    assert len({order(run_config(corpus, tmp_path, **changed)) for changed in others} - {order(config)}) == 4
    found = check_corpus(config.data, config.model.vocab_size)
    before = dataclasses.replace(found, train_fingerprint="")  # earlier checkpoints count the validation sources too
    for earlier in (data_order(config, before), order(config)):
        assert matches_data_order(earlier, config, found)
    assert not matches_data_order(order(run_config(corpus, tmp_path, seed=9)), config, found)


def _truncate(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"")


def _other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<pad>", "<fill>"))


def _mixed_tokenizers(folder: Path) -> None:
    other = folder / "other.json"
    other.write_text((folder / "tokenizer.json").read_text() + " ")
    record = read_manifest(folder / "valid").tokenizer
    record = dataclasses.replace(record, path=other.name, sha256=sha256_of(other))
    write_prefix(folder / "valid", [[5] * 40 + [EOS]] * 20, record, "valid")


def _id_above_the_vocabulary(folder: Path) -> None:
    record = read_manifest(folder / "train").tokenizer
    write_prefix(folder / "train", [[5] * 40 + [VOCAB, EOS]] * 20, record, "train")


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "train.bin").read_bytes())
    content[100] ^= 1
    (folder / "train.bin").write_bytes(content)


FAULTS = {
    "a token id above the vocabulary": (_id_above_the_vocabulary, rf"train\.bin: holds token id {VOCAB}"),
    "a flipped byte": (_flip_a_byte, r"train\.bin: its content"),
    "a missing file": (lambda folder: (folder / "train.bin").unlink(), r"train\.bin"),
    "an empty file": (_empty, r"train\.bin"),
    "a truncated file": (_truncate, r"train\.bin"),
    "a missing manifest": (lambda folder: (folder / "train.manifest.json").unlink(), r"train\.manifest\.json"),
    "a changed tokenizer": (_other_tokenizer, r"tokenizer\.json"),
    "two tokenizers": (_mixed_tokenizers, "another tokenizer"),
}


@pytest.mark.promise(text="Training refuses damaged or foreign data before it starts", expected="status 2, one line")
@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_is_a_one_line_error_before_training(corpus, tmp_path, fault, record_property):
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    damage, expected = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        check_corpus(run_config(folder, tmp_path / "run").data, VOCAB)
    assert "\n" not in str(caught.value)
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


@pytest.mark.promise(
    text="A token id outside the vocabulary is refused before any process group starts, whatever layout and size",
    expected="status 2, one line that names the file and the id",
)
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_id_outside_the_vocabulary(tensor, corpus, tmp_path, monkeypatch, record_property):
    """At tensor=2, the embedding would give zeros for it and the loss would be finite."""
    monkeypatch.setattr("pretrain.data.FULL_CHECK_BYTES", 0)  # as if the .bin were too large to be read
    monkeypatch.setattr(process_groups, "start", None)  # fails if it is called
    for name, value in (("RANK", "0"), ("WORLD_SIZE", str(tensor))):
        monkeypatch.setenv(name, value)
    shutil.copytree(corpus, tmp_path / "data")
    _id_above_the_vocabulary(tmp_path / "data")
    config = run_config(tmp_path / "data", tmp_path / "run", parallel=ParallelConfig(tensor=tensor))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(to_dict(config)))
    with pytest.raises(UserError, match=rf"train\.bin: holds token id {VOCAB}, the vocabulary has {VOCAB}") as caught:
        train_main(["--config", str(tmp_path / "c.yaml")])
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


@pytest.mark.slow
@pytest.mark.promise(
    text="A token id outside the vocabulary that no check has seen ends the run when its sample is read",
    expected="status 2, one line that names the file and the id",
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_id_outside_the_vocabulary_in_a_sample(
    num_workers, corpus, tmp_path, monkeypatch, single_process, record_property
):
    """As of an older manifest, or of data that changed after the check."""
    shutil.copytree(corpus, tmp_path / "data")
    config = run_config(tmp_path / "data", tmp_path / "run", data={"num_workers": num_workers})
    found = check_corpus(config.data, config.model.vocab_size)
    np.full((tmp_path / "data/train.bin").stat().st_size // 2, VOCAB, np.uint16).tofile(tmp_path / "data/train.bin")
    train_set = build_train_set(config, found, 8, 8)
    expected = rf"train\.bin: holds token id {VOCAB}, the vocabulary has {VOCAB} \(sample \d+\)"
    with pytest.raises(UserError, match=expected) as caught:
        next(micro_batches(train_set, config.data, 0, 0, 1))
    assert "\n" not in str(caught.value)
    record_property("seen", f"status {caught.value.status}: {caught.value}".replace(f"{tmp_path}/", ""))


def test_data_must_fit_the_model(corpus, tmp_path):
    with pytest.raises(UserError, match=rf"model\.vocab_size: 100 .*{VOCAB} tokens"):
        check_corpus(run_config(corpus, tmp_path).data, vocab_size=100)
    shutil.copytree(corpus, tmp_path / "data")
    record = read_manifest(corpus / "train").tokenizer
    write_prefix(tmp_path / "data/train", [[5] * 10 + [EOS]], record, "train")
    with pytest.raises(UserError, match=r"holds 11 tokens.*data\.seq_length=32"):
        check_corpus(run_config(tmp_path / "data", tmp_path / "run").data, VOCAB)
