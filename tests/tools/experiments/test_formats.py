"""Numbers as text."""

import math

import numpy as np
import pytest

from tools.experiments import formats
from tools.experiments.statistics import Interval, compare


@pytest.mark.parametrize(
    ("mean", "low", "high", "text"),
    [
        (0.3123, 0.2801, 0.3441, "0.312 [0.280, 0.344]"),
        (-0.5, -1.25, 0.25, "−0.50 [−1.25, 0.25]"),
        (0.15, 0.0004, 0.3, "0.1500 [0.0004, 0.3000]"),
        (0.15, -0.0004, 0.3, "0.1500 [−0.0004, 0.3000]"),
        (1234.5, 1000.0, 1469.0, "1234 [1000, 1469]"),
        (1e-9, 0.0, 2e-9, "0.000000 [0.000000, 0.000000]"),
        (0.25, 0.25, 0.25, "0.2500 [0.2500, 0.2500]"),
    ],
)
def test_an_interval_tells_how_many_decimals_mean_something(mean, low, high, text):
    assert formats.with_interval(mean, Interval(low, high)) == text


def test_numbers_have_a_true_minus_sign_and_no_negative_zero():
    assert (formats.number(-0.25, 2), formats.number(-1e-9), formats.number(math.nan)) == (
        "−0.25",
        "0.0000",
        "not finite",
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (17, "17"), (999.4, "999.4"), (1000, "1.00 k"), (12345, "12.3 k"), (99_970, "100 k")),
        *((999_700, "1.00 M"), (2.5e18, "2.50 E"), (math.inf, "not finite")),
    ],
)
def test_counts_have_three_digits(value, text):
    assert formats.count(value) == text


def test_p_values_do_not_pretend_to_be_zero():
    assert [formats.p_value(p) for p in (0.0, 9e-5, 1.2e-4, 0.0412, 0.5, 1.0)] == [
        *("<0.0001", "<0.0001", "0.00012", "0.041", "0.50", "1.00")
    ]


def test_times_and_ratios():
    assert [formats.duration(s) for s in (0, 59, 90, 5400)] == ["0 s", "59 s", "1.5 min", "1.5 h"]
    assert [formats.ratio(a, 3.0) for a in (3.0, 0.375, 24.0)] == ["1", "0.125", "8"]


def test_what_cannot_be_estimated_is_unknown():
    a_N = np.array([0.5, 0.6, 0.7])
    same, weak = compare(a_N, a_N), compare(a_N, a_N + np.array([1e-3, -1e-3, 1e-9]))
    assert {formats.effect(same), formats.power(same), formats.seeds_needed(same)} == {"unknown"}
    assert formats.seeds_needed(weak) == ">10,000" and formats.power(weak) == "5 %"
