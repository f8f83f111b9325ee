"""The runs of an experiment: which there are, at which rates, and that unfair comparisons are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from looplm.cli import from_dict
from looplm.config import ParallelConfig
from looplm.failures import UserError
from tools.experiments.rows import Row
from tools.experiments.runs import (
    ExperimentConfig,
    Size,
    Unit,
    best_rate,
    config_of,
    final_units,
    merged,
    settings_of,
    sweep_units,
)

MINI = """
question: Does it run?
decides: {figure: test.accuracy, better: 1x2, than: 1x1}
pairs: [{better: 1x2, than: 1x1, matched: parameters}]
figures: [test.accuracy]
tuned_by: valid.loss
seeds: [1, 2]
sweep: {rates: [0.001, 0.002], seeds: [1000, 1001], steps: 4}
base:
  model: {vocab_size: 7, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, attention: mha}
  gate: {kind: linear}
  loss: {weights: last}
  optim: {train_steps: 6, lr: 0.001, min_lr: 0.0001, schedule: cosine, warmup_steps: 2, precision: fp32}
  data: {task: {word_problem: {group: S3}}, seq_length: 8, micro_batch_size: 8, global_batch_size: 8}
  logging: {tensorboard: false}
arms:
  1x1: {model: {num_layers: 1, num_loops: 1}}
  1x2: {model: {num_layers: 1, num_loops: 2}}
