"""The sampling law and the draw against brute force in NumPy float64; what the random numbers depend on."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.sampling.law import Law, draw, law_logits, row_keys, uniforms

law_of = jax.jit(lambda logits, *law: law_logits(logits, Law(*law)))
draw_of = jax.jit(draw)
LAST = 1 - 2.0**-24  # the largest uniform in float32


def brute_force(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """Probabilities of one row, id by id, most probable first and ties to the lowest id."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return np.eye(len(logits))[order[0]]
    if top_k:
        order = order[:top_k]
    z = np.asarray(logits, np.float64) / temperature
    weight = {i: math.exp(z[i] - z[order[0]]) for i in order}
    total, mass, kept = sum(weight.values()), 0.0, []
    for i in order:
        if mass >= top_p and kept and top_p < 1:
            break
        kept.append(i)
        mass += weight[i] / total
    p = np.zeros(len(logits))
    p[kept] = [weight[i] for i in kept]
    return p / p.sum()


LAWS = [
    (temperature, top_p, top_k)
    for temperature in (1.0, 0.6, 2.5, 0.0)
    for top_p, top_k in ((1.0, 0), (0.8, 0), (0.05, 0), (1.0, 1), (1.0, 7), (0.7, 7), (0.999, 300), (1.0, 10_000))
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_law_equals_brute_force(law: tuple[float, float, int]) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (6, 61)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many ties
    logits[2, 40:] = -np.inf  # ids that do not exist
    logits[3] *= 5  # nearly one-hot
    got = law_of(logits, *law)
    want = np.stack([brute_force(row, *law) for row in logits])
    np.testing.assert_array_equal(np.isfinite(got), want > 0)
    np.testing.assert_allclose(jax.nn.softmax(got, axis=-1), want, rtol=2e-5, atol=1e-7)


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros((1, 10), np.float32)
    assert np.flatnonzero(np.isfinite(law_of(logits, 0.0, 1.0, 0)[0])).tolist() == [0]
    assert np.flatnonzero(np.isfinite(law_of(logits, 1.0, 1.0, 3)[0])).tolist() == [0, 1, 2]
    assert np.flatnonzero(np.isfinite(law_of(logits, 1.0, 0.35, 0)[0])).tolist() == [0, 1, 2, 3]


def test_a_law_that_truncates_nothing_keeps_every_id() -> None:
    """Rounding of the cumulative mass must not cut the tail where top_p is 1."""
    logits = np.random.default_rng(1).normal(0, 4, (8, 3001)).astype(np.float32)
    np.testing.assert_array_equal(law_of(logits, 1.0, 1.0, 0), logits)


def exact_draw(logits: np.ndarray, u: float) -> tuple[int, float]:
    """Id of the inverse CDF in float64, and how far u is from the edges of that id's interval."""
    weight = np.exp(np.asarray(logits, np.float64) - logits.max())
    cdf = np.cumsum(weight) / weight.sum()
    i = int(np.searchsorted(cdf, u, side="right"))
    return i, min(cdf[i] - u, u - (cdf[i - 1] if i else -1.0))


@pytest.mark.parametrize("V", [1, 7, 61, 255, 256, 257, 1000, 5120])
def test_draw_is_the_inverse_cdf(V: int) -> None:
    rng = np.random.default_rng(V)
    logits = rng.normal(0, 2, (400, V)).astype(np.float32)
    logits[::3, rng.random(V) < 0.6] = -np.inf
    logits[:, rng.integers(V)] = 1.0
    u = rng.random(400, np.float32)
    ids, logp = draw_of(logits, u)
    exact = [exact_draw(row, float(x)) for row, x in zip(logits, u, strict=True)]
    for got, (want, margin) in zip(np.asarray(ids), exact, strict=True):
        assert got == want or margin < 1e-6
    assert np.mean([got == want for got, (want, _) in zip(np.asarray(ids), exact, strict=True)]) > 0.99
    z = logits.astype(np.float64)
    want = z[np.arange(400), np.asarray(ids)] - np.log(np.exp(z).sum(-1))
    np.testing.assert_allclose(logp, want, atol=2e-6 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("V", [7, 61, 256, 700, 5000])
@pytest.mark.parametrize("kept", [0.02, 0.5])
def test_an_id_without_weight_is_never_drawn(V: int, kept: float) -> None:
    """At u = 0, at the largest u, and at every edge of the CDF as float32 holds it, one step to either side."""
    rng = np.random.default_rng(V)
    logits, u = [], []
    for _ in range(4):
        row = np.where(rng.random(V) < kept, rng.normal(0, 3, V), -np.inf).astype(np.float32)
        row[rng.integers(V)] = 0.0
        weight = np.exp(row.astype(np.float64))
        edges = (np.cumsum(weight) / weight.sum()).astype(np.float32)
        edges = rng.choice(np.unique(edges), 128)
        u += [[0.0, LAST], *(np.nextafter(edges, np.float32(x)) for x in (0, 1)), edges]
        logits += [row] * 386
    ids, logp = draw_of(np.stack(logits), np.clip(np.concatenate(u), 0, LAST).astype(np.float32))
    assert np.isfinite(np.take_along_axis(np.stack(logits), np.asarray(ids)[:, None], 1)).all()
    assert np.isfinite(np.asarray(logp)).all()


def test_first_and_last_id_at_the_ends_of_the_unit_interval() -> None:
    logits = np.full((2, 600), -np.inf, np.float32)
    logits[:, 5], logits[:, 300], logits[:, 598] = 0.0, 1.0, -1.0
    ids, _ = draw_of(logits, np.array([0.0, LAST], np.float32))
    assert ids.tolist() == [5, 598]


@pytest.mark.parametrize("V", [50, pytest.param(5003, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "law",
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.9, 0), (1.0, 1.0, 20), (1.3, 0.95, 20), (0.7, 0.9, 0)],
    ids=str,
)
def test_100_000_draws_follow_the_law(law: tuple[float, float, int], V: int) -> None:
    n = 100_000
    logits = np.random.default_rng(3).normal(0, 1.5, V).astype(np.float32)
    p = brute_force(logits, *law)
    scaled = law_of(logits[None], *law)
    keys = keys_of(11, 0, np.arange(n // 100))

    @functools.partial(jax.jit, static_argnums=0)
    def counts(positions: int) -> Any:
        def at(position: Any) -> Any:
            ids, _ = draw(jnp.broadcast_to(scaled, (len(keys), V)), uniforms_of(keys, position))
            return jnp.bincount(ids, length=V)

        return jax.lax.map(at, jnp.arange(positions)).sum(0)

    got = np.asarray(counts(100))
    assert got.sum() == n
    assert got[p == 0].sum() == 0
    assert chi_square_tail(got[p > 0], n * p[p > 0]) > 0.001


def chi_square_tail(got: np.ndarray, expected: np.ndarray) -> float:
    """P(χ² ≥ observed) by Wilson and Hilferty: (χ²/d)^⅓ is nearly normal. Rare outcomes are pooled."""
    rare = expected < 10
    if rare.any():
        got = np.append(got[~rare], got[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    d = len(got) - 1
    chi2 = float(((got - expected) ** 2 / expected).sum())
    z = ((chi2 / d) ** (1 / 3) - (1 - 2 / (9 * d))) / math.sqrt(2 / (9 * d))
    return 0.5 * math.erfc(z / math.sqrt(2))


def keys_of(seed: int, step: int, ids: Any, samples: Any = None) -> Any:
    ids = np.asarray(ids, np.uint32)
    return row_keys(seed, step, ids, np.zeros_like(ids) if samples is None else np.asarray(samples, np.uint32))


def uniforms_of(keys: Any, position: Any) -> Any:
    return uniforms(keys, jnp.full(len(keys), position))


def number(seed: int = 0, step: int = 0, id: int = 0, sample: int = 0, position: int = 0) -> float:
    return float(uniforms_of(keys_of(seed, step, [id], [sample]), position)[0])


def test_each_coordinate_changes_the_random_number() -> None:
    base = dict(seed=3, step=5, id=7, sample=2, position=11)
    numbers = [number(**base)] + [number(**base | {name: 12}) for name in base]
    numbers += [number(**base | {"id": 2, "sample": 7}), number(**base | {"seed": 5, "step": 3})]  # exchanged
    assert len(set(numbers)) == len(numbers)
    assert number(**base) == number(**base)


def test_samples_of_a_prompt_are_independent() -> None:
    """Two samples of one prompt, drawn without saying so anywhere else, must not be copies of each other."""
    n = 2000
    keys = keys_of(0, 0, np.zeros(n), np.arange(n))
    u = np.stack([uniforms_of(keys, t) for t in range(2)])
    assert len(np.unique(u)) > 2 * n - 10  # 2²³ values: a coincidence or two
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * u.size)
    for a, b in ((u[0, :-1], u[0, 1:]), (u[0], u[1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)


def test_the_random_numbers_do_not_depend_on_the_batch() -> None:
    """Order and company of a row are not in the law; ids use all 32 bits."""
    ids, samples = np.array([4, 9, 9, 2**32 - 1], np.uint32), np.array([0, 0, 1, 3], np.uint32)
    whole = np.asarray(uniforms_of(keys_of(1, 2, ids, samples), 8))
    order = np.array([2, 0, 3, 1])
    shuffled = uniforms_of(keys_of(1, 2, ids[order], samples[order]), 8)
    np.testing.assert_array_equal(shuffled, whole[order])
    alone = [uniforms_of(keys_of(1, 2, ids[i : i + 1], samples[i : i + 1]), 8)[0] for i in range(4)]
    np.testing.assert_array_equal(alone, whole)
    assert len(set(whole.tolist())) == 4
    assert ((whole >= 0) & (whole < 1)).all()
