"""Tables in Markdown and LaTeX: their cells, their escapes, and an interval beside every difference."""

import math
import re

import pytest

from tests.support.experiments import ACCURACY, a_row, an_experiment, some_rows
from tools.experiments.findings import find
from tools.experiments.rows import arms_of
from tools.experiments.tables import (
    Table,
    arms_table,
    comparisons_table,
    latex,
    markdown,
    mean_of,
    sweep_problems,
    sweep_table,
)

INTERVAL = re.compile(r"^−?[\d.]+ \[−?[\d.]+, −?[\d.]+\]$")
ROWS = some_rows()
ARMS = arms_of(ROWS)
EXPERIMENT = an_experiment()


def cells(table: Table, row: int) -> dict[str, str]:
    return dict(zip(table.header, table.rows[row], strict=True))


def test_an_arm_is_a_row_with_its_size_cost_rate_and_figures():
    table = arms_table(EXPERIMENT, ARMS)
    assert [row[0] for row in table.rows] == ["once", "looped", "deep"]
    looped = cells(table, 1)
    assert looped["parameters"] == "50,432" and looped["training FLOPs a token"] == "2.40 M"
    assert (looped["tokens"], looped["seeds"], looped["learning rate"]) == ("3.07 M", "5", "0.001")
    assert looped["test.accuracy"] == mean_of(ACCURACY["looped"]) and INTERVAL.match(looped["longer.accuracy"])


def test_a_comparison_is_a_row_with_an_interval_at_every_difference():
    table = comparisons_table(find(EXPERIMENT, ARMS), ARMS)
    assert len(table.rows) == 4
    for index in range(4):
        assert INTERVAL.match(cells(table, index)["difference"]), "no difference is shown without its interval"
    first, third = cells(table, 0), cells(table, 2)
    assert first["comparison"] == "looped − once" and first["difference"] == "0.336 [0.302, 0.369]"
    assert (first["parameters ratio"], first["FLOPs ratio"], first["matched in"]) == ("1", "8", "parameters")
    assert (third["parameters ratio"], third["FLOPs ratio"], third["seeds"]) == ("0.125", "1", "4")
    assert first["test"] == "paired t" and third["test"] == "sign flips" and third["seeds needed"].isdecimal()


def test_what_was_not_compared_is_shown_as_such():
    experiment = an_experiment(figures=("test.accuracy", "missing"))
    table = comparisons_table(find(experiment, ARMS), ARMS)
    assert cells(table, 1)["difference"] == "not compared" and cells(table, 1)["p"] == ""
    only = {"once": ARMS["once"]}
    assert cells(comparisons_table(find(EXPERIMENT, only), only), 0)["parameters ratio"] == ""


def test_the_sweep_marks_the_chosen_rate():
    table = sweep_table(EXPERIMENT, ROWS, ARMS)
    assert len(table.rows) == 9 and table.header[3] == "valid.loss"
    assert [row[1] for row in table.rows if row[-1] == "chosen"] == ["0.001"] * 3
    assert table.rows[0][:4] == ("deep", "0.0003", "1", "1.0700 (one seed)")
    assert sweep_problems(ROWS, ARMS) == []


def test_an_unfair_sweep_is_told():
    final = [row for row in ROWS if row.trial == "final"]
    assert sweep_problems(final, ARMS) == ["No learning rate was swept, so the arms' rates may suit them unequally."]
    fewer = [row for row in ROWS if not (row.trial == "sweep" and row.arm == "once" and row.lr == 3e-3)]
    assert sweep_problems(fewer, ARMS) == [
        "The arms had unequal numbers of trials: once 2, looped 3, deep 3.",
        "once runs at 0.001, an end of its sweep; a better rate may lie beyond.",
    ]
    other = [row for row in ROWS if row.arm == "once" and not (row.trial == "sweep" and row.lr == 1e-3)]
    assert sweep_problems(other, arms_of(other)) == ["once runs at 0.001, which was not in its sweep."]


def test_means_that_do_not_exist_are_words():
    assert mean_of([]) == "not recorded" and mean_of([0.5]) == "0.5000 (one seed)"
    assert mean_of([0.5, math.nan, math.inf]) == "2 of 3 not finite"


def test_markdown_shows_a_text_as_it_is():
    assert markdown("a|b_c *d* <e> & `f`\n g") == "a\\|b\\_c \\*d\\* &lt;e> &amp; \\`f\\` g"
    table = Table("c", ("x|", "y"), (("1", "2"),)).markdown()
    assert table == "| x\\| | y |\n|---|---|\n| 1 | 2 |\n"


def test_latex_is_a_booktabs_table_with_everything_escaped():
    assert latex(r"50 % of a_b\c − <1 {x} ~^ #&$ ×") == (
        r"50 \% of a\_b\textbackslash{}c $-$ $<$1 \{x\} \textasciitilde{}\textasciicircum{} \#\&\$ $\times$"
    )
    lines = Table("A_1", ("arm", "p"), (("x", "<0.0001"), ("y", "−1"))).latex().splitlines()
    assert lines == [
        r"\begin{table}",
        r"\caption{A\_1}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"arm & p \\",
        r"\midrule",
        r"x & $<$0.0001 \\",
        r"y & $-$1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


@pytest.mark.parametrize("figures", [("test.accuracy",), ("test.accuracy", "longer.accuracy")])
def test_every_row_has_a_cell_for_every_column(figures):
    experiment = an_experiment(figures=figures)
    tables = (arms_table(experiment, ARMS), comparisons_table(find(experiment, ARMS), ARMS))
    for table in (*tables, sweep_table(experiment, [*ROWS, a_row(arm="new", trial="sweep")], ARMS)):
        assert {len(row) for row in table.rows} == {len(table.header)}
