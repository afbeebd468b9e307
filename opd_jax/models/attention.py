"""Attention and the matrix product: the two operations that the decoder spends its time in."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The accumulation type: at least float32; float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def linear(x: Float[Array, "*rows D"], w: Float[Array, "O D"]) -> Float[Array, "*rows O"]:
    """y = x wᵀ, computed in x's dtype and accumulated in float32; the gradient of w is in w's own dtype.

    Its own derivative rule keeps the products of the backward pass in x's dtype (autodiff would form mixed-precision
    products, which XLA runs at half the speed on CPU) and gives float32 master weights a float32 gradient.
    """
    return product(x, w.astype(x.dtype)).astype(x.dtype)


def product(x: Float[Array, "*rows D"], w: Float[Array, "O D"]) -> Float[Array, "*rows O"]:
    """x wᵀ of one dtype, accumulated and returned in float32 (or wider)."""
    plain = functools.partial(_dot, contract=((x.ndim - 1,), (1,)))
    if x.dtype != jnp.float32 or math.prod(x.shape[:-1]) > 32:
        return plain(x, w)
    return jax.lax.platform_dependent(x, w, cpu=_few_rows, default=plain)


def _few_rows(x: Array, w: Array) -> Array:
    # 16 × 576 by 49,152: 14 ms as w xᵀ, transposed apart, against 22 ms (XLA on CPU, float32, one core)
    y = _dot(w, x.reshape(-1, x.shape[-1]), ((1,), (1,)))
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


def _dot(a: Array, b: Array, contract: tuple[tuple[int, ...], tuple[int, ...]]) -> Array:
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=wide(a.dtype))


def _linear_fwd(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return linear(x, w), (x, w)


def _linear_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = residuals
    rows = tuple(range(x.ndim - 1))
    dx = _dot(g, w.astype(x.dtype), ((x.ndim - 1,), (0,))).astype(x.dtype)
    dw = _dot(g, x, (rows, rows)).astype(w.dtype)
    return dx, dw


linear.defvjp(_linear_fwd, _linear_bwd)


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
    window: int | Array,
) -> Bool[Array, "B T S"]:
    """Which keys a query sees: same segment (0 is padding), not later, less than ``window`` positions before."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    same = (query_segments[:, :, None] == key_segments[:, None, :]) & (key_segments[:, None, :] > 0)
    return same & (distance >= 0) & (distance < window)


def attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"], mask: Bool[Array, "B T S"]
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v with grouped queries (N a multiple of K; keys are not repeated); softmax in float32.

    A query that sees no key (padding) gets a finite, meaningless mean of the values.
    """
    B, T, N, H = q.shape
    K, G = k.shape[1], N // k.shape[1]
    dtype = wide(q.dtype)
    # plain batched products [m, H] × [S, H] over (B, K), m = (T, G): the one form that XLA on CPU has fast in bf16
    grouped = q.reshape(B, T, K, G, H).swapaxes(1, 2).reshape(B, K, T * G, H)
    scores = jnp.einsum("bkmh,bksh->bkms", grouped, k, preferred_element_type=dtype) * H**-0.5
    scores = jnp.where(jnp.repeat(mask, G, axis=1)[:, None], scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = jnp.einsum("bkms,bksh->bkmh", weights, v, preferred_element_type=dtype).astype(q.dtype)
    return out.reshape(B, K, T, G, H).swapaxes(1, 2).reshape(B, T, N, H)
