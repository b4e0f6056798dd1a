"""The statistics against published numbers, formulas written out, and simulation."""

import math

import numpy as np
import pytest
from scipy import integrate, special
from scipy.stats import ttest_ind, ttest_rel

from records import stats

PUBLISHED = [3.2791, 3.2778, 3.2787, 3.2784]  # record #75, whose README says n = 4, p = 0.006


def student_cdf(t: float, df: int) -> float:
    """The t distribution by integrating its density."""
    scale = special.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / special.gamma(df / 2)
    half, _ = integrate.quad(lambda x: scale * (1 + x * x / df) ** (-(df + 1) / 2), 0, abs(t))
    return 0.5 + math.copysign(half, t)


def test_p_of_a_published_record():
    assert stats.p_below(PUBLISHED, 3.28) == pytest.approx(0.005983456149, rel=1e-9)
    sample = stats.Sample.of(PUBLISHED)
    assert (sample.n, sample.mean) == (4, pytest.approx(3.2785))
    assert sample.sd == pytest.approx(0.0005477225575, rel=1e-9)


def test_p_is_the_area_below_t():
    x = np.array([1.2, 0.9, 1.4, 0.7, 1.1])
    t = (x.mean() - 1.3) / (x.std(ddof=1) / math.sqrt(5))
    assert stats.p_below(x, 1.3) == pytest.approx(student_cdf(t, 4), abs=1e-9)
    assert stats.p_below(x, 0.5) > 0.5


@pytest.mark.parametrize("values", [[3.2], [3.2, 3.2, 3.2], [3.2, float("nan"), 3.1],
                                    [3.2, float("inf"), 3.1]])
def test_there_is_no_p_without_evidence(values):
    assert math.isnan(stats.p_below(values, 3.28))


def test_the_margin_of_the_steps_track():
    assert stats.fixed_sigma_margin([3.27656, 3.27675], 3.28) == pytest.approx(0.004730544366)


def test_power_by_simulation():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.2785, 0.0015, size=(4000, 6))
    t = (draws.mean(1) - 3.28) / (draws.std(1, ddof=1) / math.sqrt(6))
    passed = np.mean([student_cdf(v, 5) < 0.01 for v in t[:1500]])
    assert stats.power(6, 3.2785, 0.0015, 3.28, 0.01) == pytest.approx(passed, abs=0.04)


def test_runs_needed_is_the_first_number_with_enough_power():
    n = stats.runs_needed(3.2785, 0.0015, 3.28, 0.01)
    assert stats.power(n, 3.2785, 0.0015, 3.28, 0.01) >= 0.8
    assert stats.power(n - 1, 3.2785, 0.0015, 3.28, 0.01) < 0.8
    assert stats.runs_needed(3.28, 0.0015, 3.28, 0.01) is None
    assert stats.runs_needed(3.27999, 0.0015, 3.28, 0.01) is None


def test_the_pooled_spread_weighs_by_degrees_of_freedom():
    assert stats.pooled_sd([(3, 1.0), (5, 2.0), (1, math.nan)]) == \
        pytest.approx(math.sqrt((2 * 1 + 4 * 4) / 6))
    assert math.isnan(stats.pooled_sd([(1, math.nan)]))


def welch(x, y):
    """Difference of means, its standard error and Welch's degrees of freedom."""
    u, v = np.var(x, ddof=1) / len(x), np.var(y, ddof=1) / len(y)
    df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    return np.mean(y) - np.mean(x), math.sqrt(u + v), df


def test_difference_is_welchs():
    x, y = [3.281, 3.279, 3.280, 3.282], [3.277, 3.2785, 3.2779]
    d, error, df = welch(x, y)
    found = stats.difference(x, y)
    assert found.value == pytest.approx(d)
    assert found.p == pytest.approx(2 * special.stdtr(df, -abs(d / error)), rel=1e-6)
    assert found.p == pytest.approx(ttest_ind(y, x, equal_var=False).pvalue, rel=1e-9)
    half = special.stdtrit(df, 0.975) * error
    assert (found.low, found.high) == (pytest.approx(d - half), pytest.approx(d + half))


def test_a_paired_difference_is_the_t_test_of_pairs():
    """Three seeds of a race whose spread over seeds hid a difference that every pair has."""
    a, b = [1.8839, 1.8940, 1.9128], [1.9180, 1.9282, 1.9519]
    found, expected = stats.paired_difference(a, b), ttest_rel(b, a)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9) and found.p < 0.01
    interval = expected.confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert stats.difference(a, b).p > 0.05
    said = stats.comparison_words({"times_ms": [9, 10, 11], "losses": a},
                                  {"times_ms": [9, 10, 11], "losses": b})
    assert "B's loss is higher" in said


def test_the_interval_of_a_ratio_covers_the_truth():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        a, b = rng.lognormal(0, 0.02, 5), 0.97 * rng.lognormal(0, 0.05, 4)
        found = stats.ratio(a, b)
        inside += found.low <= 0.97 <= found.high
    assert 0.92 <= inside / 400 <= 0.98


def test_runs_without_any_spread_are_compared_as_they_are():
    assert stats.ratio([200.0, 200.0], [300.0, 300.0]).low == pytest.approx(1.5)
    assert stats.difference([3.2, 3.2], [3.2, 3.2]).p == 1.0


def test_one_run_each_gives_a_ratio_without_an_interval():
    found = stats.ratio([100.0], [95.0])
    assert found.value == pytest.approx(0.95) and math.isnan(found.low) and math.isnan(found.p)
    assert "more runs are needed" in stats.comparison_words(
        {"times_ms": [100.0], "losses": [3.2]}, {"times_ms": [95.0], "losses": [3.2]})


@pytest.mark.parametrize("b_times, b_losses, words", [
    ([90, 91, 89], [3.21, 3.2, 3.19], ("B is faster than A by 10.0%", "no difference in loss")),
    ([110, 111, 109], [3.21, 3.2, 3.19], ("B is slower than A by 10.0%", "no difference in loss")),
    ([100, 102, 98], [3.1, 3.11, 3.09], ("no difference in time", "B's loss is lower")),
    ([100, 102, 98], [3.3, 3.31, 3.29], ("no difference in time", "B's loss is higher")),
])
def test_a_race_in_words(b_times, b_losses, words):
    a = {"times_ms": [100, 101, 99], "losses": [3.2, 3.21, 3.19]}
    said = stats.comparison_words(a, {"times_ms": b_times, "losses": b_losses})
    assert all(word in said for word in words), said


def test_a_further_run_stays_below_the_prediction_limit():
    rng = np.random.default_rng(2)
    draws = rng.normal(3.28, 0.002, size=(3000, 6))
    inside = np.mean([row[5] <= stats.prediction_limit(row[:5]) for row in draws])
    assert inside == pytest.approx(0.99, abs=0.006)
