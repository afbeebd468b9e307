"""What is sampled: temperature, top-k and top-p, and the random number of every token.

The law that samples is the law that is scored: behaviour log-probabilities come from the same log-probabilities that
the token was drawn from (design decision 4).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, UInt32

from opd_jax.types import Prompts

_BLOCK = 256  # inverse CDF in two levels: 0.6 ms against 4.6 for a flat cumulative sum at 16 × 49,152 on a CPU


def row_keys(seed: int | Array, step: int | Array, prompts: Prompts) -> UInt32[Array, "B 2"]:
    """A key per row, a function of (seed, step, prompt id, sample index) alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    fold = jax.vmap(lambda i, s: jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, i), s)))
    return fold(prompts.ids, prompts.samples)


def uniforms(keys: UInt32[Array, "B 2"], position: int | Array) -> Float[Array, " B"]:
    """One uniform in [0, 1) per row for the response position."""
    draw = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(k), position)))
    return draw(keys)


def law_logits(
    logits: Float[Array, "B V"], temperature: Array | float, top_p: Array | float, top_k: Array | int, truncated: bool
) -> Float[Array, "B V"]:
    """Logits of the sampling law: divided by the temperature; ids outside top-k, then top-p, at −∞.

    Top-p keeps the shortest prefix of the ids, most probable first, whose mass reaches ``top_p``; ties go to the lowest
    id. Temperature 0 is greedy: all mass on the lowest of the most probable ids.

    Args:
        top_k: 0 keeps all.
        truncated: static; False skips the sort (top_p = 1 and top_k = 0).
    """
    V = logits.shape[-1]
    best = jnp.arange(V) == jnp.argmax(logits, axis=-1, keepdims=True)
    greedy = jnp.where(best, 0.0, -jnp.inf)
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    if truncated:
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1)
        kept_k = rank < jnp.where(top_k > 0, top_k, V)
        prob = jax.nn.softmax(jnp.where(kept_k, scaled, -jnp.inf), axis=-1)
        sorted_prob = jnp.take_along_axis(prob, order, axis=-1)
        mass_before = jnp.take_along_axis(jnp.cumsum(sorted_prob, axis=-1) - sorted_prob, rank, axis=-1)
        # rounded mass may reach 1 before the last id
        kept = kept_k & ((mass_before < top_p) | (rank == 0) | (jnp.asarray(top_p) >= 1))
        scaled = jnp.where(kept, scaled, -jnp.inf)
    return jnp.where(temperature > 0, scaled, greedy)


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
