"""What is sampled: temperature, top-k and top-p, and the random number of every token.

The law that samples is the law that is scored: behaviour log-probabilities come from the same log-probabilities that
the token was drawn from (design decision 4).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, UInt32

_BLOCK = 256  # inverse CDF in two levels: 0.6 ms against 4.6 for a flat cumulative sum at 16 × 49,152 on a CPU


class Law(NamedTuple):
    """Temperature (0: greedy), top-p (1: off) and top-k (0: off); traced, so changing them compiles nothing."""

    temperature: float | Array = 1.0
    top_p: float | Array = 1.0
    top_k: int | Array = 0


def row_keys(seed: int | Array, step: int | Array, ids: ArrayLike, samples: ArrayLike) -> UInt32[Array, "B 2"]:
    """A key per row, a function of (seed, step, prompt id, sample index) alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    fold = jax.vmap(lambda i, s: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, i), s)))
    return fold(ids, samples)


def uniforms(keys: UInt32[Array, "B 2"], positions: Int[Array, " B"]) -> Float[Array, " B"]:
    """One uniform in [0, 1) per row for its response position."""
    draw = jax.vmap(lambda k, t: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(k), t)))
    return draw(keys, positions)


def law_logits(logits: Float[Array, "B V"], law: Law) -> Float[Array, "B V"]:
    """Logits of the sampling law: divided by the temperature; ids outside top-k, then top-p, at −∞.

    Top-p keeps the shortest prefix of the ids, most probable first, whose mass reaches ``top_p``; ties go to the lowest
    id. Temperature 0 is greedy: all mass on the lowest of the most probable ids. Without top-p and top-k nothing is
    sorted.
    """
    law = Law(*map(jnp.asarray, law))
    cut = jnp.logical_or(law.top_p < 1, law.top_k > 0)
    which = jnp.where(law.temperature > 0, cut.astype(jnp.int32), 2)
    return lax.switch(which, [lambda z, law: z / law.temperature, _truncate, _greedy], logits, law)


def _greedy(logits: Array, law: Law) -> Array:
    best = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(best, jnp.zeros_like(logits), -jnp.inf)


def _truncate(logits: Array, law: Law) -> Array:
    scaled, V = logits / law.temperature, logits.shape[-1]
    ids = jnp.broadcast_to(jnp.arange(V), scaled.shape)
    falling, order = lax.sort((-scaled, ids), num_keys=2)
    place = jnp.arange(V)
    in_k = place < jnp.where(law.top_k > 0, law.top_k, V)
    prob = jax.nn.softmax(jnp.where(in_k, -falling, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(prob, axis=-1) - prob
    # rounded mass may reach 1 before the last id
    kept = in_k & ((mass_before < law.top_p) | (place == 0) | (law.top_p >= 1))
    last = V - 1 - jnp.argmax(kept[:, ::-1], axis=-1)[:, None]
    value, id_ = (jnp.take_along_axis(x, last, -1) for x in (falling, order))
    inside = (-scaled < value) | ((-scaled == value) & (ids <= id_))
    return jnp.where(inside, scaled, -jnp.inf)


def draw(logits: Float[Array, "B V"], u: Float[Array, " B"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Inverse-CDF draw from softmax(logits) with one uniform per row; returns ids and their log-probabilities.

    An id of probability zero is never returned.
    """
    B, V = logits.shape
    top = jnp.max(logits, axis=-1, keepdims=True)
    weight = jnp.exp(logits - top)
    blocks = jnp.pad(weight, ((0, 0), (0, -V % _BLOCK))).reshape(B, -1, _BLOCK)
    cumulative = jnp.cumsum(blocks.sum(axis=-1), axis=-1)
    total = cumulative[:, -1]
    target = u * total
    block = _first_above(cumulative, blocks.sum(axis=-1) > 0, target)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, jnp.maximum(block - 1, 0)[:, None], 1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    ids = block * _BLOCK + _first_above(jnp.cumsum(inside, axis=-1), inside > 0, target - before)
    logp = jnp.take_along_axis(logits, ids[:, None], axis=-1)[:, 0] - top[:, 0] - jnp.log(total)
    return ids.astype(jnp.int32), logp


def _first_above(
    cumulative: Float[Array, "B n"], has_weight: Bool[Array, "B n"], target: Float[Array, " B"]
) -> Int[Array, " B"]:
    """First index with weight whose cumulative weight exceeds the target; else the last index with weight.

    Weight is asked for by itself: a parallel cumulative sum associates differently from one index to the next, so it
    may step up, by rounding, at an index without weight.
    """
    n = cumulative.shape[-1]
    first = jnp.argmax(has_weight & (cumulative > target[:, None]), axis=-1)
    last = n - 1 - jnp.argmax(has_weight[:, ::-1], axis=-1)
    none_above = ~jnp.any(has_weight & (cumulative > target[:, None]), axis=-1)
    return jnp.where(none_above, last, first)
