"""Conversations in training: packed whole, with a loss on answers, mixed with plain text."""

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from data_pipeline.manifest import read_manifest
from data_pipeline.token_file import NO_LOSS, read_index
from looplm import chat, checkpoint, generate
from looplm.checkpoint import step_folder
from looplm.config import DataSource
from looplm.failures import UserError
from pretrain.data import build_train_set, build_valid_set, check_corpus, index_cache, micro_batches, valid_samples
from pretrain.mixed_data import best_fit, pack
from pretrain.progress import Progress, describe
from pretrain.train import train
from tests.support.tiny import BOS, EOS, PAD, VOCAB, run_config, train_rows, write_chat_corpus
from tools.convert_hf import main as convert

pytestmark = pytest.mark.usefixtures("keep_process_groups")

LONG = {"max_sequence_length": 128}


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chat_corpus(folder)
    return folder


def slow_best_fit(lengths: list[int], size: int) -> list[int]:
    """Best fit by its definition: longest first, in the fullest bin with room; of equal bins, the last one changed."""
    bins: list[dict[str, int]] = []
    chosen = [0] * len(lengths)
    for clock, item in enumerate(sorted(range(len(lengths)), key=lambda item: -lengths[item])):
        fitting = [candidate for candidate in bins if candidate["room"] >= lengths[item]]
        if fitting:
            found = min(fitting, key=lambda candidate: (candidate["room"], -candidate["changed"]))
        else:
            found = {"number": len(bins), "room": size, "changed": 0}
            bins.append(found)
        found["room"] -= lengths[item]
        found["changed"] = clock
        chosen[item] = found["number"]
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_best_fit_follows_its_definition(seed):
    lengths_N = np.random.default_rng(seed).integers(1, 65, 300).astype(np.int32)
    bin_N = best_fit(lengths_N, 64)
    assert bin_N.tolist() == slow_best_fit(lengths_N.tolist(), 64)
    assert np.bincount(bin_N, lengths_N).max() <= 64


def test_every_epoch_holds_each_document_once_and_none_that_is_too_long():
    lengths_N = np.array([5, 9, 3, 3, 8, 2, 30], np.int32)
    order, starts = pack(lengths_N, 10, samples=7, seed=1)
    samples = [order[start:end] for start, end in pairwise(starts)]
    assert len(samples) >= 7 and all(lengths_N[sample].sum() <= 10 for sample in samples)
    assert starts[-1] == len(order) == 12 and sorted(order[:6]) == sorted(order[6:]) == [0, 1, 2, 3, 4, 5]
    assert order[:6].tolist() != order[6:].tolist() != pack(lengths_N, 10, samples=7, seed=2)[0][6:].tolist()
    assert pack(lengths_N, 10, samples=7, seed=1)[0].tolist() == order.tolist()
    with pytest.raises(ValueError, match="none of 7"):
        pack(lengths_N, 1, samples=1, seed=1)


def test_samples_are_whole_conversations_with_a_loss_on_answers(chats, tmp_path, single_process):
    """Compare ids, labels, loss and document starts with the stored token file."""
    config = run_config(chats, tmp_path, data={"seq_length": 100}, model=LONG)
    stored = [np.array(document) for document in IndexedDataset(str(chats / "train"))]
    rest = [(document & ~NO_LOSS).tolist() for document in stored]
    train_set = build_train_set(config, check_corpus(config.data, config.model.vocab_size), 8, 8)
    for batch in micro_batches(train_set, config.data, 0, 0, 1):
        assert batch.document_start_SB is not None
        for column in range(2):
            tokens = [*batch.ids_BS[column].tolist(), int(batch.labels_SB[-1, column])]
            assert batch.labels_SB[:, column].tolist() == tokens[1:]
            start = 0
            while tokens[start] != PAD:
                end = start + tokens[start:].index(EOS) + 1
                document = stored[rest.index(tokens[start:end])]
                wanted = [float(token & NO_LOSS == 0) for token in document]
                assert batch.mask_SB[max(0, start - 1) : end - 1, column].tolist() == wanted[start == 0 :]
                assert set(batch.document_start_SB[start : end - (end > 100), column].tolist()) == {start}
                start = end
                if start > 100:
                    break
            assert start > 50, "best fit leaves little padding"
            assert set(tokens[start:]) <= {PAD} and not batch.mask_SB[max(0, start - 1) :, column].any()
            assert start >= 100 or set(batch.document_start_SB[start:, column].tolist()) == {start}


def test_conversations_and_plain_text_mix(chats, tmp_path, single_process):
    sources = (DataSource(prefix=str(chats / "train"), weight=1), DataSource(prefix=str(chats / "plain"), weight=3))
    config = run_config(chats, tmp_path, data={"seq_length": 100, "train": sources}, model=LONG)
    found = check_corpus(config.data, config.model.vocab_size)
    start = json.loads((chats / "tokenizer.json").read_text())["added_tokens"][3]
    assert start["content"] == chat.START
    batches = list(micro_batches(build_train_set(config, found, 40, 40), config.data, 0, 0, 1))
    talks = [start["id"] in row for batch in batches for row in batch.ids_BS.tolist()]
    assert sum(talks) == pytest.approx(10, abs=1) and max(int(batch.ids_BS.max()) for batch in batches) < 320
    assert found.stop_id == found.end_id != EOS
    alone = run_config(chats, tmp_path, data={"train": sources[1:], "valid": ()})
    assert check_corpus(alone.data, alone.model.vocab_size).stop_id == EOS


