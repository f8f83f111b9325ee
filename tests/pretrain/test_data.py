"""Training data: order, masks, batch sizes, and errors."""

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


def test_an_extended_run_appends_a_pass(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path)
    found = check_corpus(config.data, config.model.vocab_size)
    short = ids(micro_batches(build_train_set(config, found, 24, 24), config.data, 0, 0, 1))
    longer = ids(micro_batches(build_train_set(config, found, 40, 24), config.data, 0, 0, 1))
    assert longer[:24] == short and len(longer) == 48 and longer[24:] != short


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


def test_validation_is_always_the_same(corpus, tmp_path, single_process):
    config = run_config(corpus, tmp_path, logging={"eval_samples": 4})
    found = check_corpus(config.data, config.model.vocab_size)
    rows = []
    for _ in range(2):
        valid_set = build_valid_set(config.data, found, 8, config.seed, index_cache(config))
        assert valid_set is not None
        rows.append(ids(micro_batches(valid_set, config.data, 0, 0, 1)))
    assert rows[0] == rows[1] and len(rows[0]) >= 4
    assert build_valid_set(dataclasses.replace(config.data, valid=()), found, 8, 1, index_cache(config)) is None


def test_changed_data_never_uses_an_old_index(corpus, tmp_path, single_process):
    """Megatron reuses an index for a prefix of the same name; our cache is keyed by content."""
    folder = tmp_path / "data"
    shutil.copytree(corpus, folder)
    config = run_config(folder, tmp_path / "run")
    before = ids(train_batches(config, 4))
    write_prefix(folder / "train", [[7] * 50 + [EOS]] * 20, read_manifest(corpus / "train").tokenizer, "train")
    after = ids(train_batches(config, 4))
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
def test_a_batch_that_does_not_fit_the_ranks_raises(ranks, key, values):
    data = DataConfig(**{"train": (DataSource(prefix="x"),), "micro_batch_size": 2} | values)
    with pytest.raises(UserError, match=key):
        BatchSchedule(data, ranks)


def test_data_order_changes_with_seed_and_length_only(corpus, tmp_path):
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
def test_bad_data_is_a_one_line_error_before_training(corpus, tmp_path, fault):
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
