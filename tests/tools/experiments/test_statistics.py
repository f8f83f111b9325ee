"""Statistics of a few seeds against formulas in numpy, other functions of scipy, and simulated experiments."""

from itertools import permutations

import numpy as np
import pytest
from scipy import integrate, stats

from looplm.failures import UserError
from tools.experiments import statistics
from tools.experiments.statistics import (
    benjamini_hochberg,
    choose_test,
    compare,
    estimate,
    hedges_g,
    holm,
    power,
    seeds_needed,
    sign_flip_p,
    t_half_width,
)

NORMAL = np.array([0.31, 0.28, 0.33, 0.29, 0.30])
SKEWED = np.array([0.01, 0.02, 0.01, 0.03, 0.02, 0.01, 0.90])
OUTLIER = np.array([*np.linspace(0.01, 0.02, 11), 5.0])


def test_the_t_interval_is_that_of_the_textbook():
    found = estimate(NORMAL)
    deviation = np.sqrt(((NORMAL - NORMAL.mean()) ** 2).sum() / 4)
    half = 2.7764451 * deviation / np.sqrt(5)  # t(0.975, 4) from a table
    assert found.t == pytest.approx((NORMAL.mean() - half, NORMAL.mean() + half), rel=1e-6)
    assert found.t == pytest.approx(stats.ttest_1samp(NORMAL, 0).confidence_interval(0.95))
    assert t_half_width(np.stack([NORMAL, SKEWED[:5]], axis=1))[0] == pytest.approx(half, rel=1e-6)


def test_the_bca_interval_agrees_with_efrons_formula_on_all_resamples():
    """Efron (1987), equations 2.3 and 6.6, over all 7^7 resamples of 7 seeds instead of a random part of them."""
    n = len(SKEWED)
    sums = np.zeros(1)
    for _ in range(n):
        sums = (sums[:, None] + SKEWED).ravel()
    mean_R = np.sort(sums / n)
    below = ((mean_R < SKEWED.mean() - 1e-12).mean() + (mean_R <= SKEWED.mean() + 1e-12).mean()) / 2
    left_out_N = np.array([np.delete(SKEWED, seed).mean() for seed in range(n)])
    influence_N = left_out_N.mean() - left_out_N
    acceleration = (influence_N**3).sum() / (6 * (influence_N**2).sum() ** 1.5)
    bias, quantile_2 = stats.norm.ppf(below), stats.norm.ppf([0.025, 0.975])
    level_2 = stats.norm.cdf(bias + (bias + quantile_2) / (1 - acceleration * (bias + quantile_2)))
    assert estimate(SKEWED).bca == pytest.approx(np.quantile(mean_R, level_2), abs=0.01)


def test_the_interval_is_the_wider_of_both_at_each_end():
    found = estimate(SKEWED)
    assert found.interval == (min(found.t.low, found.bca.low), max(found.t.high, found.bca.high))
    assert found.interval.low == found.t.low and found.interval.high == found.bca.high > found.t.high


def test_nothing_depends_on_the_order_of_the_seeds():
    other = np.full(5, 0.1)
    first, skewed = compare(NORMAL, other), estimate(SKEWED).bca
    assert estimate(SKEWED[::-1]).bca == estimate(np.roll(SKEWED, 3)).bca == skewed
    for order in list(permutations(range(5)))[::17]:
        found = compare(NORMAL[list(order)], other)
        assert found.difference.interval == pytest.approx(first.difference.interval, rel=1e-12)
        assert found.p == pytest.approx(first.p, rel=1e-9)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize(("draw", "least"), [("normal", 0.90), ("exponential", 0.85)])