def test_conversations_that_are_too_long_are_counted_or_raise(chats, tmp_path, single_process):
    config = run_config(chats, tmp_path, data={"seq_length": 48})
    longer = int((read_index(chats / "train.idx").lengths() > 49).sum())
    (line,) = [line for line in check_corpus(config.data, config.model.vocab_size).left_out if "train" in line]
    assert 0 < longer < 50 and f"{longer} of 50 conversations are longer than data.seq_length=48" in line
    with pytest.raises(
        UserError, match=r"train: its shortest conversation has \d+ tokens.*data.seq_length=16"
    ) as caught:
        check_corpus(run_config(chats, tmp_path, data={"seq_length": 16}).data, VOCAB)
    assert "\n" not in str(caught.value)


def token_rows(dataset: Any) -> list[list[int]]:
    return [dataset[index]["tokens"].tolist() for index in range(len(dataset))]


def test_a_packing_is_cached(chats, tmp_path, single_process, monkeypatch):
    config = run_config(chats, tmp_path, data={"seq_length": 100}, model=LONG)
    arguments = (config.data, check_corpus(config.data, config.model.vocab_size), 8, config.seed, index_cache(config))
    first = token_rows(build_valid_set(*arguments))
    monkeypatch.setattr("pretrain.mixed_data.pack", None)  # would fail if it were called
    assert token_rows(build_valid_set(*arguments)) == first
    assert [path.name.partition("-packing")[2] for path in tmp_path.rglob("*-packing*")] == [".npz"], (
        "nothing half made"
    )


def test_a_pass_over_validation_conversations(chats, tmp_path, single_process):
    config = run_config(chats, tmp_path, data={"seq_length": 100}, model=LONG)
    found = check_corpus(config.data, VOCAB)
    held = valid_samples(config.data, found)
    assert held is not None and held > 1
    assert len(token_rows(build_valid_set(config.data, found, held, 1, index_cache(config)))) == held


@pytest.mark.promise(text="A damaged packing in a cache is named and computed again", expected="the same samples")
@pytest.mark.parametrize("position", [0, 100, -30])
def test_a_damaged_packing_is_computed_again(position, chats, tmp_path, single_process, capsys, record_property):
    config = run_config(chats, tmp_path, data={"seq_length": 100}, model=LONG)
    arguments = (config.data, check_corpus(config.data, config.model.vocab_size), 8, config.seed, index_cache(config))
    first = token_rows(build_valid_set(*arguments))
    path = next(tmp_path.rglob("*-packing.npz"))
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    capsys.readouterr()
    assert token_rows(build_valid_set(*arguments)) == first
    assert "packing.npz: its content is not what was written; computing it again" in capsys.readouterr().out
    record_property("seen", "the same samples")


@pytest.fixture(scope="module")
def tuned(chats, tmp_path_factory, single_process) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "sft"
    config = run_config(chats, folder, data={"seq_length": 100}, model=LONG, checkpoint={"save_every": 3})
    assert train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    return folder


@pytest.mark.slow
def test_a_tuned_run_resumes_bit_for_bit(chats, tuned, tmp_path, single_process):
    config = run_config(chats, tmp_path / "sft", data={"seq_length": 100}, model=LONG)
    shutil.copytree(tuned, tmp_path / "sft")
    shutil.rmtree(tmp_path / "sft/checkpoints/step_00000006")
    assert train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    again, whole = train_rows(tmp_path / "sft"), train_rows(tuned)
    assert [row["loss_per_loop"] for row in again] == [row["loss_per_loop"] for row in whole] and len(again) == 6
    assert all(row["tokens_per_second"] > 0 for row in again)


def test_a_checkpoint_says_how_texts_begin_in_its_data(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "git_revision", lambda: "")
    config = run_config(corpus, tmp_path)
    found = check_corpus(config.data, config.model.vocab_size)
    assert describe(config, found, Progress(horizon_samples=1)).begin_id is None
    begun = dataclasses.replace(found, tokenizer=dataclasses.replace(found.tokenizer, begin_id=BOS))
    assert describe(config, begun, Progress(horizon_samples=1)).begin_id == BOS


@pytest.mark.slow
def test_a_tuned_model_stops_at_the_chat_end_token_and_exports_its_template(chats, tuned, tmp_path):
    about = checkpoint.read_about(step_folder.locate(str(tuned)))
    chat_record = read_manifest(chats / "train").chat
    assert chat_record is not None and about.eos_ids == (chat_record.end_id,)
    convert(["export", "--checkpoint", str(tuned), "--output", str(tmp_path / "hf")])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token == chat.END
    question = [{"role": "user", "content": "1 + 1?"}]
    asked = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert asked == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_chat_needs_a_model_tuned_on_conversations(chats, tuned, tmp_path, corpus, single_process):
    output = tmp_path / "samples.jsonl"
    arguments = ["--chat", "true", "--prompt", "2 + 2?", "--max_new_tokens", "5", "--temperature", "0"]
    generate.main(["--checkpoint", str(tuned), "--output", str(output), *arguments])
    sample = json.loads(output.read_text())
    assert sample["prompt"] == "2 + 2?" and sample["settings"]["temperature"] == 0
    config = run_config(corpus, tmp_path / "plain", optim={"train_steps": 1, "warmup_steps": 0, "decay_steps": 0})
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    with pytest.raises(UserError, match=r"has no token '<\|im_start\|>'"):
        generate.main(["--checkpoint", str(tmp_path / "plain"), *arguments])
    only_plain = dataclasses.replace(config.data, train=(DataSource(prefix=str(chats / "plain")),), valid=())
    config = dataclasses.replace(config, data=only_plain, output_dir=str(tmp_path / "text"))
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    with pytest.raises(UserError, match="chat: True is not allowed; the model was not tuned on conversations"):
        generate.main(["--checkpoint", str(tmp_path / "text"), *arguments])
