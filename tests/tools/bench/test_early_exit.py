"""The early-exit bench: exit depths by a trained gate, and given random ones."""

import dataclasses

import pytest

from looplm.config import GateConfig
from looplm.evaluation.cached import decode_texts
from looplm.inference.early_exit import ExitRule
from pretrain.data import check_corpus
from pretrain.train import train
from tests.support.tiny import MODEL, run_config
from tools.bench import early_exit

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
    all_texts = early_exit._validation_texts(tmp_path / "moved/checkpoints/step_00000006")
    assert not (tmp_path / "run").exists(), "nothing is written where the run once was"
    texts = [text for text in all_texts if len(text.ids) >= PROMPT + NEW]
    assert list(workload.texts) == [text.ids for text in texts]

    def loss(threshold: float) -> float:
        rule = ExitRule(max_depth=MODEL.num_loops, threshold=threshold)
        return decode_texts(workload.model, texts[:4], PROMPT, 4, "last", rule).loss

    assert loss(workload.rule.threshold) <= 1.01 * loss(1.0)
    lower = [threshold for threshold in early_exit.THRESHOLDS if threshold < workload.rule.threshold]
    assert all(loss(threshold) > 1.01 * loss(1.0) for threshold in lower)
    assert f"threshold {workload.rule.threshold}" in capsys.readouterr().out