measure: {samples: 16, batch_size: 16, refit_steps: 1, tests: {longer: {seq_length: 12}}}
"""


PAIR = {"better": "1x2", "than": "1x1", "matched": "parameters"}


def mini(**changes: Any) -> ExperimentConfig:
    return from_dict(ExperimentConfig, merged(yaml.safe_load(MINI), changes), where="mini")


def with_retired_arm() -> ExperimentConfig:
    """Return the experiment with an arm whose key does not exist."""
    pairs = [PAIR, {"better": "gone", "than": "1x1", "matched": "flops"}]
    return mini(pairs=pairs, arms={"gone": {"model": {"gone": 1}}}, retired={"revision": "0123abc", "arms": ["gone"]})


def row(unit: Unit, loss: float) -> Row:
    return Row(
        arm=unit.arm,
        seed=unit.seed,
        trial=unit.trial,
        lr=unit.lr,
        parameters=1,
        flops_per_token=1.0,
        steps=1,
        tokens=1,
        seconds=1.0,
        machine="m",
        commit="c",
        figures={"valid.loss": loss},
        settings="s",
    )


def test_a_trial_has_the_same_share_of_decay_and_is_checked_before_anything_runs():
    optim = {"schedule": "wsd", "train_steps": 40, "warmup_steps": 2, "decay_steps": 9}
    config = mini(base={"optim": optim})
    assert config_of(config, sweep_units(config)[0], Path("x")).optim.decay_steps == 1  # of 4 steps
    assert config_of(config, Unit("final", "1x2", 1, 0.001), Path("x")).optim.decay_steps == 9
    with pytest.raises(UserError, match=r"arms\.1x2: optim\.warmup_steps: 5 .*train_steps=4"):
        mini(arms={"1x2": {"optim": {"warmup_steps": 5}}})


def test_every_arm_gets_the_same_trials_and_then_its_best_rate():
    config = mini()
    trials = sweep_units(config)
    assert len(trials) == 8 and {(unit.arm, unit.lr, unit.seed) for unit in trials} == {
        (arm, lr, seed) for arm in ("1x1", "1x2") for lr in (0.001, 0.002) for seed in (1000, 1001)
    }
    assert list(final_units(config, [])) == []
    losses = {
        ("1x1", 0.001): (1.0, 1.2),
        ("1x1", 0.002): (0.5, 1.9),
        ("1x2", 0.001): (2.0, 2.0),
        ("1x2", 0.002): (1, 1),
    }
    rows = [row(unit, losses[unit.arm, unit.lr][unit.seed - 1000]) for unit in trials]
    assert best_rate(config, "1x1", rows) == 0.001, "the mean over the sweep's seeds, not the best seed"
    assert best_rate(config, "1x2", rows) == 0.002
    assert best_rate(config, "1x2", rows[:-1]) is None, "a trial is missing"
    finals = list(final_units(config, rows))
    assert [(unit.arm, unit.seed, unit.lr) for unit in finals] == [
        ("1x1", 1, 0.001),
        ("1x2", 1, 0.002),
        ("1x1", 2, 0.001),
        ("1x2", 2, 0.002),
    ]
    assert not finals[0].is_of(row(Unit("final", "1x1", 1, 0.002), 1.0)), "another rate than the best"


def test_a_rate_that_diverged_is_not_chosen():
    config = mini()
    trials = sweep_units(config)
    lost = [replace(row(unit, 1.0), figures={}, diverged=unit.lr == 0.001) for unit in trials]
    whole = [replace(found, figures={} if found.diverged else {"valid.loss": 9.0}) for found in lost]
    assert best_rate(config, "1x1", whole) == 0.002, "min() would keep a NaN that comes first"


def test_settings_are_the_keys_that_are_given():
    assert settings_of(mini(), "1x1") == settings_of(mini(measure={"votes": []}), "1x1")
    others = [mini(base={"optim": {"train_steps": 7}}), mini(measure={"samples": 32}), mini(sweep={"steps": 3})]
    found = {settings_of(config, arm) for config in (mini(), *others) for arm in ("1x1", "1x2")}
    assert len(found) == 8


def test_a_runs_flops_are_those_of_the_loops_that_its_steps_run():
    run = config_of(mini(), Unit("final", "1x2", 2, 0.002), Path("f"))  # six steps
    whole, onset = Size.of(run), Size.of(replace(run, loss=replace(run.loss, loop_onset=0.5)))
    once = Size.of(replace(run, model=replace(run.model, num_loops=1)))
    assert onset.flops == pytest.approx((whole.flops + once.flops) / 2) and onset.flops < whole.flops
    assert onset.flops_per_token == pytest.approx(onset.flops / onset.trained_tokens)


def test_a_run_whose_batch_grows_trains_on_fewer_tokens():
    rampup = {"start": 2, "increment": 2, "samples": 8}
    run = mini(base={"data": {"micro_batch_size": 2, "global_batch_size": 4, "rampup": rampup}}).run_config("1x2")
    size, constant = Size.of(run), Size.of(replace(run, data=replace(run.data, rampup=None)))
    assert (size.trained_tokens, constant.trained_tokens) == (
        run.data.seq_length * (2 + 2 + 2 + 2 + 4 + 4),
        run.data.seq_length * 6 * 4,
    )
    assert size.flops / size.trained_tokens == pytest.approx(constant.flops / constant.trained_tokens)
    assert Size.of(replace(run, parallel=ParallelConfig(context=2))) == size, "whatever its layout"


def test_a_runs_config_is_the_arms_with_its_rate_and_seed():
    run = config_of(mini(), Unit("sweep", "1x2", 1000, 0.002), Path("f"))
    assert (run.model.num_loops, run.seed, run.optim.lr, run.optim.train_steps) == (2, 1000, 0.002, 4)
    assert run.optim.min_lr == pytest.approx(0.0002) and run.output_dir == "f/run"
    assert config_of(mini(), Unit("final", "1x2", 2, 0.002), Path("f")).optim.train_steps == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"1x1": {"model": {"num_layers": 2}}}}, "1x2 and 1x1 are not matched in parameters: 2,"),
        ({"pairs": [{"better": "1x2", "than": "1x1", "matched": "flops"}]}, "not matched in flops"),
        ({"pairs": [PAIR, {"better": "1x2", "than": "2x2", "matched": "flops"}]}, "pairs.than: '2x2' is not allowed"),
        ({"figures": ["test.accuracy", "valid.loss"]}, r"figures: \['valid.loss'\] is not allowed; name held-out data"),
        ({"curves": ["valid.loss by depth"]}, r"curves: \['valid.loss by depth'\] is not allowed; name held-out data"),
        ({"arms": {"_1x1": {}}}, "arms: '_1x1' is not allowed; legends leave out names that begin with _"),
        ({"seeds": [1, 1000]}, r"sweep.seeds: 1000 is not allowed; rates tuned on a seed would favor it"),
        ({"measure": {"tests": {"valid": {}}}}, r"measure.tests: 'valid' is not allowed"),
        ({"seeds": [1, 1]}, r"seeds: 1 is not allowed; give each once"),
        ({"seeds": [1, -1]}, r"seeds: -1 is not allowed"),
        ({"sweep": {"rates": [1e-3, 0.0]}}, r"sweep.rates: 0.0 is not allowed"),
        ({"sweep": {"rates": [1e-3, 1e-3]}}, r"sweep.rates: 0.001 is not allowed; give each once"),
        ({"sweep": {"rates": []}}, r"sweep.rates: \[\] is not allowed; give at least one"),
        ({"arms": {"mla/mha": {}}}, r"arms: 'mla/mha' is not allowed; give a name that a folder can have"),
        ({"tuned_by": "valid.accuracy"}, r"tuned_by: 'valid.accuracy' is not allowed; give valid.loss"),
        ({"tuned_by": "valid.loss@depth=2"}, r"tuned_by: 'valid.loss@depth=2' is not allowed; arm 1x1 has 1 loops"),
        ({"retired": {"revision": "0123abc", "arms": ["1x3"]}}, "retired.arms: '1x3' is not allowed; give one of 1x1"),
        ({"arms": {"1x1": {"model": {"num_loop": 1}}}}, "arms.1x1: model.num_loop: unknown key; did you mean"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        mini(**changes)


def test_retired_arms_are_compared_and_not_run():
    config = with_retired_arm()
    trials = [row(unit, 1.0) for unit in sweep_units(config)]
    units = [*sweep_units(config), *final_units(config, trials)]
    assert {unit.arm for unit in units} == set(config.sizes) == set(config.live_arms) == {"1x1", "1x2"}
    assert config.retired is not None and str(config.retired) == (
        "gone: retired; revision 0123abc is the last that runs them"
    )
    with pytest.raises(UserError, match=r"arms\.gone: model\.gone: unknown key"):
        replace(config, retired=None)


def test_every_experiment_of_the_repository_can_be_planned():
    files = [path for pattern in ("*.yaml", "text/*.yaml") for path in Path("configs/experiments").glob(pattern)]
    assert len(files) > 20
    for path in files:
        config = from_dict(ExperimentConfig, yaml.safe_load(path.read_text()), where=str(path))
        assert len(config.sizes) == len(config.live_arms) and config.question.endswith("?"), path
