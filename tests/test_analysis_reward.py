"""AUROC and its intervals against pairs counted one by one and SciPy; rewards of rollouts; one class is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from scipy.stats import mannwhitneyu

from opd_jax.analysis import reward
from opd_jax.analysis.estimates import auroc, auroc_draws, delong, estimate, prompt_weights, within_prompts
from opd_jax.analysis.pair import Sampling, check_pair, draw_rollouts, load_panel, token_values
from opd_jax.analysis.reward import analyse_reward, check_both_classes, separation
from opd_jax.config_files import parse_data
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool

SOURCE = parse_data(f"task:{tiny_runs.TASK}", ("chat=false", "limit=24"))
SAMPLING = Sampling(samples=4, max_response=12, fallback_number=True)
SETTINGS: dict[str, Any] = {"batch": 48, "dtype": "float32"}


def made_up(prompts: int = 30, samples: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, and which rollouts are right."""
    rng = np.random.default_rng(seed)
    right = rng.random((prompts, samples)) < rng.random((prompts, 1))
    return np.round(rng.normal(size=right.shape) + 0.8 * right, 1), right


def pairs_counted(scores: np.ndarray, right: np.ndarray) -> float:
    wins = [(a > b) + (a == b) / 2 for a, b in itertools.product(scores[right], scores[~right])]
    return float(np.mean(wins))


def test_auroc_against_pairs_and_scipy() -> None:
    scores, right = made_up()
    assert auroc(scores, right) == pytest.approx(pairs_counted(scores, right), abs=1e-12)
    u = mannwhitneyu(scores[right], scores[~right]).statistic
    assert auroc(scores, right) == pytest.approx(u / (right.sum() * (~right).sum()), abs=1e-12)
    assert np.isnan(auroc(scores, np.ones_like(right)))


def test_draws_are_the_auroc_of_resampled_prompts() -> None:
    scores, right = made_up(7, 3)
    weights = prompt_weights(7)
    draws = auroc_draws(scores, right, weights)
    assert (weights.sum(1) == 7).all()
    for i in range(0, len(weights), 97):
        drawn = np.repeat(np.arange(7), weights[i])
        assert draws[i] == pytest.approx(auroc(scores[drawn], right[drawn]), abs=1e-12, nan_ok=True)


def test_delong_against_its_definition() -> None:
    scores, right = made_up()
    positive, negative = scores[right], scores[~right]
    wins = (positive[:, None] > negative) + (positive[:, None] == negative) / 2
    error = np.sqrt(wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative))
    found = delong(scores, right)
    assert (found.value, found.error) == pytest.approx((wins.mean(), error), abs=1e-12)
    assert (found.low, found.high) == pytest.approx((wins.mean() - 1.959964 * error, wins.mean() + 1.959964 * error))


def test_oracle_and_noise() -> None:
    _, right = made_up(60)
    weights = prompt_weights(60)
    oracle = separation(right.astype(float), right, weights)
    assert oracle["auroc"]["value"] == oracle["auroc_within"]["value"] == 1
    assert separation(-right.astype(float), right, weights)["auroc"]["value"] == 0
    noise = separation(np.random.default_rng(1).normal(size=right.shape), right, weights)["auroc"]
    assert noise["low"] < 0.5 < noise["high"]
    assert noise["high"] - noise["low"] < 0.3


def test_intervals_over_prompts_cover_where_rollouts_are_clustered() -> None:
    """Score and accuracy each depend on the prompt, but not on one another: the AUROC is 0.5. Of 150 such sets the
    interval over prompts holds it in about 95 %; DeLong's, as of independent rollouts, in far fewer."""
    rng = np.random.default_rng(0)
    covered = np.zeros(2)
    for i in range(150):
        right = rng.random((40, 8)) < rng.beta(0.5, 0.5, (40, 1))
        scores = rng.normal(size=(40, 1)) + 0.5 * rng.normal(size=right.shape)
        draws = auroc_draws(scores, right, prompt_weights(40, i)[:400])
        intervals = estimate(auroc(scores, right), draws, 40), delong(scores, right)
        covered += [e.low < 0.5 < e.high for e in intervals]
    assert covered[0] / 150 > 0.90
    assert covered[1] / 150 < 0.75