def test_the_interval_covers_the_truth(n, draw, least):
    """400 simulated experiments: at 95 % the count of hits is within 380 ± 20; skewed differences reach 360."""
    rng = np.random.default_rng(n)
    mean = {"normal": 0.0, "exponential": 1.0}[draw]
    found = [estimate(difference_N) for difference_N in getattr(rng, draw)(size=(400, n))]
    covered, by_bca = (
        np.mean([interval.low <= mean <= interval.high for interval in intervals])
        for intervals in ([f.interval for f in found], [f.bca for f in found])
    )
    assert least <= covered <= 0.99
    assert by_bca < covered, "BCa alone is too narrow for few seeds, which is why it does not decide"


@pytest.mark.parametrize("n", [3, 5, 8, 12])
@pytest.mark.parametrize("draw", ["normal", "laplace"])
def test_the_chosen_test_rejects_true_hypotheses_rarely(n, draw):
    """Choosing a test by the data must not raise its false positives: at most 7 % of 1,000, nominally 5 %."""
    rng = np.random.default_rng(n)
    p_E = np.array([choose_test(getattr(rng, draw)(size=n))[2] for _ in range(1000)])
    assert (p_E < 0.05).mean() <= 0.07
    if n < statistics.FEWEST_FOR_T:
        assert p_E.min() == 0.25, "three seeds cannot show significance"


def test_the_test_and_its_reason_follow_from_the_data():
    assert choose_test(NORMAL[:4])[:2] == (
        "sign flips",
        "4 seeds cannot show whether differences are normal; p cannot fall below 0.125",
    )
    name, reason, p = choose_test(NORMAL)
    assert name == "paired t" and p == pytest.approx(stats.ttest_rel(NORMAL + 1, np.ones(5)).pvalue)
    assert reason.startswith("Shapiro-Wilk p = 0.9") and "no sign" in reason
    name, reason, p = choose_test(SKEWED)
    assert name == "sign flips" and "not normal; p cannot fall below 0.016" in reason
    name, reason, p = choose_test(OUTLIER)
    assert name == "Wilcoxon" and p == 2 / 2**12, "all 12 signs are equal"


@pytest.mark.parametrize("difference_N", [NORMAL, SKEWED, NORMAL - 0.3, np.array([1.0, -2.0, 4.0, 0.0])])
def test_sign_flips_agree_with_scipys_permutations(difference_N):
    paired = (difference_N, np.zeros_like(difference_N))
    found = stats.permutation_test(
        paired, lambda a, b, axis: (a - b).mean(axis), permutation_type="samples", n_resamples=np.inf, vectorized=True
    )
    assert sign_flip_p(difference_N) == pytest.approx(found.pvalue)


def test_hedges_correction_makes_the_effect_unbiased():
    """The mean of d_z over 5 normal seeds is above the true effect; the factor is the exact one of Hedges."""
    freedom = 4
    chi = stats.chi(freedom)
    inverse = integrate.quad(lambda x: chi.pdf(x) * np.sqrt(freedom) / x, 0, np.inf)[0]  # E[sigma / s]
    d_z = NORMAL.mean() / NORMAL.std(ddof=1)
    assert hedges_g(NORMAL) == pytest.approx(d_z / inverse)
    assert hedges_g(NORMAL) == pytest.approx(d_z * (1 - 3 / (4 * freedom - 1)), rel=0.02)
    draw_EN = np.random.default_rng(0).normal(1.0, 1.0, (20_000, 5))
    assert np.mean([hedges_g(draw_N) for draw_N in draw_EN]) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(("effect", "n"), [(1.0, 5), (-1.0, 10), (0.3, 20)])
def test_power_is_that_of_the_noncentral_t_and_of_simulated_tests(effect, n):
    critical = stats.t.ppf(0.975, n - 1)
    outside = stats.nct(n - 1, effect * np.sqrt(n))
    assert power(effect, n) == pytest.approx(outside.sf(critical) + outside.cdf(-critical), abs=1e-6)
    draw_EN = np.random.default_rng(n).normal(effect, 1.0, (4000, n))
    assert power(effect, n) == pytest.approx((stats.ttest_1samp(draw_EN, 0, axis=1).pvalue < 0.05).mean(), abs=0.03)


