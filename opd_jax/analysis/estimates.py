"""Values with their uncertainty from rollouts of several prompts: prompts are resampled, with all that belongs to them.

Rollouts of one prompt share its difficulty. What takes them for independent, as DeLong's interval of an AUROC does, is
too sure of itself.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import ndtri
from scipy.stats import rankdata

from opd_jax.evaluation.scores import RESAMPLES, interval
from opd_jax.tracking.labels import format_value

_AT_ONCE = 2**22  # weights of rollouts in memory


class Estimate(NamedTuple):
    """A value, its standard error and 95 % interval; nan where the data do not bound it."""

    value: float
    error: float
    low: float
    high: float

    def row(self) -> dict[str, float]:
        return {name: float(x) for name, x in self._asdict().items()}


UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan)


def prompt_weights(prompts: int, seed: int = 0) -> Int[np.ndarray, "resamples prompts"]:
    """How often each prompt stands in each resample; the same numbers for everything that is to be compared."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)


def estimate(value: float, draws: Float[np.ndarray, " resamples"], prompts: int) -> Estimate:
    """A value with its bootstrap. Draws that are nan have no value: beyond 2.5 % of them, or where all draws are the
    same (as those of an AUROC of 1), or with a single prompt, the data give no bounds."""
    held = draws[np.isfinite(draws)]
    if prompts < 2 or len(held) < 0.975 * len(draws) or np.ptp(held) == 0:
        return Estimate(value, math.nan, math.nan, math.nan)
    return Estimate(value, float(held.std(ddof=1)), *interval(held, prompts))


def ratio(
    sums: Float[np.ndarray, " prompts"], counts: Float[np.ndarray, " prompts"], weights: np.ndarray
) -> tuple[float, Float[np.ndarray, " resamples"]]:
    """Σ sums / Σ counts, and its draws; nan where nothing is counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.float64(sums.sum()) / np.float64(counts.sum())
        return float(value), (weights @ sums) / (weights @ counts)


def auroc(scores: Float[np.ndarray, "..."], right: Bool[np.ndarray, "..."]) -> float:
    """Probability that a right one has the higher score than a wrong one, ties counted half; nan without one of each.

    From midranks (Mann and Whitney): (Σ ranks of the right − m(m+1)/2) / (m n).
    """
    ranks, right = rankdata(scores), np.ravel(right)
    m, n = int(right.sum()), int((~right).sum())
    return float((ranks[right].sum() - m * (m + 1) / 2) / (m * n)) if m * n else math.nan


def auroc_draws(
    scores: Float[np.ndarray, "prompts n"], right: Bool[np.ndarray, "prompts n"], weights: np.ndarray
) -> Float[np.ndarray, " resamples"]:
    """The AUROC of each resample of prompts: Σ over pairs (right i, wrong j) of w_i w_j [s_i > s_j], ties half."""
    levels, level = np.unique(np.ravel(scores), return_inverse=True)
    order = np.argsort(level, kind="stable")
    starts = np.searchsorted(level[order], np.arange(len(levels)))
    is_right, prompt = np.ravel(right)[order], np.repeat(np.arange(len(scores)), scores.shape[1])[order]
    out, step = [], max(1, _AT_ONCE // len(order))
    for start in range(0, len(weights), step):
        drawn = weights[start : start + step, prompt].astype(np.float64)
        of_right, of_wrong = (np.add.reduceat(drawn * kind, starts, axis=1) for kind in (is_right, ~is_right))
        below = np.cumsum(of_wrong, axis=1) - of_wrong / 2
        pairs = of_right.sum(1) * of_wrong.sum(1)
        wins = (of_right * below).sum(1)
        out.append(np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan))
    return np.concatenate(out)


def delong(scores: Float[np.ndarray, "..."], right: Bool[np.ndarray, "..."]) -> Estimate:
    """AUROC with the interval of DeLong, DeLong and Clarke-Pearson 1988, which takes rollouts for independent.

    s² = var(V₁)/m + var(V₀)/n, V₁(i) the share of wrong ones below right one i, V₀(j) of right ones above wrong one j.
    """
    scores, right = np.ravel(scores), np.ravel(right)
    positive, negative = scores[right], scores[~right]
    m, n = len(positive), len(negative)
    value = auroc(scores, right)
    if min(m, n) < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    ranks = rankdata(np.concatenate([positive, negative]))
    above = (ranks[:m] - rankdata(positive)) / n
    below = 1 - (ranks[m:] - rankdata(negative)) / m
    error = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    if error == 0:
        return Estimate(value, math.nan, math.nan, math.nan)
    half = float(ndtri(0.975)) * error
    return Estimate(value, error, max(value - half, 0.0), min(value + half, 1.0))


def within_prompts(
    scores: Float[np.ndarray, "prompts n"], right: Bool[np.ndarray, "prompts n"], weights: np.ndarray
) -> tuple[Estimate, int]:
    """AUROC over pairs of one prompt alone, which its difficulty cannot order, and the prompts that have such pairs."""
    pairs = (right.sum(1) * (~right).sum(1)).astype(np.float64)
    wins = np.array([auroc(s, r) if n else 0.0 for s, r, n in zip(scores, right, pairs, strict=True)]) * pairs
    value, draws = ratio(wins, pairs, weights)
    return estimate(value, draws, int((pairs > 0).sum())), int((pairs > 0).sum())


def cells(held: dict[str, Any] | None) -> list[Any]:
    """Two cells of a table: the value and its interval."""
    return [None, None] if held is None else [held["value"], span(held)]


def span(held: dict[str, Any]) -> str | None:
    """The interval as text; None where there is none."""
    low, high = held["low"], held["high"]
    if low is None or high is None or not math.isfinite(low + high):
        return None
    return f"{low:.3f} … {high:.3f}"


def told(held: dict[str, Any]) -> str:
    """As in "0.730 (95 % interval 0.661 … 0.788)"."""
    bounds = span(held)
    return format_value(held["value"]) + (f" (95 % interval {bounds})" if bounds else " (no interval)")
