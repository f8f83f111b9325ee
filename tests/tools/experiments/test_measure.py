"""Evaluations after a run: those that cannot be made are refused before the first run trains."""

from pathlib import Path
from typing import Any

import pytest

from looplm.failures import UserError
from tests.tools.experiments.test_runs import mini
from tools.experiments.measure import evaluations
from tools.experiments.runs import Unit, config_of

TEXT = {"task": None, "train": [{"prefix": "a"}], "valid": [{"prefix": "b"}]}
TEXT_MEASURE = {"refit_steps": 0, "tests": {"other": {"valid": "c"}}}


def on_text(**changes: Any) -> dict[str, Any]:
    """Return changes that make the experiment one on text."""
    measure = TEXT_MEASURE | changes.pop("measure", {})
    measure["tests"] = {"longer": {"seq_length": 12, "valid": "c"}} | measure["tests"]
    data = {**TEXT, **changes.pop("data", {})}
    return {"base": {"data": data}, "measure": measure, "decides": {"figure": "other.loss"}, "figures": ["other.loss"]}


def test_a_trial_is_measured_on_validation_data_alone_and_a_final_run_on_all_splits():
    config = mini(measure={"votes": [1], "kv_caches": ["last"], "prompt_tokens": 2})
    trial = evaluations(config.measure, config_of(config, Unit("sweep", "1x2", 1000, 1e-3), Path("f")), "sweep")
    assert [(name, found.depths, found.split) for name, found in trial.items()] == [("valid", "1,2", "valid")]
    final = evaluations(config.measure, config_of(config, Unit("final", "1x2", 1, 1e-3), Path("f")), "final")
    assert {name: (found.depths, found.split, found.seq_length) for name, found in final.items()} == {
        "valid": ("1,2", "valid", None),
        "test": ("1,2,3,4", "test", None),
        "longer": ("1,2,3,4", "test", 12),
    }
    asked = {name: (found.refit_steps, found.votes, found.kv_caches) for name, found in final.items()}
    assert asked["test"] == (1, "1", "last") and asked["valid"] == asked["longer"] == (0, "", "")
    assert {found.checkpoint for found in final.values()} == {"f/run"} and final["test"].prompt_tokens == 2


def test_text_has_no_test_but_those_that_are_named():
    config = mini(**on_text())
    found = evaluations(config.measure, config_of(config, Unit("final", "1x2", 1, 1e-3), Path("f")), "final")
    assert {name: (split.valid, split.split) for name, split in found.items()} == {
        "valid": (None, "valid"),
        "longer": ("c", "valid"),
        "other": ("c", "valid"),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"measure": {"tests": {"longer": {"seq_lenght": 33}}}},
            r"seq_lenght: unknown key; did you mean .*seq_length\?",
        ),
        ({"measure": {"tests": {"longer": {"seq_length": 5000}}}}, r"arms.1x1: data.seq_length: 5000 is not allowed"),
        (
            {"measure": {"tests": {"longer": {"valid": "x"}}}},
            r"tests.longer.valid: 'x' is not allowed; the run reads a",
        ),
        ({"measure": {"tests": {"a/b": {}}}}, r"measure.tests: 'a/b' is not allowed; give a name without"),
        ({"measure": {"tests": {"train": {}}}}, r"measure.tests: 'train' is not allowed; it is measured anyway"),
        ({"measure": {"kv_caches": ["lst"]}}, r"kv_caches: 'lst' is not allowed; give some of per_loop"),
        ({"measure": {"kv_caches": ["last"], "prompt_tokens": 8}}, r"prompt_tokens: 8 is not allowed; samples have 8"),
        ({"measure": {"samples": 24}}, r"samples: 24 is not allowed; each forward pass reads batch_size=16"),
        (
            {"measure": {"votes": [3]}, "base": {"data": {"task": {"p_hop": {"hops": [1, 2], "alphabet": 3}}}}},
            r"votes: '3' is not allowed; samples of this task have their labels at different positions",
        ),
        (on_text(measure={"votes": [1]}), r"measure.votes: \(1,\) is not allowed; only a task has a test of its own"),
        (on_text(data={"valid": []}), r"data.valid: \[\] is not allowed; an experiment is measured on one source"),
        (on_text(measure={"tests": {"other": {"task": {"p_hop": {}}}}}), r"tests.other.task: .*the run reads text"),
        (
            on_text(measure={"tests": {"other": {"seq_length": 9}}}),
            r"other.valid: None is not allowed; text is tested",
        ),
        (on_text(measure={"tests": {"other": {"valid": "b"}}}), r"tests.other.valid: 'b' is not allowed; the sweep"),
    ],
)
def test_what_could_not_be_measured_is_refused_before_anything_runs(changes, message):
    with pytest.raises(UserError, match=message):
        mini(**changes)
