"""Attention and the matrix product: the two operations that the decoder spends its time in.

Whole sequences go through ``self_attention``, whose memory grows with T, not T²: the splash kernel on TPU, chunks of
queries elsewhere. One decoded token goes through ``attention`` over the cache.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from opd_jax.mesh import Layout

QUERIES = 512  # of one chunk
_LANES, _BLOCK = 128, 512  # splash: sequence lengths are multiples of the one, tiles as large as the other


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """The accumulation type: at least float32; float64 stays float64."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.custom_vjp
def linear(x: Float[Array, "*rows D"], w: Float[Array, "O D"]) -> Float[Array, "*rows O"]:
    """y = x wᵀ, computed in x's dtype and accumulated in float32; the gradient of w is in w's own dtype.

    Its own derivative rule keeps the products of the backward pass in x's dtype (autodiff would form mixed-precision
    products, which XLA runs at half the speed on CPU) and gives float32 master weights a float32 gradient.
    """
    return _linear(x, w)


def _linear(x: Array, w: Array) -> Array:
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
    return _linear(x, w), (x, w)  # not ``linear``: a remat policy must see the product


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


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K T H"],
    v: Float[Array, "B K T H"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    window: int | Array,
    layout: Layout | None = None,
) -> Float[Array, "B T N H"]:
    """``attention`` of whole rows under ``causal_mask``; the tokens of a segment stand side by side, in order.

    The splash kernel needs a ``window`` known when the program is traced. Padding gets finite, meaningless rows.
    """
    platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
    if platform == "tpu" and isinstance(window, int):
        return _splash(q, k, v, segments, window, layout)
    if q.shape[1] <= 2 * QUERIES:
        return attention(q, k, v, causal_mask(positions, positions, segments, segments, window))

    @jax.checkpoint  # or the backward pass would keep the scores of every chunk
    def chunk(inputs: tuple[Array, Array, Array]) -> Array:
        q, at, of = inputs
        return attention(q, k, v, causal_mask(at, positions, of, segments, window))

    T = q.shape[1]
    rows = (_pad(x, -T % QUERIES) for x in (q, positions, segments))
    chunks = tuple(x.reshape(x.shape[0], -1, QUERIES, *x.shape[2:]).swapaxes(0, 1) for x in rows)
    out = jax.lax.map(chunk, chunks)  # [n, B, QUERIES, N, H]
    return out.swapaxes(0, 1).reshape(q.shape[0], -1, *q.shape[2:])[:, :T]


def _splash(
    q: Array, k: Array, v: Array, segments: Array, window: int, layout: Layout | None, interpret: bool = False
) -> Array:
    """JAX's splash-attention kernel, each device on its own rows and heads."""
    T = q.shape[1]
    heads = "batch", "heads", None, None
    inputs = (q.swapaxes(1, 2) * q.shape[-1] ** -0.5, k, v)
    padded = [_pad(x, -T % _LANES, axis=2) for x in inputs]
    local: Any = functools.partial(_splash_rows, window=window, interpret=interpret)
    if layout:
        specs = [layout.spec(axes) for axes in (heads, ("batch", "kv_heads", None, None), ("batch", None))]
        specs = (specs[0], specs[1], specs[1], specs[2])
        local = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return local(*padded, _pad(segments, -T % _LANES))[:, :, :T].swapaxes(1, 2)


def _splash_rows(q: Array, k: Array, v: Array, segments: Array, *, window: int, interpret: bool) -> Array:
    # Pallas takes a third of a second to import, and only a TPU needs it
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    T = q.shape[2]
    if window < T:
        mask = splash_attention_mask.LocalMask((T, T), (window - 1, 0), 0)
    else:
        mask = splash_attention_mask.CausalMask((T, T))
    tile = next(n for n in (_BLOCK, 256, _LANES) if T % n == 0)
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), tile)
    )
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * q.shape[1]),
        block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
    )  # fmt: skip
    kernel: Any = kernel  # its type says that it may return residuals, which are not asked for
    ids = splash_attention_kernel.SegmentIds
    rows = jax.vmap(lambda q, k, v, s: kernel(q, k, v, ids(s, s)))
    return rows(q, k, v, segments)


def _pad(x: Array, n: int, axis: int = 1) -> Array:
    """``n`` zeros at the end of an axis; segment 0 is padding."""
    return jnp.pad(x, [(0, n if i == axis else 0) for i in range(x.ndim)]) if n else x
