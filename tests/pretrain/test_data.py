"""Training data: order, masks, batch sizes, refusals."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from data_pipeline.manifest import read_manifest
from looplm.cli import UserError
from looplm.config import DataConfig, DataSource, RampUpConfig
from looplm.files import sha256_of
from pretrain.data import (
    BatchSchedule,
    build_train_set,
    build_valid_set,
    check_corpus,
    data_order,
    index_cache,
    micro_batches,
)
from tests.support.tiny import EOS, VOCAB, run_config, write_prefix


def ids(batches) -> list[list[int]]:
    return [row.tolist() for batch in batches for row in batch.ids_BS]


def test_order_depends_on_consumed_samples_alone(corpus, tmp_path, single_process):
    """Two ranks of micro-batch 1 read what one rank of micro-batch 2 reads, from any point on."""
    config = run_config(corpus, tmp_path)
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 24, 24)
    alone = ids(micro_batches(train_set, config.data, 0, 0, 1))
    assert len(alone) == 24
    assert ids(micro_batches(train_set, config.data, 8, 0, 1)) == alone[8:]
    single = dataclasses.replace(config.data, micro_batch_size=1)
    ranks = [ids(micro_batches(train_set, single, 4, rank, 2)) for rank in (0, 1)]
    assert [row for pair in zip(*ranks, strict=True) for row in pair] == alone[4:]


def test_an_extended_run_appends_a_pass(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path)
    found = check_corpus(config.data, config.model.vocab_size)
    short = ids(micro_batches(build_train_set(config, found, 24, 24), config.data, 0, 0, 1))
    longer = ids(micro_batches(build_train_set(config, found, 40, 24), config.data, 0, 0, 1))
    assert longer[:24] == short and len(longer) == 48 and longer[24:] != short


def test_labels_are_the_next_tokens_and_masks_follow_documents(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, data={"seq_length": 64})
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 8, 8)
    seen_boundary = False
    for batch in micro_batches(train_set, config.data, 0, 0, 1):
        ids_SB = batch.ids_BS.t()
        assert torch.equal(ids_SB[1:], batch.labels_SB[:-1])
        assert batch.document_start_SB is not None
        for column in range(ids_SB.size(1)):
            start = 0
            for position, token in enumerate(ids_SB[:, column].tolist()):
                assert batch.document_start_SB[position, column] == start
                assert batch.mask_SB[position, column] == float(token != EOS)  # nothing follows from an ended document
                if token == EOS:
                    start, seen_boundary = position + 1, True
    assert seen_boundary


def test_without_document_masking_every_token_counts(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, data={"document_masking": False})
    batch = next(
        micro_batches(
            build_train_set(config, check_corpus(config.data, config.model.vocab_size), 4, 4), config.data, 0, 0, 1
        )
    )
    assert batch.document_start_SB is None and bool(batch.mask_SB.all())


def test_weights_decide_the_mix(corpus, tmp_path, single_process):
    """Two sources that differ in one token each, mixed 3 : 1."""
    record = read_manifest(corpus / "train").tokenizer
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    for name, token in (("a", 10), ("b", 20)):
        write_prefix(tmp_path / name, [[token] * 40 + [EOS]] * 30, record, "train")
    sources = (DataSource(prefix=str(tmp_path / "a"), weight=3), DataSource(prefix=str(tmp_path / "b")))
    config = run_config(corpus, tmp_path / "run", data={"train": sources})
    rows = ids(
        micro_batches(
            build_train_set(config, check_corpus(config.data, config.model.vocab_size), 40, 40), config.data, 0, 0, 1
        )
    )
    from_a = sum(10 in row for row in rows)
    assert from_a == pytest.approx(30, abs=1)


def test_validation_is_always_the_same(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, logging={"eval_samples": 4})
    found = check_corpus(config.data, config.model.vocab_size)
    valid_sets = [build_valid_set(config.data, found, 8, config.seed, index_cache(config)) for _ in range(2)]
    first, second = (ids(micro_batches(valid_set, config.data, 0, 0, 1)) for valid_set in valid_sets)
    assert first == second and len(first) >= 4
    assert build_valid_set(dataclasses.replace(config.data, valid=()), found, 8, 1, index_cache(config)) is None


def test_changed_data_never_meets_an_old_index(corpus, tmp_path, single_process):
    """Megatron reuses an index for a prefix of the same name; ours are kept by content."""
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    config = run_config(folder, tmp_path / "run")
    before = ids(
        micro_batches(
            build_train_set(config, check_corpus(config.data, config.model.vocab_size), 4, 4), config.data, 0, 0, 1
        )
    )
    write_prefix(folder / "train", [[7] * 50 + [EOS]] * 20, read_manifest(corpus / "train").tokenizer, "train")
    after = ids(
        micro_batches(
            build_train_set(config, check_corpus(config.data, config.model.vocab_size), 4, 4), config.data, 0, 0, 1
        )
    )
    assert before != after and all(set(row) <= {7, EOS} for row in after)


def test_batch_ramp_up():
    data = DataConfig(
        train=(DataSource(prefix="x"),),
        micro_batch_size=2,
        global_batch_size=8,
        rampup=RampUpConfig(start=4, increment=2, samples=20),
    )
    schedule = BatchSchedule(data, data_parallel_size=1)
    assert schedule.at(0) == (2, 4) and schedule.at(10)[1] == 6 and schedule.at(10_000) == (4, 8)
    assert schedule.samples_of(2) == 8
    assert schedule.at(0) == (2, 4), "asking about later steps changes nothing"


@pytest.mark.parametrize(
    ("ranks", "key", "values"),
    [
        (3, "data.global_batch_size", {"global_batch_size": 4, "micro_batch_size": 2}),
        (2, "data.rampup.start", {"global_batch_size": 8, "rampup": RampUpConfig(start=2, increment=2, samples=4)}),
    ],
)
def test_a_batch_that_does_not_fit_the_ranks_is_refused(ranks, key, values):
    data = DataConfig(**{"train": (DataSource(prefix="x"),), "micro_batch_size": 2} | values)
    with pytest.raises(UserError, match=key):
        BatchSchedule(data, ranks)


def test_order_fingerprint_names_what_decides_the_order(corpus, tmp_path):
    config = run_config(corpus, tmp_path)
    found = check_corpus(config.data, config.model.vocab_size)
    same = dataclasses.replace(config, output_dir="elsewhere", optim=dataclasses.replace(config.optim, lr=1.0))
    assert data_order(same, found) == data_order(config, found)
    for changed in ({"seed": 9}, {"data": {"seq_length": 16}}):
        assert data_order(run_config(corpus, tmp_path, **changed), found) != data_order(config, found)


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


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_data_is_one_line_before_training(corpus, tmp_path, fault):
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    damage, expected = FAULTS[fault]
    damage(folder)
    with pytest.raises(UserError, match=expected) as caught:
        check_corpus(run_config(folder, tmp_path / "run").data, VOCAB)
    assert "\n" not in str(caught.value)


def test_data_must_fit_the_model(corpus, tmp_path):
    with pytest.raises(UserError, match=rf"model\.vocab_size: 100 .*{VOCAB} tokens"):
        check_corpus(run_config(corpus, tmp_path).data, vocab_size=100)
    shutil.copytree(corpus, tmp_path / "data")
    record = read_manifest(corpus / "train").tokenizer
    write_prefix(tmp_path / "data/train", [[5] * 10 + [EOS]], record, "train")
    with pytest.raises(UserError, match=r"holds 11 tokens.*data\.seq_length=32"):
        check_corpus(run_config(tmp_path / "data", tmp_path / "run").data, VOCAB)
