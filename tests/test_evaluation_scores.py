"""Scores against closed forms and enumeration."""

import itertools
import math

import numpy as np
import pytest

from opd_jax.evaluation.scores import avg_at_k, gap_recovery, maj_at_k, pass_at_k, summarise


def test_mean_and_standard_error_by_hand():
    score = avg_at_k(np.array([[1, 1], [1, 0], [0, 0], [0, 1]], bool))
    assert score.mean == 0.5
    assert score.error == pytest.approx(math.sqrt(((0.5) ** 2 + 0.5**2) / 3) / 2)
    assert score.problems == 4
    assert 0 <= score.low < score.mean < score.high <= 1


def test_a_single_problem_has_no_error():
    score = avg_at_k(np.ones((1, 4)))
    assert (score.mean, score.low, score.high) == (1, 1, 1)
    assert math.isnan(score.error)


def test_interval_is_seeded_and_close_to_normal_theory():
    values = np.random.default_rng(0).random(400)
    a, b = summarise(values, seed=1), summarise(values, seed=1)
    assert a == b
    assert a.low == pytest.approx(a.mean - 1.96 * a.error, abs=0.2 * a.error)
    assert a.high == pytest.approx(a.mean + 1.96 * a.error, abs=0.2 * a.error)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        p = rng.beta(0.7, 0.7, size=60)
        score = avg_at_k(rng.random((60, 16)) < p[:, None], seed)
        hits += score.low <= 0.5 <= score.high
    assert 0.90 <= hits / 200 <= 0.99


def test_pass_at_k_equals_enumeration():
    correct = np.random.default_rng(0).random((20, 7)) < 0.3
    for k in range(1, 8):
        subsets = list(itertools.combinations(range(7), k))
        expected = np.mean([[row[list(s)].any() for s in subsets] for row in correct])
        assert pass_at_k(correct, k).mean == pytest.approx(expected, abs=1e-12)
    assert pass_at_k(correct, 1).mean == pytest.approx(avg_at_k(correct).mean)


def majority_by_enumeration(correct, texts, k):
    labels = ["right" if c else t for c, t in zip(correct, texts, strict=True)]
    total = 0.0
    subsets = list(itertools.combinations(labels, k))
    for subset in subsets:
        votes = {x: subset.count(x) for x in subset if x is not None}
        winners = [x for x, n in votes.items() if n == max(votes.values())]
        total += ("right" in winners) / max(len(winners), 1)
    return total / len(subsets)


def test_maj_at_k_equals_enumeration():
    rng = np.random.default_rng(1)
    words = ["1", "1", "1", "2", "2", "3", "3", "4", None, None]
    texts = [[words[i] for i in row] for row in rng.integers(10, size=(30, 8))]
    correct = np.array([[t == "1" for t in row] for row in texts])
    for k in range(1, 9):
        expected = np.mean([majority_by_enumeration(c, t, k) for c, t in zip(correct, texts, strict=True)])
        assert maj_at_k(correct, texts, k).mean == pytest.approx(expected, abs=1e-12)


def test_majority_by_hand():
    half = maj_at_k(np.array([[1, 0]]), [["1/2", "3"]], 2)
    assert half.mean == 0.5
    united = maj_at_k(np.array([[1, 1, 0, 0, 0]]), [["1/2", "0.5", "3", "4", None]], 5)
    assert united.mean == 1
    silent = maj_at_k(np.zeros((1, 2)), [[None, None]], 2)
    assert silent.mean == 0


def test_k_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="k=3 of 2 samples"):
        pass_at_k(np.ones((1, 2)), 3)


def test_gap_recovery():
    assert gap_recovery(0.2, 0.8, 0.95) == pytest.approx(0.8)
    assert math.isnan(gap_recovery(0.5, 0.6, 0.5))
