"""The jitted sampling loop: prefill, then a ``while_loop`` over a static batch of rows until all have stopped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from opd_jax.mesh import Layout
from opd_jax.models.attention import wide
from opd_jax.models.cache import Cache
from opd_jax.models.decoder import DecoderConfig, decode_layout, decode_step, head, prefill, unembed
from opd_jax.sampling.law import draw, law_logits, row_keys, uniforms
from opd_jax.types import Params, Prompts, Rollouts


class Law(NamedTuple):
    """The sampling law; its values are traced, so changing them compiles nothing."""

    temperature: float | Array = 1.0
    top_p: float | Array = 1.0
    top_k: int | Array = 0


class _State(NamedTuple):
    column: Array  # response position being decoded
    hidden: Array  # [B, D] predicts the token of that position
    done: Array  # [B]
    cache: Cache
    out: Rollouts


def make_rollout(
    config: DecoderConfig,
    *,
    max_response: int,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    support: int = 16,
    truncated: bool = False,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> Callable[[Params, Prompts, Law, int | Array, int | Array], Rollouts]:
    """Builds the jitted ``rollout(params, prompts, law, seed, step) → Rollouts``.

    Weights are cast and resharded once per call; the key/value cache lives in the loop's carry. Ids from ``vocab_size``
    on (padding of the head) are never sampled. A row ends with an id of ``stop_ids``, which belongs to the response.

    Args:
        support: k of the returned top-k ids.
        truncated: the law may use top-p or top-k (costs a sort per token).
    """
    support = min(support, vocab_size)
    body = functools.partial(
        _decode, config=config, stop_ids=stop_ids, vocab_size=vocab_size, truncated=truncated, layout=layout
    )

    @jax.jit
    def rollout(params: Params, prompts: Prompts, law: Law, seed: int | Array, step: int | Array) -> Rollouts:
        weights = decode_layout(params, config, dtype, layout)
        B, P = prompts.tokens.shape
        columns = jnp.arange(P)[None] - (P - prompts.lengths[:, None])
        positions, segments = jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)
        shape = (config.layers, B, P + max_response, config.kv_heads, config.head_dim)
        cache = Cache.empty(*shape, dtype, layout)
        hidden, cache = prefill(weights, config, prompts.tokens, positions, segments, cache, layout)
        state = _State(
            jnp.int32(0),
            hidden,
            jnp.zeros(B, bool),
            cache,
            _empty(prompts, max_response, support, wide(dtype)),
        )
        keys = row_keys(seed, step, prompts)
        step_fn = functools.partial(body, weights=weights, keys=keys, law=law, first_column=P)
        state = jax.lax.while_loop(lambda s: (s.column < max_response) & ~jnp.all(s.done), step_fn, state)
        return state.out

    return rollout


def _empty(prompts: Prompts, R: int, k: int, dtype: Any) -> Rollouts:
    B = prompts.lengths.shape[0]
    return Rollouts(
        prompts=prompts,
        tokens=jnp.zeros((B, R), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        stopped=jnp.zeros(B, bool),
        logp=jnp.zeros((B, R), dtype),
        entropy=jnp.zeros((B, R), dtype),
        topk_ids=jnp.zeros((B, R, k), jnp.int32),
        topk_logp=jnp.zeros((B, R, k), dtype),
    )


def _decode(
    state: _State,
    *,
    config: DecoderConfig,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    truncated: bool,
    layout: Layout | None,
    weights: Params,
    keys: Array,
    law: Law,
    first_column: int,
) -> _State:
    column, out = state.column, state.out
    choose = functools.partial(_choose, vocab_size=vocab_size, support=out.topk_ids.shape[-1], truncated=truncated)
    if layout:
        # each device its own rows: left to itself, the partitioner gathers all logits on all devices for the top-k
        rows, whole = layout.spec(("batch",)), layout.spec(())
        choose = jax.shard_map(choose, mesh=layout.mesh, in_specs=(rows, rows, whole, whole), out_specs=rows)
    ids, logp, entropy, top_ids, top_logp = choose(unembed(state.hidden, head(weights)), keys, column, law)

    live = ~state.done
    is_stop = jnp.isin(ids, jnp.asarray(stop_ids, jnp.int32))

    def put(array: Array, value: Array) -> Array:
        mask = live.reshape(-1, *[1] * (value.ndim - 1))
        return jax.lax.dynamic_update_slice_in_dim(array, jnp.where(mask, value, 0)[:, None], column, axis=1)

    out = dataclasses.replace(
        out,
        tokens=put(out.tokens, ids),
        logp=put(out.logp, logp),
        entropy=put(out.entropy, entropy),
        topk_ids=put(out.topk_ids, top_ids),
        topk_logp=put(out.topk_logp, top_logp),
        lengths=out.lengths + live,
        stopped=out.stopped | (live & is_stop),
    )
    positions = out.prompts.lengths + column
    hidden, cache = decode_step(weights, config, ids, positions, first_column + column, state.cache, layout)
    return _State(column + 1, hidden, state.done | is_stop, cache, out)


def _choose(
    logits: Array, keys: Array, column: Array, law: Law, *, vocab_size: int, support: int, truncated: bool
) -> tuple[Array, ...]:
    """Sampled ids and their log-probabilities; entropy, top-k ids and log-probabilities of the untempered softmax."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    ids, logp = draw(law_logits(logits, law.temperature, law.top_p, law.top_k, truncated), uniforms(keys, column))
    lse = jax.nn.logsumexp(logits, axis=-1)
    weight = jnp.exp(logits - lse[:, None])
    entropy = lse - jnp.sum(jnp.where(weight > 0, weight * logits, 0.0), axis=-1)
    top_logits, top_ids = jax.lax.top_k(logits, support)
    return ids, logp, entropy, top_ids, top_logits - lse[:, None]
