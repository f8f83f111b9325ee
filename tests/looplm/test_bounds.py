"""Bounds declared on config fields: one-line errors, defaults, and dataclasses from plain values."""

from dataclasses import dataclass

import pytest

from looplm.bounds import at_least, check_bounds, non_empty, positive
from looplm.cli import from_dict, to_dict
from looplm.failures import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """An example.

    Args:
        steps: required.
        rate: with an upper bound.
        decay: half open.
        count: optional.
        depths: many.
        names: not empty.
    """

    steps: int = positive()
    rate: float = positive(0.5, below=1)
    decay: float = at_least(0, 0.9, at_most=2)
    count: int | None = at_least(1, None)
    depths: tuple[int, ...] = positive(())
    names: tuple[str, ...] = non_empty(("a",), fix="name a source")

    def __post_init__(self) -> None:
        check_bounds(self, "section")


def test_values_in_bounds_pass_and_survive_a_round_trip():
    config = Config(steps=1, decay=2, count=None, depths=(1, 2))
    assert (config.rate, config.names) == (0.5, ("a",))
    assert from_dict(Config, to_dict(config), where="here") == config
    with pytest.raises(TypeError, match="steps"):
        Config()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "section.steps: 0 is not allowed; give a number above 0"),
        ({"rate": 1.0}, "section.rate: 1.0 is not allowed; give a number above 0 and below 1"),
        ({"rate": float("nan")}, "section.rate: nan is not allowed; give a number above 0 and below 1"),
        ({"decay": -1.0}, "section.decay: -1.0 is not allowed; give a number of at least 0 and at most 2"),
        ({"decay": 3.0}, "section.decay: 3.0 is not allowed; give a number of at least 0 and at most 2"),
        ({"count": 0}, "section.count: 0 is not allowed; give null or a number of at least 1"),
        ({"depths": (1, -1)}, "section.depths: -1 is not allowed; give a number above 0"),
        ({"names": ()}, "section.names: [] is not allowed; name a source"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(values, message):
    with pytest.raises(UserError) as refused:
        Config(**{"steps": 1, **values})
    assert str(refused.value) == message
