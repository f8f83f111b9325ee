"""The figures of a run against values worked out by hand."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from looplm.cli import from_dict
from looplm.config import RunConfig
from looplm.evaluation.record import (
    AnswersAtDepth,
    AnswersAtThreshold,
    CacheLoss,
    DepthLoss,
    Evaluation,
    LevelAnswers,
    TaskAnswers,
    ThresholdLoss,
)
from tests.support.experiments import a_row
from tests.tools.experiments.test_runs import mini
from tools.experiments.figures import depth_rise, figures_of, train_figures
from tools.experiments.rows import read_row, write_row

CURVE = ((0.1, 1.0, 2.0, 0.25), (0.5, 1.25, 1.5, 0.5), (0.9, 2.0, 1.0, 0.75))  # threshold, depth, loss, accuracy


def evaluation(levels: tuple[int, ...] = (1, 2), exits: tuple[float, ...] = (1.0, 1.5), **changes: Any) -> Evaluation:
    depths = tuple(
        AnswersAtDepth(
            depth=depth,
            loss=1.0,
            accuracy=0.5 + depth / 10,
            whole_samples=0.25,
            accuracy_by_level=(0.75,) * len(levels),
            loss_by_level=tuple(float(level) for level in levels),
            state_change=0.0,
            state_cosine=1.0,
            divergence=0.0,
            answers_changed=0.0,
        )
        for depth in (1, 2)
    )
    answers = TaskAnswers(
        trained_loops=2,
        levels=LevelAnswers(name="level", levels=levels, labels=(10,) * len(levels), expected_depth=exits),
        depths=depths,
        exits=tuple(AnswersAtThreshold(threshold=q, mean_depth=d, accuracy=a) for q, d, _, a in CURVE),
    )
    values: dict[str, Any] = {
        "trained_loops": 2,
        "tokens": 20,
        "depths": tuple(DepthLoss(depth=depth, loss=3.0 - depth, perplexity=1.0) for depth in (1, 2)),
        "exit_curve": tuple(ThresholdLoss(threshold=q, mean_depth=d, loss=loss) for q, d, loss, _ in CURVE),
        "exit_distribution": (0.25, 0.75),
        "answers": answers,
    }
    return Evaluation(**values | changes)


def run(arm: str = "1x2", **changes: Any) -> RunConfig:
    return mini(base=changes).run_config(arm)


def test_what_was_measured_is_named_by_split_depth_and_level():
    figures, curves = figures_of("test", evaluation(), run())
    assert figures == {
        "test.loss": 1.0,
        "test.loss@depth=1": 2.0,
        "test.loss@depth=2": 1.0,
        "test.accuracy": 0.7,
        "test.whole_samples": 0.25,
        "test.accuracy@depth=1": 0.6,
        "test.accuracy@depth=2": 0.7,
        "test.accuracy@level=1": 0.75,
        "test.accuracy@level=2": 0.75,
        "test.loss@level=1": 1.0,
        "test.loss@level=2": 2.0,
    }, "a gate that was not trained has no figures"
    assert not [name for name in curves if "mean depth" in name or "exit depth" in name], "nor does it send tokens out"


def test_a_trained_gate_has_its_depth_on_average_by_level_and_at_half_of_the_compute():
    figures, curves = figures_of("valid", evaluation(), run(loss={"weights": "gate"}))
    assert curves["valid.loss by mean depth"] == (2.0, 1.5, 1.0) and curves["valid.mean depths"] == (1.0, 1.25, 2.0)
    assert curves["valid.exit depth by level"] == (1.0, 1.5) and "valid.accuracy by mean depth" in curves
    assert figures["valid.exit_depth"] == pytest.approx(0.25 + 2 * 0.75)
    assert figures["valid.exit_depth@level=2"] == 1.5 and figures["valid.exit_depth_rise"] == pytest.approx(0.5)
    assert figures["valid.loss@half_depth"] == pytest.approx(1.5 - 0.5 / 3), "1.5 loops: a third of 1.25 to 2.0"
    assert figures["valid.accuracy@half_depth"] == pytest.approx(0.5 + 0.25 / 3)
    once, _ = figures_of("valid", evaluation(), run("1x1", loss={"weights": "gate"}))
    assert not [name for name in once if "exit_depth" in name], "one loop leaves nothing to decide"
    deep = tuple(ThresholdLoss(threshold=q, mean_depth=1.75 + q / 10, loss=1.0) for q in (0.1, 0.5, 0.9))
    late, _ = figures_of("valid", evaluation(exit_curve=deep), run(loss={"weights": "gate"}))
    assert "valid.loss@half_depth" not in late, "no threshold sends tokens out so early"


def test_the_rise_of_the_depth_is_the_slope_over_all_labels():
    random = np.random.default_rng(0)
    levels, labels = (1, 3, 4, 9), (5, 1, 7, 2)
    depths = tuple(random.random(4).tolist())
    expected = np.polyfit(np.repeat(levels, labels), np.repeat(depths, labels), 1)[0]
    found = LevelAnswers(name="level", levels=levels, labels=labels, expected_depth=depths)
    assert depth_rise(found) == pytest.approx(float(expected))
    kinds = LevelAnswers(name="level", levels=(101, 203, 204, 109), labels=labels, expected_depth=depths)
    assert depth_rise(kinds, steps_only=True) == pytest.approx(float(expected))
    assert depth_rise(LevelAnswers(name="level", levels=(3,), labels=(1,), expected_depth=(1.0,))) is None
    assert depth_rise(found, [True, False, True, False]) == pytest.approx((depths[2] - depths[0]) / 3)
    assert depth_rise(found, [True, False, False, False]) is None


def test_the_rise_over_solved_levels_leaves_out_those_that_no_depth_solves():
    levels, exits = (1, 2, 3, 4), (1.0, 1.5, 2.0, 1.0)  # the gate gives up on the fourth

    def figures(*accuracy: float) -> dict[str, float]:
        found = evaluation(levels, exits)
        assert found.answers is not None
        first, second = found.answers.depths
        deeper = replace(second, depth=3, accuracy_by_level=(0.0,) * 4)  # beyond training nothing is solved
        depths = first, replace(second, accuracy_by_level=accuracy), deeper
        answers = replace(found.answers, depths=depths)
        return figures_of("test", replace(found, answers=answers), run(loss={"weights": "gate"})).figures

    found = figures(1.0, 0.95, 0.9, 0.5)
    assert found["test.exit_depth_rise"] == pytest.approx(0.05)
    assert found["test.exit_depth_rise@solved"] == pytest.approx(0.5)
    assert "test.exit_depth_rise@solved" not in figures(1.0, 0.95, 0.89, 0.5), "two levels are too few"


def test_a_shared_cache_loses_accuracy_against_one_cache_per_loop():
    rows = (("per_loop", 1.0, 0.9), ("first", 1.0, 0.4), ("last", 0.5, 0.8))
    decoding = tuple(
        CacheLoss(
            kv_cache=cache,
            exit_signal="gate",
            exit_threshold=threshold,
            tokens=1,
            loss=2.0,
            perplexity=1.0,
            mean_depth=1.0,
            accuracy=accuracy,
        )
        for cache, threshold, accuracy in rows
    )
    figures, _ = figures_of("test", evaluation(decoding=decoding), run())
    assert figures["test.accuracy@cache=first"] == 0.4 and figures["test.loss@cache=last,threshold=0.5"] == 2.0
    lost = {name: value for name, value in figures.items() if "lost" in name}
    assert lost == {"test.accuracy_lost@cache=first": pytest.approx(0.5)}, "the same threshold only"


def test_capo_has_bits_and_their_logarithm():
    task = {"people": 100, "attributes": 4, "values": 8}
    config = from_dict(
        RunConfig,
        {
            "output_dir": "run",
            "model": {
                "vocab_size": 145,
                "hidden_size": 16,
                "ffn_hidden_size": 32,
                "num_layers": 1,
                "num_attention_heads": 2,
                "num_loops": 2,
                "attention": "mha",
            },
            "gate": {"kind": "linear"},
            "loss": {"weights": "last"},
            "optim": {"train_steps": 1},
            "data": {"task": {"capo": task}},
        },
        where="test",
    )
    parameters = 2 * 145 * 16 + 4 * 16**2 + 3 * 16 * 32 + 5 * 16  # embedding, head, attention, feed-forward, norms
    found = evaluation(levels=(0, 1, 2, 3, 4, 5), exits=(1.0,) * 6)
    figures, _ = figures_of("test", found, config)
    bits = 100 * (15 - 3 * 1 / math.log(2) + 4 * 3 - (2 + 3 + 4 + 5) / math.log(2))
    assert figures["test.bits"] == pytest.approx(bits)
    assert figures["test.bits_per_parameter"] == pytest.approx(bits / parameters)
    assert figures["test.log_bits_per_parameter"] == pytest.approx(math.log(bits / parameters))


def test_the_training_curve_has_fifty_points_at_most(tmp_path):
    losses = {step: None if step == 4 else 1 / step for step in range(1, 121)}  # step 4 was skipped
    rows = [{"kind": "start"}, *({"kind": "train", "step": step, "loss": loss} for step, loss in losses.items())]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures, curves = train_figures(tmp_path / "metrics.jsonl")
    assert figures == {"train.loss": 1 / 120}
    assert curves["train.steps"] == tuple(map(float, range(1, 121, 3)))
    assert math.isnan(curves["train.loss by step"][1]) and curves["train.loss by step"][2] == 1 / 7
    row = a_row(figures=figures, curves=curves)
    write_row(tmp_path / "row.json", row)
    assert math.isnan(read_row(tmp_path / "row.json").curves["train.loss by step"][1]), "the run has a record"


def test_headline_figures_are_those_of_the_trained_depth():
    found = evaluation()
    assert found.answers is not None
    depths = tuple(DepthLoss(depth=n, loss=5.0 - n, perplexity=1.0) for n in (1, 2, 3, 4))
    at = tuple(
        replace(
            found.answers.depths[0],
            depth=n,
            accuracy=0.5 + n / 10,
            whole_samples=n / 10,
            accuracy_by_level=(1.0, 0.2 * n),
        )
        for n in (1, 2, 3, 4)
    )
    answers = replace(found.answers, depths=at, attention_sink=(0.1, 0.3, 0.8, 0.9))
    answers = replace(answers, levels=replace(answers.levels, latent_steps=(2.0, 3.5)))
    figures, curves = figures_of("test", replace(found, depths=depths, answers=answers), run())
    assert curves["test.latent steps by level"] == (2.0, 3.5)
    assert figures["test.loss"] == 3.0 and figures["test.accuracy"] == 0.7 and figures["test.whole_samples"] == 0.2
    assert figures["test.accuracy@level=2"] == 0.4 and figures["test.attention_sink"] == pytest.approx(0.2)
