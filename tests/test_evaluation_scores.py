"""Scores against closed forms and enumeration."""

import itertools
import math

import numpy as np
import pytest

from opd_jax.evaluation.scores import (
    avg_at_k,
    gap_recovery,
    interval,
    maj_at_k,
    pass_at_k,
    recovery_score,
    resampled_means,
    summarise,
)


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


@pytest.mark.parametrize(("problems", "a", "b"), [(30, 0.7, 0.7), (40, 0.3, 0.7), (100, 0.2, 1.5)])
def test_interval_covers_the_truth(problems, a, b):
    """1,000 sets of problems, whose chances of success are Beta(a, b), of mean a/(a + b), each answered 16 times."""
    hits = 0
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        right = rng.random((problems, 16)) < rng.beta(a, b, size=problems)[:, None]
        score = avg_at_k(right)
        hits += score.low <= a / (a + b) <= score.high
    assert 930 <= hits <= 970


def test_interval_of_few_problems_by_hand():
    """Of two problems the means of resamples are 0, 1/2, 1 (1 : 2 : 1), and Student's t with 1 degree is 12.7."""
    assert interval(np.repeat([0, 0.5, 1], [500, 1000, 500]), 2) == (0, 1)
    # 30 problems: t = 2.045, times √(30/29) = 2.080: the 1.876th percentile
    assert interval(np.linspace(0, 1, 100_001), 30) == (
        pytest.approx(0.01876, abs=1e-4),
        pytest.approx(0.98124, abs=1e-4),
    )


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


def test_resampled_means_are_of_the_same_problems():
    values = np.random.default_rng(0).random((50, 1))
    draws = resampled_means(np.concatenate([values, 1 - values], axis=1))
    np.testing.assert_allclose(draws.sum(axis=1), 1)
    assert draws[:, 0].std() == pytest.approx(values.std() / math.sqrt(50), rel=0.06)


def test_gap_recovery_is_paired():
    """Three models whose accuracies move together: the rate is known far better than each accuracy."""
    rng = np.random.default_rng(0)
    p = rng.uniform(0.1, 0.5, 200)
    score = recovery_score(p, p + 0.3, p + 0.4)
    assert (score.mean, score.problems) == (pytest.approx(0.75), 200)
    assert (score.low, score.high) == (pytest.approx(0.75), pytest.approx(0.75))
    after = p + rng.choice([0.0, 0.4], 200, p=[0.25, 0.75])
    score = recovery_score(p, after, p + 0.4)
    assert score.mean == pytest.approx(np.mean(after - p) / 0.4)
    error = np.std(after - p, ddof=1) / math.sqrt(200) / 0.4
    assert score.error == pytest.approx(error, rel=0.06)
    assert score.high - score.low == pytest.approx(2 * 1.97 * error, rel=0.08)


def test_gap_recovery_without_a_gap():
    p = np.random.default_rng(0).random(30)
    noise = np.random.default_rng(1).normal(0, 0.3, 30)
    for teacher in (p, p - 0.1, p + noise - noise.mean() + 0.03):  # the last gap is half its standard error
        score = recovery_score(p, p + 0.1, teacher)
        assert math.isnan(score.low)
        assert math.isnan(score.error)
