"""Comparisons of an experiment's pairs, and the verdict."""

import math

import numpy as np
import pytest
from scipy import stats

from tests.support.experiments import ACCURACY, a_row, an_experiment, some_rows
from tools.experiments.experiment import Decides
from tools.experiments.findings import answer_of, claim_of, decide, find
from tools.experiments.rows import Row, arms_of
from tools.experiments.statistics import Interval

FIGURE = "test.accuracy"


def findings_of(rows: list[Row], **values):
    experiment = an_experiment(**values)
    found = find(experiment, arms_of(rows))
    return found, decide(experiment, found)


def two_arms(looped, once) -> list[Row]:
    rows = [a_row(arm="looped", seed=seed, figures={FIGURE: value}) for seed, value in enumerate(looped)]
    return rows + [a_row(arm="once", seed=seed, figures={FIGURE: value}) for seed, value in enumerate(once)]


def test_runs_are_paired_by_seed_in_every_figure():
    found, verdict = findings_of(some_rows()[::-1])
    assert [finding.title for finding in found] == [
        "looped − once, test.accuracy",
        "looped − once, longer.accuracy",
        "looped − deep, test.accuracy",
        "looped − deep, longer.accuracy",
    ]
    first, third = found[0].comparison, found[2].comparison
    assert first is not None and third is not None
    assert first.p == pytest.approx(stats.ttest_rel(ACCURACY["looped"], ACCURACY["once"]).pvalue)
    assert found[2].seeds == (0, 1, 2, 3) and found[2].problem == "seed 4 of looped without a partner in deep"
    assert third.difference.mean == pytest.approx(np.subtract(ACCURACY["looped"][:4], ACCURACY["deep"][:4]).mean())
    assert (
        verdict.answer == "yes" and verdict.reason == "The difference is 0.336 [0.302, 0.369] (5 seeds, 95 % interval)."
    )


def test_a_verdict_names_the_seeds_that_it_does_not_rest_on():
    rows = two_arms([0.5, 0.6, 0.7], [0.1, 0.3, 0.2])
    del rows[-1].figures[FIGURE]
    _, verdict = findings_of(rows, figures=(FIGURE,))
    expected = "Not all of it is in: seed 2 of looped without a partner in once; once has no such figure for seed 2."
    assert verdict.reason.startswith("The difference is 0.3") and verdict.reason.endswith(expected)


def test_p_values_are_adjusted_over_the_comparisons_that_could_be_made():
    found, _ = findings_of(some_rows(), figures=(FIGURE, "missing"))
    made = [finding for finding in found if finding.comparison]
    assert [finding.figure for finding in made] == [FIGURE, FIGURE]
    small, large = sorted(finding.comparison.p for finding in made if finding.comparison)
    assert [finding.p_holm for finding in made] == pytest.approx([2 * small, max(large, 2 * small)])
    assert [finding.p_bh for finding in made] == pytest.approx([min(2 * small, large), large])
    assert found[1].problem.startswith("looped has no such figure for seeds 0, 1, 2, 3, 4; once has no such figure")


def test_sweep_runs_do_not_count():
    rows = some_rows()
    extra = [a_row(arm=arm, seed=7, trial="sweep", figures={FIGURE: 0.0}) for arm in ACCURACY]
    assert findings_of(rows + extra) == findings_of(rows)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([a_row(arm="once", figures={FIGURE: 0.1})], "no final run of looped is recorded"),
        ([], "no final run of looped and once is recorded"),
        (two_arms([0.5], [0.4]), "1 shared seeds, and an interval needs two"),
        (two_arms([0.5, math.nan, 0.4], [0.4, 0.3, 0.2]), "looped is not finite for seed 1"),
        (two_arms([0.5, 0.6], [math.inf, math.nan]), "once is not finite for seeds 0, 1"),
    ],
)
def test_what_cannot_be_compared_is_undecided_and_says_why(rows, problem):
    found, verdict = findings_of(rows, figures=(FIGURE,))
    assert found[0].comparison is None and found[0].problem == problem
    assert verdict == ("undecided", f"The deciding comparison could not be made: {problem}.")


def test_equal_differences_decide_nothing():
    _, verdict = findings_of(two_arms([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), figures=(FIGURE,))
    assert verdict.answer == "undecided" and verdict.reason.startswith(
        "All 3 differences are 0.0000, so nothing is known"
    )


def test_few_seeds_are_said_to_rest_on_an_assumption():
    _, verdict = findings_of(two_arms([0.70, 0.71, 0.72], [0.3, 0.305, 0.3]), figures=(FIGURE,))
    assert verdict.answer == "yes" and "With 3 seeds the interval rests on the assumption" in verdict.reason


@pytest.mark.parametrize(
    ("claim", "margin", "interval", "answer"),
    [
        ("higher", 0.0, (0.01, 0.2), "yes"),
        ("higher", 0.0, (-0.01, 0.2), "undecided"),
        ("higher", 0.0, (0.0, 0.2), "undecided"),
        ("higher", 0.0, (-0.2, -0.1), "no"),
        ("higher", 0.05, (0.01, 0.04), "no"),
        ("higher", 0.05, (0.01, 0.06), "undecided"),
        ("lower", 0.0, (-0.2, -0.1), "yes"),
        ("lower", 0.0, (0.1, 0.2), "no"),
        ("lower", 0.15, (-0.2, -0.1), "undecided"),
        ("lower", 0.3, (-0.2, -0.1), "no"),
        ("same", 0.1, (-0.05, 0.1), "yes"),
        ("same", 0.1, (-0.15, 0.05), "undecided"),
        ("same", 0.1, (0.11, 0.2), "no"),
        ("same", 0.1, (-0.2, -0.11), "no"),
        ("same", 0.1, (-0.2, 0.2), "undecided"),
    ],
)
def test_the_whole_interval_decides(claim, margin, interval, answer):
    decides = Decides(figure="f", better="a", than="b", claim=claim, margin=margin)
    assert answer_of(decides, Interval(*interval)) == answer


@pytest.mark.parametrize(
    ("claim", "margin", "words"),
    [
        ("higher", 0.0, "a − b in f is above 0"),
        ("lower", 0.0, "a − b in f is below 0"),
        ("lower", 0.05, "a − b in f is below −0.05"),
        ("same", 0.1, "a − b in f is between −0.1 and 0.1"),
    ],
)
def test_the_claim_is_a_sentence(claim, margin, words):
    assert claim_of(Decides(figure="f", better="a", than="b", claim=claim, margin=margin)) == words
