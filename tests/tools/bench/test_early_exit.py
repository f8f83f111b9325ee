"""The early-exit bench: who leaves when, by a trained gate and by drawn depths."""

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


def test_drawn_depths_are_followed_by_every_contender(single_process, capsys):
    gate = GateConfig(state_size=8)
    setting = early_exit.drawn_setting(dataclasses.replace(MODEL, num_loops=4), gate, single_process)
    drawn = sorted(depth for row in setting.depths[:3] for depth in row)
    for ways in ({}, {"runs_on": True}, {"continuous": True}):
        met = []
        early_exit._drive(setting, 3, met=met, **ways)()()
        if "continuous" in ways:  # rows go their own pace: some further, some less far
            assert 3 * NEW <= len(met) < 3 * NEW + 3 and set(met) <= set(drawn)
        else:
            assert sorted(met) == drawn
    early_exit.bench_exit(setting, repeats=1)
    shown = capsys.readouterr().out
    assert shown.count("continuous depth batching") == 2 and "batch 3, mean depth" in shown


def test_the_lowest_threshold_within_a_percent_is_taken(corpus, tmp_path, single_process, capsys):
    config = run_config(corpus, tmp_path / "run")
    train(config, check_corpus(config.data, config.model.vocab_size), single_process)
    setting = early_exit.trained_setting(str(tmp_path / "run"), single_process)
    all_texts = early_exit._validation_texts(tmp_path / "run/checkpoints/step_00000006")
    texts = [text for text in all_texts if len(text.ids) >= PROMPT + NEW]
    assert list(setting.texts) == [text.ids for text in texts]

    def loss(threshold: float) -> float:
        rule = ExitRule(max_depth=MODEL.num_loops, threshold=threshold)
        return decode_texts(setting.model, texts[:4], PROMPT, 4, "last", rule).loss

    assert loss(setting.rule.threshold) <= 1.01 * loss(1.0)
    lower = [threshold for threshold in early_exit.THRESHOLDS if threshold < setting.rule.threshold]
    assert all(loss(threshold) > 1.01 * loss(1.0) for threshold in lower)
    assert f"threshold {setting.rule.threshold}" in capsys.readouterr().out
