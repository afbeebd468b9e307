"""Mistakes found in other systems, by the numbers of the list that this project keeps; each test would catch one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses_fused import FULL, close, gradients, jit, problem

from opd_jax.losses import Objective, distillation_gradient, distillation_loss, reference_loss, token_losses

REFERENCE = Objective(name="topk_reference", k=5)


def test_1_one_global_count_of_response_tokens():
    """TRL's GKD divides the on-policy loss by the length of the dataset's completion."""
    h, w, g, u, y, mask = problem()
    wide = [jnp.pad(x, ((0, 0), (0, 5)) + ((0, 0),) * (x.ndim - 2)) for x in (h, g, y, mask)]
    means = []
    for h_, g_, y_, m in ((h, g, y, mask), wide):
        (loss, count), _ = jit(lambda *x: distillation_loss(*x, objective=FULL))(h_, w, g_, u, y_, m)
        assert count == mask.sum()
        means.append(loss / count)
    np.testing.assert_allclose(*means, rtol=1e-6)
    np.testing.assert_allclose(means[0] * mask.sum(), reference_loss(h, w, g, u, y, mask, FULL)[0], rtol=1e-5)


def test_2_micro_batches_add_up():
    """verl's loss once depended on the split: 1 × 8, 2 × 4 and 8 × 1 must agree."""
    h, w, g, u, y, mask = problem()
    run = jit(gradients(FULL, metrics=False))
    (whole, (count, _)), (dh, dw) = run(h, w, g, u, y, mask)
    for n in (1, 4):
        parts = [run(h[i : i + n], w, g[i : i + n], u, y[i : i + n], mask[i : i + n]) for i in range(0, 8, n)]
        close([sum(p[0][0] for p in parts), sum(p[0][1][0] for p in parts)], [whole, count], 1e-6)
        close([np.concatenate([p[1][0] for p in parts]), sum(p[1][1] for p in parts)], [dh, dw], 1e-6)


@pytest.mark.parametrize("closure", [dict(normalise=True), dict(tail=True)])
def test_3_teachers_top_k_has_a_gradient_where_it_is_flat(closure):
    """verl clamps an unnormalised forward KL at 0, which leaves 40-99 % of flat positions without gradient."""
    h, w, _, _, y, _ = problem()
    arrays = (0.2 * h, w, 0.1 * h, w, y, jnp.ones_like(y))  # both nearly uniform, the student less so
    partial = Objective(name="topk", k=5, support="teacher", divergence="forward", normalise=False)
    closed = Objective(name="topk", k=5, support="teacher", divergence="forward", **closure)
    run = jit(lambda *x: [gradients(o, metrics=False)(*x)[1][0] for o in (partial, closed)])
    assert (jit(lambda *x: token_losses(*x, objective=partial))(*arrays) < 0).mean() > 0.3, "never clamped"
    for dhidden in run(*arrays):
        assert jnp.all(jnp.abs(dhidden).max(-1) > 0)


def test_4_mass_does_not_leave_the_support():
    """A partial reverse KL is lowered by moving mass out of the support, even where student and teacher are equal."""
    h, w, _, _, y, mask = problem()
    mask = jnp.ones_like(mask)

    def outside(w, h):
        p = jax.nn.softmax(h @ w.T)
        return 1 - jax.lax.top_k(p, 5)[0].sum(-1).mean()

    def change(objective):
        _, (dh, dw) = gradients(objective, metrics=False)(h, w, h, w, y, mask)
        return outside(w - 1e-2 * dw, h - 1e-2 * dh) - outside(w, h)

    closures: list[dict[str, Any]] = [dict(normalise=False), dict(normalise=True), dict(tail=True)]
    partial, closed, tail = jit(lambda: [change(Objective(name="topk", k=5, **c)) for c in closures])()
    assert partial > 1e-3
    assert abs(closed) < 1e-6
    assert abs(tail) < 1e-6


def test_5_weights_differ_between_actions():
    """A detached advantage that is the same for every action has zero expected gradient (miles)."""
    h, w, g, u, y, mask = problem()
    run = jit(lambda *x: [gradients(o, metrics=False)(*x)[1][0] for o in (REFERENCE, FULL)])
    published, full = (np.asarray(x)[np.asarray(mask)] for x in run(h, w, g, u, y, mask))
    assert np.linalg.norm(published, axis=-1).min() > 1e-3
    cosine = (published * full).sum(-1) / np.linalg.norm(published, axis=-1) / np.linalg.norm(full, axis=-1)
    assert np.median(cosine) > 0.5


