"""The question of an experiment: what it refuses."""

import pytest

from looplm.cli import from_dict, to_dict
from looplm.failures import UserError
from tests.support.experiments import an_experiment
from tools.experiments.experiment import Decides, Experiment, Pair

ONE = Pair(better="looped", than="once", matched="parameters")


def test_it_is_read_from_plain_values():
    experiment = an_experiment()
    assert from_dict(Experiment, to_dict(experiment), where="test") == experiment


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": ""}, "question: '' is not allowed; name at least one"),
        ({"figures": ("longer.accuracy",)}, "decides.figure: 'test.accuracy' is not allowed; name it in figures too"),
        ({"figures": ("test.accuracy",) * 2}, "figures: 'test.accuracy' is not allowed; list it once"),
        ({"pairs": (ONE, ONE)}, "pairs: .*'looped', 'once'.* is not allowed; list it once"),
        (
            {"pairs": (Pair(better="once", than="looped", matched="parameters"),)},
            "decides: 'looped − once' is not allowed; list this pair in pairs too",
        ),
        (
            {"tuned_by": "test.accuracy"},
            "tuned_by: 'test.accuracy' is not allowed; give valid.loss or valid.loss@depth=N",
        ),
    ],
)
def test_an_experiment_that_cannot_be_decided_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        an_experiment(**values)


def test_bad_parts_are_refused():
    with pytest.raises(UserError, match=r"pairs.than: 'a' is not allowed; name another arm than pairs.better"):
        Pair(better="a", than="a", matched="flops")
    with pytest.raises(UserError, match=r"decides.margin: 0.0 is not allowed; give one above 0"):
        Decides(figure="f", better="a", than="b", claim="same")
    with pytest.raises(UserError, match=r"decides.margin: inf is not allowed"):
        Decides(figure="f", better="a", than="b", margin=float("inf"))
    values = to_dict(an_experiment())
    values["pairs"][0]["matched"] = "nothing"
    with pytest.raises(UserError, match="nothing' is not allowed; give one of parameters, flops, trained tokens"):
        from_dict(Experiment, values, where="x.yaml")
