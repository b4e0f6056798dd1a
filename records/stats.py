"""The statistics of records: one-sided t-test, Welch's test, ratios with intervals, power.

Computed by scipy from plain numbers; nothing here reads a log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

POWER = 0.8  # chance of passing that `runs_needed` plans for
MAX_RUNS = 200  # more than this many runs is "no": the mean is too near the target


@dataclass(frozen=True)
class Sample:
    """Mean and standard deviation (n - 1 in the denominator; NaN for one run)."""

    n: int
    mean: float
    sd: float

    @staticmethod
    def of(values: Sequence[float]) -> Sample:
        x = np.asarray(values, dtype=float)
        return Sample(len(x), float(x.mean()), float(x.std(ddof=1)) if len(x) > 1 else math.nan)


def p_below(values: Sequence[float], target: float) -> float:
    """p of the one-sided t-test that the mean is below `target`; NaN where it is undefined.

    Undefined for a single run, for a NaN among the values, and for runs that are all equal:
    a spread of zero is not evidence but a sign that the runs are not independent.
    """
    x = np.asarray(values, dtype=float)
    if len(x) < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
        return math.nan
    return float(stats.ttest_1samp(x, target, alternative="less").pvalue)


def fixed_sigma_margin(values: Sequence[float], target: float) -> float:
    """(target - mean) * sqrt(n), the evidence of the `steps` track."""
    x = np.asarray(values, dtype=float)
    return float((target - x.mean()) * math.sqrt(len(x)))


def power(n: int, mean: float, sd: float, target: float, alpha: float) -> float:
    """Chance that n runs with this true mean and spread pass the one-sided t-test at alpha."""
    shift = (target - mean) / sd * math.sqrt(n)
    return float(stats.nct.sf(stats.t.isf(alpha, n - 1), n - 1, shift))


def runs_needed(mean: float, sd: float, target: float, alpha: float) -> int | None:
    """Runs in all that would pass with a chance of 80%; None if no reasonable number does."""
    if not mean < target or not sd > 0:
        return None
    for n in range(2, MAX_RUNS + 1):
        if power(n, mean, sd, target, alpha) >= POWER:
            return n
    return None


def pooled_sd(groups: Sequence[tuple[int, float]]) -> float:
    """Spread from several groups of runs (n, sd), each around its own mean; NaN without any."""
    used = [(n, sd) for n, sd in groups if n > 1 and math.isfinite(sd)]
    weight = sum(n - 1 for n, _ in used)
    return math.sqrt(sum((n - 1) * sd**2 for n, sd in used) / weight) if weight else math.nan


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and the p of a t-test against no difference.

    Low, high and p are NaN where a side has a single value.
    """

    value: float
    low: float
    high: float
    p: float


def difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Difference of the means b - a, by Welch's test: the spreads may differ."""
    x, y = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    value = float(y.mean() - x.mean())
    if len(x) < 2 or len(y) < 2:
        return Interval(value, math.nan, math.nan, math.nan)
    u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
    error = math.sqrt(u + v)
    if error <= 1e-12 * (abs(x.mean()) + abs(y.mean())):  # no spread at all: a coarse clock
        return Interval(value, value, value, 0.0 if abs(value) > error else 1.0)
    df = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1))
    half = float(stats.t.ppf(0.5 + confidence / 2, df)) * error
    p = 2 * float(stats.t.sf(abs(value) / error, df))
    return Interval(value, value - half, value + half, p)


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of b - a, pair by pair: the effect of a seed on both sides alike is not noise."""
    x = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    n, value = len(x), float(x.mean())
    if n < 2:
        return Interval(value, math.nan, math.nan, math.nan)
    error = float(x.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * float(np.abs(a).mean() + np.abs(b).mean()):
        return Interval(value, value, value, 0.0 if abs(value) > error else 1.0)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return Interval(value, value - half, value + half,
                    2 * float(stats.t.sf(abs(value) / error, n - 1)))


def ratio(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Ratio b / a of the geometric means of positive numbers: Welch's test on the logarithms."""
    logs = difference(np.log(np.asarray(a, float)), np.log(np.asarray(b, float)), confidence)
    return Interval(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high), logs.p)


def prediction_limit(values: Sequence[float], confidence: float = 0.99) -> float:
    """A further run of the same kind stays below this with this confidence; NaN for one value."""
    sample = Sample.of(values)
    if not sample.sd > 0:
        return math.nan
    t = float(stats.t.ppf(confidence, sample.n - 1))
    return sample.mean + t * sample.sd * math.sqrt(1 + 1 / sample.n)


def comparison_words(a: dict, b: dict, alpha: float = 0.05) -> str:
    """The result of a race between a and b (`times_ms`, `losses` each), in one or two sentences.

    Run i of both sides has the same seed and data, so losses are compared pair by pair.
    """
    time, loss = ratio(a["times_ms"], b["times_ms"]), paired_difference(a["losses"], b["losses"])
    if not math.isfinite(time.low):
        return f"B took {time.value:.3f} of A's time in one run each: more runs are needed"
    span = f"B/A {time.value:.4f}, 95% interval {time.low:.4f} to {time.high:.4f}, p {time.p:.2g}"
    if time.high < 1:
        words = f"B is faster than A by {1 - time.value:.1%} of the time ({span})"
    elif time.low > 1:
        words = f"B is slower than A by {time.value - 1:.1%} of the time ({span})"
    else:
        words = f"no difference in time was found ({span})"
    if a["losses"] == b["losses"]:
        return f"{words}; the losses are equal run by run"
    span = f"B - A {loss.value:+.4f}, 95% interval {loss.low:+.4f} to {loss.high:+.4f}"
    if math.isfinite(loss.p) and loss.p < alpha:
        which = "lower" if loss.value < 0 else "higher"
        return f"{words}; B's loss is {which} ({span}, p {loss.p:.2g})"
    return f"{words}; no difference in loss was found ({span}, p {loss.p:.2g})"
