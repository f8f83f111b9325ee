"""Rates of contenders that were timed in turns."""

from tools.bench.timing import Rates


def test_a_ratio_compares_contenders_within_each_turn() -> None:
    """In the middle turn the machine was half as fast, and only the ratio of medians would notice."""
    rates = Rates(10, {"slow": [2.0, 4.0, 3.0], "fast": [1.0, 2.0, 2.0]})
    assert dict(rates.items()) == {"slow": 10 / 3, "fast": 5.0}
    assert rates.ratio("fast", "slow") == 2.0 and rates.ratio("slow", "fast") == 0.5