def test_within_a_problem_its_difficulty_orders_nothing() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random((50, 1))
    right = rng.random((50, 4)) < difficulty
    scores = np.repeat(difficulty, 4, axis=1)
    found = separation(scores, right, prompt_weights(50))
    assert found["auroc"]["low"] > 0.6
    assert found["auroc_within"]["value"] == 0.5
    scores, right = made_up()
    both = [(s, r) for s, r in zip(scores, right, strict=True) if r.any() and not r.all()]
    wins = [pairs_counted(s, r) * r.sum() * (~r).sum() for s, r in both]
    expected = sum(wins) / sum(r.sum() * (~r).sum() for _, r in both)
    value, prompts = within_prompts(scores, right, prompt_weights(30))
    assert (value.value, prompts) == (pytest.approx(expected), len(both))


def test_means_and_histogram() -> None:
    scores, right = made_up()
    found = separation(scores, right, prompt_weights(30))
    assert found["right"]["value"] == pytest.approx(scores[right].mean())
    assert found["difference"]["value"] == pytest.approx(scores[right].mean() - scores[~right].mean())
    assert found["difference"]["low"] < 0.8 < found["difference"]["high"]
    bars = found["histogram"]
    assert (bars["right"].sum(), bars["wrong"].sum()) == (right.sum(), (~right).sum())  # the ends hold what is beyond
    assert len(bars["edges"]) == reward.BARS + 1


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"of 6 rollouts 0 are right and 6 wrong; an AUROC compares.*easier problems"):
        check_both_classes(np.zeros((3, 2), bool), Path("student"))
    with pytest.raises(InputError, match=r"of 6 rollouts 6 are right and 0 wrong.*harder problems"):
        check_both_classes(np.ones((3, 2), bool), Path("student"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def test_teachers_on_rollouts(models: Path) -> None:
    student, teacher = models / "student", models / "teacher"
    result = analyse_reward(student, [teacher, student], SOURCE, SAMPLING, **SETTINGS)
    assert result == json.loads(json.dumps(result, allow_nan=False))
    right = np.array(result["correct"], bool)
    assert right.shape == (24, 4)
    assert (result["right"], result["wrong"], result["accuracy"]) == (right.sum(), (~right).sum(), right.mean())

    pair = check_pair(student, [teacher], **SETTINGS)
    panel, _ = load_panel(pair, SOURCE, SAMPLING)
    networks = pair.load(student), pair.load(teacher)
    with AnswerPool(1, fallback_number=True) as pool:
        drawn = draw_rollouts(pair, networks[0], panel, pool, SAMPLING, "student")
    assert (drawn.correct == right).all()
    values = token_values(pair, *networks, drawn)
    means = [np.mean(row[:n]) for row, n in zip(values["logq"] - values["logp"], drawn.lengths, strict=True)]
    of_teacher, of_itself = result["teachers"]
    np.testing.assert_allclose(np.ravel(of_teacher["rewards"]), means, atol=2e-5)
    assert of_teacher["auroc"]["value"] == pytest.approx(auroc(np.round(means, 5), right.ravel()), abs=0.01)
    wrong_tokens = sum(r["tokens"] for r in of_teacher["by_depth"]["wrong"])
    assert wrong_tokens == drawn.lengths[~right.ravel()].sum()

    # a student that is its own teacher has no reward, and rounding makes none
    assert not np.any(of_itself["rewards"])
    assert of_itself["auroc"] == {"value": 0.5, "error": None, "low": None, "high": None}
    assert of_itself["auroc_gain"]["value"] == pytest.approx(0.5 - of_teacher["auroc"]["value"])

    shown = reward.section(result)
    assert shown.name == "reward"
    assert len(shown.tables) == 4
    assert [row[0] for row in shown.tables[0].rows] == ["teacher", "student", "(shorter is better)"]
    assert shown.tables[0].rows[0][1] == of_teacher["auroc"]["value"]
    assert "right" in shown.lead[0]
    assert [len(plot.draw().axes) for plot in shown.plots] == [1] * 4