def test_6_vocabularies_padded_to_151936_and_152064():
    """Liger pads the narrower vocabulary with zeros: reverse KL 0.073 between identical models."""
    r = np.random.default_rng(0)
    size, narrow, wide = 151_665, 151_936, 152_064
    h = jnp.asarray(r.normal(size=(1, 2, 4)), jnp.float32)
    w = np.zeros((wide, 4), "f4")
    w[:size] = 0.1 * r.normal(size=(size, 4))
    y, mask = jnp.zeros((1, 2), int), jnp.ones((1, 2), bool)
    run = jit(lambda a, b: distillation_gradient(h, a, h, b, y, mask, FULL, vocab_size=size, tile=2))
    for a, b in ((w[:narrow], w), (w, w[:narrow])):
        (loss, _), metrics, (dh, dw) = run(a, b)
        assert abs(loss) < 1e-6
        assert abs(metrics["reverse_kl"][0]) < 1e-6
        assert max(jnp.abs(dh).max(), jnp.abs(dw).max()) < 1e-6
        exact = np.log(np.exp(np.asarray(h[0], float) @ w[:size].T.astype(float)).sum(-1))
        p = np.exp(np.asarray(h[0], float) @ w[:size].T - exact[:, None])
        np.testing.assert_allclose(metrics["student_entropy"][0], -(p * np.log(p)).sum(), rtol=1e-6)


def test_7_each_state_is_scored_on_its_own_token():
    """EasyDeL's mask is off by one: the first response token is left out, the state after the last is not."""
    h, w, g, u, y, _ = problem(batch=1)
    mask = jnp.asarray([[False, True, True, True, True, False]])  # prompt, response with end-of-sequence, padding
    losses = jit(lambda y: token_losses(h, w, g, u, y, mask, Objective(name="sampled")))
    before = losses(y)
    assert np.array_equal(np.asarray(before != 0), mask)
    for t in range(6):
        changed = np.asarray(losses(y.at[0, t].set((y[0, t] + 1) % 41)) != before)[0]
        assert np.array_equal(changed, (np.arange(6) == t) & mask[0])


def test_8_near_zero_kl_of_bfloat16_states():
    """EasyDeL forms the KL in bfloat16 and logs 0.0039 as 0.0."""
    r = np.random.default_rng(0)
    h = jnp.asarray(r.normal(size=(2, 16, 32)), jnp.bfloat16)
    w = jnp.asarray(4 * r.normal(size=(500, 32)) / np.sqrt(32), jnp.bfloat16)
    u = (w.astype("f4") + 0.016 * r.normal(size=w.shape)).astype(jnp.bfloat16)
    y, mask = jnp.zeros((2, 16), int), jnp.ones((2, 16), bool)
    (loss, count), metrics = jit(lambda *x: distillation_loss(*x, objective=FULL))(h, w.astype("f4"), h, u, y, mask)
    s, t = (np.asarray(h, float) @ np.asarray(x, float).T for x in (w, u))
    logp, logq = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (s, t))
    exact = (np.exp(logp) * (logp - logq)).sum(-1).mean()
    assert 0.001 < exact < 0.01
    np.testing.assert_allclose(loss / count, exact, rtol=1e-2)
    np.testing.assert_allclose(metrics["reverse_kl"][0] / count, exact, rtol=1e-2)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_10_beta_weighs_the_teacher(beta):
    """EasyDeL swaps the weights of the mixture: 1.27 instead of 0.17 at β = 0.1."""
    s, t = np.array([4.0, 0.0, 0.0, -3.0]), np.array([-2.0, 3.0, 0.0, 0.0])
    p, q = (np.exp(z) / np.exp(z).sum() for z in (s, t))
    kl = lambda a, b: (a * np.log(a / b)).sum()  # noqa: E731
    m = (1 - beta) * p + beta * q
    want = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))
    eye, y, mask = jnp.eye(4), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    objective = Objective(divergence="jsd", beta=beta)
    got = token_losses(jnp.float32(s[None, None]), eye, jnp.float32(t[None, None]), eye, y, mask, objective)
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-5)


def test_13_a_vocabulary_that_is_a_multiple_of_nothing():
    """tokamax's chunked cross-entropy is wrong where |V| is not a multiple of its block."""
    arrays = problem(vocab=4099)
    for objective in (FULL, Objective(name="topk", k=40)):
        got = jit(lambda *x, o=objective: distillation_loss(*x, objective=o, chunk=7, tile=5))(*arrays)[0]
        np.testing.assert_allclose(
            got, jit(lambda *x, o=objective: reference_loss(*x, objective=o))(*arrays), rtol=1e-5
        )


def test_14_head_gradient_accumulates_in_float32():
    """Accumulating the head gradient over chunks in bfloat16 biases training."""
    h, w, g, u, y, mask = problem(batch=1, steps=1)
    n = 1024
    many = (*(jnp.repeat(x, n, 1) for x in (h, g)), jnp.repeat(y, n, 1), jnp.repeat(mask, n, 1))
    run = jit(gradients(FULL, metrics=False, chunk=4, tile=4))
    bf16 = jnp.bfloat16
    one = run(h.astype(bf16), w, g.astype(bf16), u, y, mask)[1][1]
    total = run(many[0].astype(bf16), w, many[1].astype(bf16), u, *many[2:])[1][1]
    assert total.dtype == jnp.float32
    close(total, n * one, 1e-4)
    x = (many[0].astype(bf16), w.astype(bf16), many[1].astype(bf16), u, *many[2:])
    *_, (_, exact) = jit(lambda *x: distillation_gradient(*x, objective=FULL, chunk=4, tile=4))(*x)
    assert exact.dtype == jnp.float32, "also where the head itself is bfloat16"
    close(exact, n * one, 1e-4)
