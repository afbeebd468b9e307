"""Do gradients point the same way? From inner products alone, with intervals that resample problems.

The coherence of gradients g₁ … g_n is ‖Σ g‖ / Σ ‖g‖: 1 where all point the same way, 0 where they cancel. It depends
on n: orthogonal gradients have √Σ‖g‖² / Σ‖g‖, which is 1/√n for equal norms. The ratio of the two, ‖Σ g‖ / √Σ‖g‖², is 1
for orthogonal ones, above 1 where they agree, below where they cancel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from opd_jax.analysis.estimates import Estimate, estimate, ratio

Row = dict[str, Any]
BARS = 40  # of a histogram of cosines


class Draws(NamedTuple):
    """A value and its value in each resample of the problems."""

    value: float
    draws: Float[np.ndarray, " resamples"]

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.value - other.value, self.draws - other.draws)

    def over(self, other: Draws) -> Draws:
        with np.errstate(invalid="ignore", divide="ignore"):
            return Draws(float(np.float64(self.value) / np.float64(other.value)), self.draws / other.draws)

    def root(self) -> Draws:
        """√, of what resampling makes negative 0."""
        return Draws(math.sqrt(max(self.value, 0.0)), np.sqrt(np.maximum(self.draws, 0)))

    def row(self, problems: int) -> dict[str, float]:
        return estimate(self.value, self.draws, problems).row()


def bilinear(pairs: Float[np.ndarray, "N N"], weights: Int[np.ndarray, "resamples N"]) -> Draws:
    """Σ_ij pairs_ij over problems. A problem that is drawn twice is not paired with its copy, and pairs of different
    problems count N/(N − 1) times: so the mean of the draws is the value. (Copies would add up as if all of their
    gradients agreed: orthogonal ones would seem √2 times as coherent.)"""
    n = len(pairs)
    own = np.diag(pairs)
    across = np.einsum("ri,ri->r", weights @ pairs, weights) - weights**2 @ own
    return Draws(float(pairs.sum()), weights @ own + across * (n / max(n - 1, 1)))


def linear(sums: Float[np.ndarray, " N"], weights: np.ndarray) -> Draws:
    return Draws(float(sums.sum()), weights @ sums)


def by_problem(problem: Int[np.ndarray, " n"], problems: int, mask: Bool[np.ndarray, " n"]) -> np.ndarray:
    """[N, n]: which gradients belong to a problem."""
    return ((np.arange(problems)[:, None] == problem) & mask).astype(np.float64)


class Coherence(NamedTuple):
    value: Draws
    orthogonal: Draws  # what gradients of these norms have that are orthogonal
    ratio: Draws
    terms: int

    def row(self, problems: int) -> Row:
        named = {"coherence": self.value, "orthogonal": self.orthogonal, "ratio": self.ratio}
        return {name: x.row(problems) for name, x in named.items()} | {"terms": self.terms}


def coherence(
    gram: Float[np.ndarray, "n n"], problem: Int[np.ndarray, " n"], mask: Bool[np.ndarray, " n"], weights: np.ndarray
) -> Coherence | None:
    """Of the gradients in ``mask``; None where they are fewer than two, or all 0: it is undefined then."""
    squares = np.diag(gram)
    if mask.sum() < 2 or not squares[mask].any():
        return None
    of = by_problem(problem, weights.shape[1], mask)
    total = bilinear(of @ gram @ of.T, weights)
    norms, squared = linear(of @ np.sqrt(squares), weights), linear(of @ squares, weights)
    return Coherence(total.root().over(norms), squared.root().over(norms), total.over(squared).root(), int(mask.sum()))


def cosines(
    gram: Float[np.ndarray, "n n"],
    groups: dict[str, Bool[np.ndarray, "n n"]],
    problem: Int[np.ndarray, " n"],
    weights: np.ndarray,
) -> Row:
    """Mean cosine and histogram over the pairs of each group; gradients that are 0 have none."""
    norms = np.sqrt(np.diag(gram))
    held = norms > 0
    unit = np.where(held, 1 / np.where(held, norms, 1), 0)
    table, proper = gram * unit * unit[:, None], np.outer(held, held) & ~np.eye(len(gram), dtype=bool)
    of = by_problem(problem, weights.shape[1], held)
    edges = np.linspace(-1, 1, BARS + 1)
    rows: Row = {}
    for name, group in groups.items():
        group = group & proper
        if not group.any():
            continue
        sums, counts = (bilinear(of @ x @ of.T, weights) for x in (np.where(group, table, 0), group.astype(float)))
        mean = sums.over(counts).row(weights.shape[1])
        counted = np.histogram(np.clip(table[group], -1, 1), edges)[0] // 2
        rows[name] = {"mean": mean, "pairs": int(group.sum()) // 2, "histogram": counted.tolist()}
    return {"edges": edges.tolist(), "groups": rows}


def mean(values: Float[np.ndarray, " n"], of: Float[np.ndarray, "N n"], weights: np.ndarray) -> Estimate:
    """Over gradients, with problems resampled."""
    return estimate(*ratio(of @ values, of.sum(1), weights), len(of))
