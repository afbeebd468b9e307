"""Numbers from graded samples: avg@k, pass@k, maj@k, each a mean over problems with its uncertainty over problems.

``correct`` arrays are [problems, n] of 0/1: n graded samples of every problem. All intervals resample problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.special import ndtr, stdtrit

RESAMPLES = 2_000


@dataclass(frozen=True)
class Score:
    """A mean over problems, its standard error, and a bootstrap 95 % interval; problems are resampled."""

    mean: float
    error: float  # nan for a single problem
    low: float
    high: float
    problems: int


def summarise(values: Float[np.ndarray, " problems"], seed: int = 0) -> Score:
    """Mean of per-problem values with standard error s/√problems (s with ddof 1) and interval, see ``interval``."""
    values = np.asarray(values, np.float64)
    n = len(values)
    low, high = interval(resampled_means(values[:, None], seed)[:, 0], n)
    error = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    return Score(float(values.mean()), error, low, high, n)


def student_t(values: Sequence[float], looks: int = 1) -> dict[str, float | None]:
    """Mean x̄ over seeds with its 95 % interval x̄ ± t s/√n, t of Student's law with n − 1 degrees.

    A single value, or several that are alike but for rounding, tell nothing of chance: error and bounds are None.

    Args:
        looks: of so many intervals all hold their value with 95 % (Bonferroni: t at 0.025 / looks).
    """
    x = np.asarray(values, np.float64)
    n, mean = len(x), float(x.mean())
    if n < 2 or np.ptp(x) <= 1e-12 * np.abs(x).max():
        return {"mean": mean, "error": None, "low": None, "high": None}
    error = float(x.std(ddof=1)) / math.sqrt(n)
    half = -float(stdtrit(n - 1, 0.025 / looks)) * error
    return {"mean": mean, "error": error, "low": mean - half, "high": mean + half}


def resampled_means(values: Float[np.ndarray, "problems m"], seed: int = 0) -> Float[np.ndarray, "resamples m"]:
    """Means of m columns over problems drawn with replacement, the same problems for all columns."""
    n, columns = values.shape
    rng = np.random.default_rng(seed)
    rows = max(1, 2**20 // (n * columns))  # resamples drawn at a time, so that memory stays small for many problems
    parts = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([values[rng.integers(n, size=(part, n))].mean(axis=1) for part in parts])


def interval(draws: Float[np.ndarray, " resamples"], problems: int) -> tuple[float, float]:
    """95 % interval from bootstrap draws: percentiles Φ(∓ t √(n/(n−1))), t that of Student's law with n−1 degrees.

    The plain percentiles, 2.5 and 97.5, are too narrow by the factors √((n−1)/n) and 1.96/t for few problems.
    Source: Hesterberg 2015 (arXiv 1411.5279), expanded percentile interval.
    """
    n = max(problems, 2)
    tail = 100 * float(ndtr(stdtrit(n - 1, 0.025) * math.sqrt(n / (n - 1))))
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def avg_at_k(correct: Bool[np.ndarray, "problems n"], seed: int = 0) -> Score:
    """Mean accuracy over all n = k samples of each problem."""
    return summarise(np.asarray(correct, np.float64).mean(axis=1), seed)


def pass_at_k(correct: Bool[np.ndarray, "problems n"], k: int, seed: int = 0) -> Score:
    """Probability that at least one of k samples is right, unbiased from n ≥ k: 1 − C(n−c, k) / C(n, k), c right ones.

    Source: Chen et al. 2021 (arXiv 2107.03374), Eq. 1.
    """
    correct = np.asarray(correct)
    n = _checked(correct, k)
    by_count = np.array([1 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return summarise(by_count[correct.astype(int).sum(axis=1)], seed)


def maj_at_k(
    correct: Bool[np.ndarray, "problems n"], answers: Sequence[Sequence[str | None]], k: int, seed: int = 0
) -> Score:
    """Probability that the most frequent answer of k samples is right, exact over all C(n, k) subsets.

    Right answers form one class however they are spelled; wrong ones vote by equal text (normalise them first); None
    does not vote. Ties are broken uniformly.
    """
    correct = np.asarray(correct)
    _checked(correct, k)
    values = [_majority(row.astype(bool), texts, k) for row, texts in zip(correct, answers, strict=True)]
    return summarise(np.array(values), seed)


def gap_recovery(before: float, after: float, teacher: float) -> float:
    """(after − before) / (teacher − before) of accuracies (paper, default set-up); nan where there is no gap."""
    return (after - before) / (teacher - before) if teacher != before else math.nan


def recovery_score(
    before: Float[np.ndarray, " problems"],
    after: Float[np.ndarray, " problems"],
    teacher: Float[np.ndarray, " problems"],
    seed: int = 0,
) -> Score:
    """Gap recovery rate of three models' accuracies on the same problems, with its paired bootstrap.

    Where more than 2.5 % of the resamples have no gap (teacher ≤ before), the rate is not bounded by the data: error
    and interval are nan.
    """
    means = np.array([np.mean(x) for x in (before, after, teacher)])
    rate, n = gap_recovery(*means.tolist()), len(before)
    draws = resampled_means(np.stack([before, after, teacher], axis=1).astype(np.float64), seed)
    gap = draws[:, 2] - draws[:, 0]
    if means[2] <= means[0] or (gap <= 0).mean() > 0.025:
        return Score(rate, math.nan, math.nan, math.nan, n)
    rates = ((draws[:, 1] - draws[:, 0]) / np.where(gap > 0, gap, math.nan))[gap > 0]
    return Score(rate, float(rates.std(ddof=1)), *interval(rates, n), n)


def _majority(right: Bool[np.ndarray, " n"], texts: Sequence[str | None], k: int) -> float:
    if len(texts) != len(right):
        raise ValueError(f"{len(texts)} answers for {len(right)} samples")
    wrong = [t for t, r in zip(texts, right, strict=True) if not r]
    rivals = list(Counter(t for t in wrong if t is not None).values())
    silent, c = sum(t is None for t in wrong), int(right.sum())
    wins = 0.0
    for votes in range(1, min(c, k) + 1):
        # ways[others, ties]: how rivals can fill `others` of the k places, none above `votes`, `ties` of them level.
        ways = np.zeros((k - votes + 1, len(rivals) + 1))
        ways[0, 0] = 1
        for rival in rivals:
            ways = _add_class(ways, min(rival, votes), rival, votes)
        ways = _add_class(ways, silent, silent, None)
        shares = ways[k - votes] / np.arange(1, len(rivals) + 2)
        wins += math.comb(c, votes) * float(shares.sum())
    return wins / math.comb(len(texts), k)


def _add_class(ways: np.ndarray, most: int, size: int, level: int | None) -> np.ndarray:
    """Choose 0 … most of a class of that size, counting a tie where the choice is ``level``."""
    out = np.zeros_like(ways)
    for chosen in range(min(most, len(ways) - 1) + 1):
        shifted = math.comb(size, chosen) * ways[: len(ways) - chosen]
        if chosen == level:
            out[chosen:, 1:] += shifted[:, :-1]
        else:
            out[chosen:] += shifted
    return out


def _checked(correct: np.ndarray, k: int) -> int:
    n = correct.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of {n} samples a problem; expected 1 ≤ k ≤ {n}")
    return n
