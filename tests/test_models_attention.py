"""Attention of whole rows: chunked and by the splash kernel (interpreted), against the plain form under its mask."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.mesh import Layout, make_mesh
from opd_jax.models import attention as module
from opd_jax.models.attention import attention, causal_mask, self_attention

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 300, 4, 2, 16
BOUNDS = [[5, 100, 280], [0, 150, 300]]  # two segments a row; padding on both sides, and none


def inputs() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
    for row, (first, middle, last) in enumerate(BOUNDS):
        segments[row, first:middle], segments[row, middle:last] = 1, 2
        positions[row, first:middle], positions[row, middle:last] = np.arange(middle - first), np.arange(last - middle)
    shapes = [(ROWS, LENGTH, HEADS, SIZE), *[(ROWS, KV_HEADS, LENGTH, SIZE)] * 2, (ROWS, LENGTH, HEADS, SIZE)]
    q, k, v, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return (q, k, v), jnp.asarray(positions), jnp.asarray(segments), jnp.where(segments[..., None, None] > 0, weight, 0)


def value_and_gradients(attend: Any) -> Any:
    qkv, _, _, weight = inputs()
    return jax.jit(jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv) * weight), (0, 1, 2)))(*qkv)


@pytest.mark.parametrize("form", ["chunked", "splash", "splash on a mesh"])
@pytest.mark.parametrize("window", [2**30, 40])
def test_whole_rows(form: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUERIES", 64)
    _, positions, segments, _ = inputs()
    layout = Layout(make_mesh(2, 1, 2, devices=jax.devices()[:4])) if "mesh" in form else None
    if form == "chunked":
        attend = functools.partial(self_attention, positions=positions, segments=segments, window=window)
    else:
        attend = functools.partial(module._splash, segments=segments, window=window, layout=layout, interpret=True)
    mask = causal_mask(positions, positions, segments, segments, window)
    want, want_gradients = value_and_gradients(functools.partial(attention, mask=mask))
    got, gradients = value_and_gradients(attend)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-3)  # a sum of 36,000 terms of size 1
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_long_row_needs_no_square_of_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the length: twice the temporary memory, backward pass included, not four times."""
    monkeypatch.setattr(module, "QUERIES", 64)

    def temporary(length: int) -> int:
        q, k = jnp.zeros((1, length, 2, 8)), jnp.zeros((1, 2, length, 8))
        positions, ones = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)

        def loss(q: Any, k: Any) -> Any:
            return jnp.sum(self_attention(q, k, k, positions, ones, 2**30))

        memory: Any = jax.jit(jax.grad(loss, (0, 1))).lower(q, k).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(4096) < 2.5 * temporary(2048)
