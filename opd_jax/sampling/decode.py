"""The jitted parts of sampling: prefill of prompts, placing them in slots, and segments of decoding.

Slots are the rows of one key/value cache. All slots write the same cache column at each step, so a write is one slice
update; what a slot may attend to is told by its segment ids. A prompt that enters a free slot is written into the
columns just before the shared one: they belonged to the slot's last occupant. The cache is as wide as the oldest live
slot needs, in steps of a ladder, and moved to the left when it would grow beyond.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array, lax

from opd_jax.mesh import Axes, Layout, constrain
from opd_jax.models.attention import wide
from opd_jax.models.cache import Cache
from opd_jax.models.decoder import DecoderConfig, decode_ends, decode_layer, decode_step, head, prefill, unembed
from opd_jax.models.top_k import top_k
from opd_jax.sampling.law import Law, draw, law_logits, row_keys, uniforms
from opd_jax.types import Params

SEGMENT = 32  # tokens a slot may decode between two looks of the host


@flax.struct.dataclass
class Slots:
    """The state of decoding. A slot that is not live holds garbage and is free."""

    column: Array  # [] int32, cache column that the next token is written to
    hidden: Array  # [B, D] predicts the next token
    position: Array  # [B] int32, response position of the next token
    prompt: Array  # [B] int32, prompt length
    keys: Array  # [B, 2] uint32, see ``row_keys``
    live: Array  # [B] bool
    cache: Cache


class Emitted(NamedTuple):
    """What a segment sampled: the first ``count`` entries of each row are tokens of its response."""

    tokens: Array  # [B, SEGMENT] int32
    logp: Array  # [B, SEGMENT]
    entropy: Array  # [B, SEGMENT]
    topk_ids: Array  # [B, SEGMENT, k] int32
    topk_logp: Array  # [B, SEGMENT, k]


class Flags(NamedTuple):
    """What the host decides from; replicated, so that every host decides alike."""

    count: Array  # [B] int32
    live: Array  # [B] bool
    stopped: Array  # [B] bool: ended by an end-of-sequence id in this segment
    steps: Array  # [] int32


@dataclasses.dataclass(frozen=True)
class Engine:
    """The jitted functions for one model shape; they compile once per bucket of columns or prompts."""

    ends: Callable[[Params], Params]  # weights for decoding: embedding, norm and head, cast and resharded
    layer: Callable[[Params, int], Params]  # of one layer, out of the stacked ones
    prefill: Callable[..., tuple[Array, Cache]]
    place: Callable[..., Slots]
    segment: Callable[..., tuple[Slots, Emitted, Flags]]
    empty: Callable[[int, int], Slots]  # (slots, columns)
    move: Callable[..., Slots]
    layout: Layout | None
    support: int  # k of the emitted top-k
    float_dtype: Any  # of emitted log-probabilities
    layers: int

    def cast(self, params: Params) -> Params:
        """Weights for decoding, one dict per layer; layer by layer, so that scratch memory is that of one."""
        stacked = params["layers"]
        ends = self.ends({k: w for k, w in params.items() if k != "layers"})
        return ends | {"layers": [self.layer(stacked, i) for i in range(self.layers)]}


@functools.lru_cache(maxsize=8)  # runs of one process share what is compiled
def make_engine(
    config: DecoderConfig,
    *,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    support: int = 16,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
) -> Engine:
    """Builds the functions. Ids from ``vocab_size`` on (padding of the head) are never sampled.

    Args:
        stop_ids: a response ends with one of them, which belongs to it.
        support: k of the returned top-k ids.
        layout: a mesh with the table for decoding (``ROLLOUT``).
    """

    support = min(support, vocab_size)
    platform = layout.mesh.devices.flat[0].platform if layout else jax.default_backend()
    # XLA on CPU writes one bfloat16 column by converting the whole cache to float32 and back.
    cache_dtype = wide(dtype) if platform == "cpu" else dtype

    ends = jax.jit(functools.partial(decode_ends, c=config, dtype=dtype, layout=layout))
    layer = jax.jit(functools.partial(decode_layer, c=config, dtype=dtype, layout=layout))

    @jax.jit
    def prefill_rows(weights: Params, tokens: Array, lengths: Array) -> tuple[Array, Cache]:
        m, P = tokens.shape
        columns = jnp.arange(P)[None] - (P - lengths[:, None])
        positions, segments = jnp.maximum(columns, 0), (columns >= 0).astype(jnp.int32)
        cache = Cache.empty(config.layers, m, P, config.kv_heads, config.head_dim, cache_dtype, layout)
        return prefill(weights, config, tokens, positions, segments, cache, layout)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def empty(slots: int, columns: int) -> Slots:
        cache = Cache.empty(config.layers, slots, columns, config.kv_heads, config.head_dim, cache_dtype, layout)
        zeros = functools.partial(jnp.zeros, slots)
        hidden = jnp.zeros((slots, config.width), dtype)
        keys = jnp.zeros((slots, 2), jnp.uint32)
        return Slots(jnp.int32(0), hidden, zeros(jnp.int32), zeros(jnp.int32), keys, zeros(bool), cache)

    @functools.partial(jax.jit, donate_argnums=0)
    def place(
        slots: Slots, hidden: Array, prompts: Cache, lengths: Array, source: Array, keys_of: tuple[Array, ...]
    ) -> Slots:
        seed, step, ids, samples = keys_of
        keys = row_keys(seed, step, ids, samples)
        put = _on_rows(layout, _place, (slots, hidden, prompts, lengths, source, keys))
        return put(slots, hidden, prompts, lengths, source, keys)

    body = functools.partial(_decode, config=config, stop_ids=stop_ids, vocab_size=vocab_size, layout=layout)

    def segment(
        weights: Params, slots: Slots, law: Law, limit: Array, steps: Array, patience: Array
    ) -> tuple[Slots, Emitted, Flags]:
        B, float_dtype = slots.live.shape[0], wide(dtype)
        zeros = functools.partial(jnp.zeros, (B, SEGMENT))
        lists = functools.partial(jnp.zeros, (B, SEGMENT, support))
        emitted = Emitted(
            zeros(jnp.int32), zeros(float_dtype), zeros(float_dtype), lists(jnp.int32), lists(float_dtype)
        )
        start = slots.live

        def going(state: tuple[Slots, Emitted, Flags]) -> Array:
            ended = jnp.sum(start & ~state[0].live)
            return (state[2].steps < steps) & jnp.any(state[0].live) & (ended < patience)

        flags = Flags(jnp.zeros(B, jnp.int32), start, jnp.zeros(B, bool), jnp.int32(0))
        step = functools.partial(body, weights=weights, law=law, limit=limit)
        slots, emitted, flags = lax.while_loop(going, step, (slots, emitted, flags))
        return slots, emitted, jax.tree.map(lambda x: constrain(x, (), layout), flags)

    return Engine(
        ends, layer, prefill_rows, place, jax.jit(segment, donate_argnums=1), empty, functools.partial(_move, layout),
        layout, support, wide(dtype), config.layers,
    )  # fmt: skip


def bucket(n: int, smallest: int = 32) -> int:
    """The least of 32, 48, 64, 96, 128, 192, … that holds n: at most half of it idle, and few shapes to compile."""
    size = smallest
    while size < n:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _decode(
    state: tuple[Slots, Emitted, Flags],
    *,
    config: DecoderConfig,
    stop_ids: tuple[int, ...],
    vocab_size: int,
    layout: Layout | None,
    weights: Params,
    law: Law,
    limit: Array,
) -> tuple[Slots, Emitted, Flags]:
    slots, emitted, flags = state
    choose = functools.partial(_choose, vocab_size=vocab_size, support=emitted.topk_ids.shape[-1])
    if layout:
        rows, whole, logits = layout.spec(("batch",)), layout.spec(()), layout.spec(("batch", "vocab"))
        choose = functools.partial(_share_rows, choose, dict(layout.table)["vocab"])
        choose = jax.shard_map(
            choose, mesh=layout.mesh, in_specs=(logits, rows, rows, whole), out_specs=rows, check_vma=False
        )
    sampled = choose(unembed(slots.hidden, head(weights)), slots.keys, slots.position, law)

    def put(array: Array, value: Array) -> Array:
        mask = slots.live.reshape(-1, *[1] * (value.ndim - 1))
        return lax.dynamic_update_slice_in_dim(array, jnp.where(mask, value, 0)[:, None], flags.steps, axis=1)

    ids = sampled[0]
    stopped = slots.live & jnp.isin(ids, jnp.asarray(stop_ids, jnp.int32))
    hidden, cache = decode_step(weights, config, ids, slots.prompt + slots.position, slots.column, slots.cache, layout)
    live = slots.live & ~stopped & (slots.position + 1 < limit)
    after = Slots(slots.column + 1, hidden, slots.position + 1, slots.prompt, slots.keys, live, cache)
    emitted = Emitted(*map(put, emitted, sampled))
    return after, emitted, Flags(flags.count + slots.live, live, flags.stopped | stopped, flags.steps + 1)


def _share_rows(
    choose: Callable[..., tuple[Array, ...]],
    axes: tuple[str, ...],
    logits: Array,
    keys: Array,
    positions: Array,
    law: Law,
) -> tuple[Array, ...]:
    """``choose`` where the devices of ``axes`` hold parts of the vocabulary: each swaps its part of all rows for all
    of its share of the rows, so that no device sees, or chooses from, all logits."""
    ways, B = lax.axis_size(axes), logits.shape[0]
    if ways == 1:
        return choose(logits, keys, positions, law)
    logits, keys, positions = (
        jnp.pad(x, [(0, -B % ways), *[(0, 0)] * (x.ndim - 1)]) for x in (logits, keys, positions)
    )
    share = logits.shape[0] // ways
    parts = lax.all_to_all(logits.reshape(ways, share, -1), axes, split_axis=0, concat_axis=0, tiled=True)
    logits = parts.swapaxes(0, 1).reshape(share, -1)  # the vocabulary in order
    mine = (lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * share, share) for x in (keys, positions))
    chosen = choose(logits, *mine, law)
    return tuple(lax.all_gather(x, axes, tiled=True)[:B] for x in chosen)


def _choose(
    logits: Array, keys: Array, positions: Array, law: Law, *, vocab_size: int, support: int
) -> tuple[Array, ...]:
    """Sampled ids and their log-probabilities; entropy, top-k ids and log-probabilities of the untempered softmax."""
    logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
    ids, logp = draw(law_logits(logits, law), uniforms(keys, positions))
    peak = logits.max(-1, keepdims=True)
    weight = jnp.exp(logits - peak)
    total = weight.sum(-1)
    lse = peak[:, 0] + jnp.log(total)
    entropy = lse - jnp.sum(jnp.where(weight > 0, weight * logits, 0.0), axis=-1) / total
    top_ids = top_k(logits, support)
    top_logp = jnp.take_along_axis(logits, top_ids, -1) - lse[:, None]
    return ids, logp, entropy, top_ids.astype(jnp.int32), top_logp


def _place(slots: Slots, hidden: Array, prompts: Cache, lengths: Array, source: Array, keys: Array) -> Slots:
    """Prompt ``source[b]`` of those prefilled starts in slot b; -1 leaves the slot as it is."""
    fresh, row, P = source >= 0, jnp.maximum(source, 0), prompts.positions.shape[1]
    first = slots.column - P

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(fresh.reshape(-1, *[1] * (old.ndim - 1)), new.astype(old.dtype), old)

    def put(old: Array, new: Array, axis: int) -> Array:
        part = pick(new[row], lax.dynamic_slice_in_dim(old, first, P, axis))
        return lax.dynamic_update_slice_in_dim(old, part, first, axis)

    cleared = pick(jnp.zeros_like(slots.cache.segments), slots.cache.segments)
    cache = Cache(
        tuple(put(old, new, 2) for old, new in zip(slots.cache.k, prompts.k, strict=True)),
        tuple(put(old, new, 2) for old, new in zip(slots.cache.v, prompts.v, strict=True)),
        put(slots.cache.positions, prompts.positions, 1),
        put(cleared, prompts.segments, 1),
    )
    return Slots(
        slots.column,
        pick(hidden[row], slots.hidden),
        pick(jnp.zeros_like(slots.position), slots.position),
        pick(lengths[row], slots.prompt),
        pick(keys, slots.keys),
        slots.live | fresh,
        cache,
    )


def _on_rows(layout: Layout | None, f: Callable[..., Any], arguments: Any) -> Callable[..., Any]:
    """f on the rows of each batch shard: picking rows by index is then no collective."""
    if layout is None:
        return f
    specs = jax.tree.map(lambda x: layout.spec(_axes(x)), arguments)
    return jax.shard_map(f, mesh=layout.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)


def _axes(x: Any) -> Axes:
    return {0: (), 4: ("batch", "kv_heads", None, None)}.get(x.ndim, ("batch",))


def _move(layout: Layout | None, slots: Slots, shift: int, columns: int, rows: Array | None = None) -> Slots:
    """The same state in a cache of ``columns``, ``shift`` columns further left, with the ``rows`` given only."""

    def moved(x: Array, axis: int | None) -> Array:
        out = _moved(layout, x, axis, columns, shift, rows)
        x.delete()  # one array at a time: no second cache is needed
        return out

    cache = Cache(
        tuple(moved(x, 2) for x in slots.cache.k),
        tuple(moved(x, 2) for x in slots.cache.v),
        moved(slots.cache.positions, 1),
        moved(slots.cache.segments, 1),
    )
    per_row = (slots.hidden, slots.position, slots.prompt, slots.keys, slots.live)
    hidden, position, prompt, keys, live = per_row if rows is None else (moved(x, None) for x in per_row)
    return Slots(slots.column - shift, hidden, position, prompt, keys, live, cache)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def _moved(
    layout: Layout | None, x: Array, axis: int | None, columns: int, shift: int | Array, rows: Array | None
) -> Array:
    def local(x: Array, shift: Array, rows: Array | None) -> Array:
        x = x if rows is None else x[rows]
        if axis is None:
            return x
        pads = [(0, columns if i == axis else 0) for i in range(x.ndim)]
        return lax.dynamic_slice_in_dim(jnp.pad(x, pads), shift, columns, axis)

    shift = jnp.asarray(shift)
    return _on_rows(layout, local, (x, shift, rows))(x, shift, rows)
