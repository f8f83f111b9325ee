"""The early-exit bench: exit depths by a trained gate, and given random ones."""

import dataclasses

import pytest

from looplm.config import GateConfig
from looplm.evaluation.cached import Text, decode_texts
from looplm.failures import UserError
from looplm.inference.early_exit import ExitRule
from looplm.megatron import process_groups
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import MODEL, run_config
from tools.bench import early_exit
from tools.bench.__main__ import BenchConfig, main

PROMPT, NEW = 4, 6


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"PROMPT": PROMPT, "NEW": NEW, "BATCHES": (1, 3), "LAYERS": 2, "LOSS_TEXTS": 4}.items():
        monkeypatch.setattr(early_exit, name, value)


def test_every_strategy_follows_the_given_depths(single_process, capsys):
    gate = GateConfig(state_size=8)
    workload = early_exit.random_workload(dataclasses.replace(MODEL, num_loops=4), gate, single_process)
    assert workload.depths is not None
    given = sorted(depth for row in workload.depths[:3] for depth in row)
    for strategy in ("compaction", "select-after", "continuous depth batching"):
        depths: list[float] = []
        early_exit.prepare_decoding(workload, 3, strategy, depths)()()
        if strategy == "continuous depth batching":  # rows advance independently: some further, some less far
            assert 3 * NEW <= len(depths) < 3 * NEW + 3 and set(depths) <= set(given)
        else:
            assert sorted(depths) == given
    early_exit.bench_exit(workload, repeats=1)
    shown = capsys.readouterr().out
    assert shown.count("continuous depth batching") == 2 and "batch 3, mean depth" in shown


@pytest.mark.slow
def test_the_lowest_threshold_within_a_percent_is_taken(corpus, tmp_path, single_process, capsys):
    config = run_config(corpus, tmp_path / "run")
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    (tmp_path / "run").rename(tmp_path / "moved")
    workload = early_exit.trained_workload(str(tmp_path / "moved"), single_process)
    texts = early_exit._long_texts(tmp_path / "moved/checkpoints/step_00000006")
    assert not (tmp_path / "run").exists(), "nothing is written where the run once was"
    assert len(texts) > 4 and all(len(text.ids) >= PROMPT + NEW for text in texts)
    assert list(workload.texts) == [text.ids for text in texts]

    def loss(threshold: float) -> float:
        rule = ExitRule(max_depth=MODEL.num_loops, threshold=threshold)
        return decode_texts(workload.model, texts[:4], PROMPT, 4, "last", rule).loss

    assert loss(workload.rule.threshold) <= 1.01 * loss(1.0)
    lower = [threshold for threshold in early_exit.THRESHOLDS if threshold < workload.rule.threshold]
    assert all(loss(threshold) > 1.01 * loss(1.0) for threshold in lower)
    assert f"threshold {workload.rule.threshold}" in capsys.readouterr().out
    early_exit.check_workload(str(tmp_path / "moved"))


@pytest.mark.slow
def test_documents_that_are_too_short_are_refused_before_anything_is_measured(tiny_run, monkeypatch):
    monkeypatch.setattr(early_exit, "texts_of", lambda ids_BS, *_: [Text(row[:9], [], []) for row in ids_BS.tolist()])
    monkeypatch.setattr(process_groups, "start", lambda *_: pytest.fail("measurements began before the refusal"))
    fix = "no document in its validation samples has 4 \\+ 6 tokens; give a checkpoint of longer ones"
    with pytest.raises(UserError, match=f"^checkpoint: '{tiny_run}/checkpoints/step_00000006' is not allowed; {fix}$"):
        main(["--checkpoint", str(tiny_run)])


def test_a_checkpoint_that_nothing_reads_is_refused():
    fix = "only decoding reads it; add decoding to parts, or leave it out"
    with pytest.raises(UserError, match=f"^checkpoint: 'runs/a' is not allowed; {fix}$"):
        BenchConfig(checkpoint="runs/a", parts=("training",))
