"""Figures of the bench, each with the aim that it is judged by."""

from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """A measured ratio.

    Args:
        name: what is compared with what.
        value: the ratio.
        aim: the least allowed value, or the largest.
        at_least: True if ``aim`` is the least allowed value.
    """

    name: str
    value: float
    aim: float
    at_least: bool = True

    @property
    def is_met(self) -> bool:
        """True if the value reaches the aim."""
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"  {'ok' if self.is_met else 'MISSED':<8}{self.name:<72}{self.value:>7.2f}   {sign} {self.aim:.2f}"


def print_verdicts(figures: Sequence[Figure]) -> None:
    """Print every figure, and how many aims are met."""
    print(f"\n{'verdicts':<80}{'figure':>9}   aim")
    for figure in figures:
        print(figure)
    print(f"{sum(figure.is_met for figure in figures)} of {len(figures)} aims met")