@pytest.mark.parametrize("effect", [0.1, 0.5, -1.0, 1.3])
def test_seeds_needed_is_the_first_number_with_enough_power(effect):
    found = seeds_needed(effect)
    assert found is not None
    assert power(effect, found) >= 0.8 > power(effect, found - 1)


def test_seeds_needed_has_ends():
    assert seeds_needed(50.0) == 5, "fewer seeds cannot reject, whatever the effect"
    assert seeds_needed(1e6) == 5
    assert seeds_needed(0.0) is None and seeds_needed(1e-3) is None


def test_corrections_agree_with_their_definitions():
    p_M = np.array([0.01, 0.04, 0.03, 0.005, 0.8])
    order, count = np.argsort(p_M), len(p_M)
    down, up = np.empty(count), np.empty(count)
    down[order] = np.minimum(1, np.maximum.accumulate(p_M[order] * (count - np.arange(count))))
    up[order] = np.minimum(1, np.minimum.accumulate((p_M[order] * count / (1 + np.arange(count)))[::-1])[::-1])
    assert holm(p_M) == pytest.approx(down)
    assert benjamini_hochberg(p_M) == pytest.approx(up)
    assert benjamini_hochberg(p_M) == pytest.approx(stats.false_discovery_control(p_M))
    assert holm(np.array([])).shape == benjamini_hochberg(np.array([])).shape == (0,)


@pytest.mark.parametrize("p", [-0.1, 1.1, np.nan])
def test_p_values_outside_0_to_1_are_refused(p):
    with pytest.raises(UserError, match=r"p_M: \[0.5, .*\] is not allowed; p values are between 0 and 1"):
        holm(np.array([0.5, p]))


@pytest.mark.parametrize("n", [3, 5, 12])
def test_identical_and_constant_differences_have_a_defined_result(n):
    a_N = np.linspace(0.1, 0.9, n)
    same, shifted = compare(a_N, a_N.copy()), compare(a_N + 0.3, a_N)
    assert same.is_constant and shifted.is_constant
    assert (same.difference.interval.low, same.difference.interval.high, same.p) == (0, 0, 1)
    assert shifted.difference.interval == pytest.approx((0.3, 0.3))
    assert shifted.p == pytest.approx(2 / 2**n), "all signs are equal"
    for found in (same, shifted):
        assert (found.effect, found.power, found.seeds_needed) == (None, None, None)


def test_rounding_makes_no_difference():
    a_N = np.array([0.1 + 0.2, 0.7, 1e-3])
    found = compare(a_N, np.array([0.3, 0.7, 1e-3]))
    assert found.is_constant and found.difference.mean == 0 and found.p == 1


def test_two_seeds_have_an_interval_but_no_effect():
    found = compare(np.array([0.5, 0.7]), np.array([0.4, 0.5]))
    assert found.difference.interval.low < 0 < found.difference.interval.high, "t(0.975, 1) is 12.7"
    assert (found.effect, found.power, found.seeds_needed, found.p) == (None, None, None, 0.5)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([0.5], [0.4], r"a_N: \[0.5\] is not allowed; give a list of at least two seeds"),
        ([], [], r"a_N: \[\] is not allowed; give a list of at least two seeds"),
        ([[0.5, 0.4]], [0.4], "a_N: .* is not allowed; give a list"),
        ([0.5, 0.4], [0.4, np.nan], r"b_N: \[0.4, nan\] is not allowed; every seed needs a finite value"),
        ([0.5, np.inf], [0.4, 0.1], "a_N: .* every seed needs a finite value"),
        ([0.5, 0.4], [0.4, 0.1, 0.2], "b_N: '3 seeds' is not allowed; give the 2 seeds of a_N"),
    ],
)
def test_bad_input_gives_a_one_line_error(a, b, message):
    with pytest.raises(UserError, match=message):
        compare(np.array(a), np.array(b))
