"""``custom_loss`` against the dense reference, in float64, value and gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.config import Objective
from opd_jax.losses import reference_loss
from opd_jax.losses.custom import custom_loss


def reverse_kl(student, teacher, tokens):
    logp, logq = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    return jnp.sum(jnp.exp(logp) * (logp - logq), -1)


@pytest.mark.parametrize("chunk", [3, 4, 64])
def test_equals_the_reference(chunk: int) -> None:
    with jax.enable_x64(True):
        r = np.random.default_rng(0)
        h, w, g, u = (jnp.asarray(r.normal(size=s)) for s in ((2, 7, 5), (11, 5), (2, 7, 8), (13, 8)))
        y, mask = jnp.asarray(r.integers(0, 11, (2, 7))), jnp.asarray(r.random((2, 7)) < 0.7)

        def own(h, w, g, u):
            return custom_loss(reverse_kl, h, w, g, u, y, mask, chunk=chunk)[0]

        def reference(h, w, g, u):
            return reference_loss(h, w, g, u, y, mask, Objective())[0]

        value, gradient = jax.value_and_grad(own, (0, 1, 2, 3))(h, w, g, u)
        expected, expected_gradient = jax.value_and_grad(reference, (0, 1))(h, w, g, u)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), gradient[:2], expected_gradient
        )
        assert not np.any(gradient[2])
        assert not np.any(gradient[3])
        assert custom_loss(reverse_kl, h, w, g, u, y, mask)[1] == mask.sum()


def test_extra_arrays_are_cut_along() -> None:
    h, w = jnp.ones((2, 7, 4)), jnp.ones((6, 4))
    weights = jnp.arange(14.0).reshape(2, 7)
    mask = jnp.ones((2, 7)).at[1, 6].set(0)

    def weighted(student, teacher, tokens, weight):
        assert student.shape == teacher.shape == (*weight.shape, 6)
        return weight * tokens

    tokens = jnp.full((2, 7), 2)
    total, count = custom_loss(weighted, h, w, h, w, tokens, mask, weights, chunk=3)
    assert (total, count) == (2 * (13 * 14 / 2 - 13), 13)
