"""Figures of the bench and their aims."""

import pytest

from tools.bench.verdicts import Figure, print_verdicts


def test_a_figure_is_judged_from_the_right_side(capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure("speed", 1.05, 1.05),
        Figure("speed", 1.04, 1.05),
        Figure("memory", 0.35, 0.35, at_least=False),
        Figure("memory", 0.36, 0.35, at_least=False),
    ]
    assert [figure.is_met for figure in figures] == [True, False, True, False]
    print_verdicts(figures)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == ["ok", "MISSED", "ok", "MISSED"]
    assert lines[2].endswith("1.05   ≥ 1.05") and lines[5].endswith("0.36   ≤ 0.35")
    assert lines[-1] == "2 of 4 aims met"
