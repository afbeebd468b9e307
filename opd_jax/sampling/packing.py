"""Ragged sequences in rows of one width: several to a row, filled first-fit-decreasing, and rows in passes.

A batch of B sequences has B rows whatever their lengths, so nothing compiles twice. Packing leaves most of them empty,
and a pass over rows that hold nothing does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from opd_jax.errors import InputError
from opd_jax.mesh import Layout, batch_shards, own_rows, shard_holders
from opd_jax.types import Metrics, Rollouts, Sequences


def sequence_shapes(rows: int, max_prompt: int, max_response: int, k: int | None, rewarded: bool = False) -> Sequences:
    """Shapes and dtypes of ``rows`` rows; ``k`` ids at each sampled state, None: a corpus, without behaviour policy."""

    def shape(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, max_prompt + max_response, *more), dtype)

    logp, topk_ids = (None, None) if k is None else (shape(np.float32), shape(np.int32, k))
    arrays: Any = (*[shape(np.int32)] * 5, logp, topk_ids, None, shape(np.float32) if rewarded else None)
    return Sequences(*arrays, max_response=max_response)


def pack(rollouts: Rollouts, *, separate: bool = False, multiple: int = 1, layout: Layout | None = None) -> Sequences:
    """Rollouts in rows of P + R columns, as NumPy arrays; sequences stay with the process that sampled them.

    Of several processes, each fills in the rows of its own devices; ``lengths`` must be complete on all.

    Args:
        separate: one sequence a row instead of as many as fit; without layout in order.
        multiple: the number of rows is rounded up to a multiple of this (rows of a pass).
    """
    prompts, P = rollouts.prompts, rollouts.prompts.tokens.shape[1]
    prompt_lengths, lengths = np.asarray(prompts.lengths), np.asarray(rollouts.lengths)
    rewarded = rollouts.advantage is not None
    shapes = sequence_shapes(0, P, rollouts.tokens.shape[1], rollouts.topk_ids.shape[2], rewarded)
    behaviour = {"logp": np.asarray(rollouts.logp), "topk_ids": np.asarray(rollouts.topk_ids)}
    if rewarded:
        behaviour["advantage"] = np.broadcast_to(np.asarray(rollouts.advantage)[:, None], rollouts.tokens.shape)
    prompt_tokens, tokens = np.asarray(prompts.tokens), np.asarray(rollouts.tokens)

    def text(i: int) -> tuple[np.ndarray, np.ndarray]:
        return prompt_tokens[i, P - prompt_lengths[i] :], tokens[i, : lengths[i]]

    return _fill(shapes, prompt_lengths, lengths, text, behaviour, separate, multiple, layout)


def split(rollouts: Rollouts, parts: int, layout: Layout | None = None) -> list[Rollouts]:
    """The rows in ``parts`` batches; every batch shard gives its share to each, so rows stay with their process."""
    blocks = np.arange(len(rollouts.lengths)).reshape(batch_shards(layout), parts, -1)
    picked = (blocks[:, part].reshape(-1) for part in range(parts))
    return (
        [jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], rollouts) for rows in picked]
        if parts > 1
        else [rollouts]
    )


def pack_texts(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_prompt: int,
    max_response: int,
    *,
    separate: bool = False,
    multiple: int = 1,
    layout: Layout | None = None,
) -> Sequences:
    """(prompt, response) pairs of token ids of a corpus in rows of max_prompt + max_response columns; see ``pack``."""
    prompt_lengths, lengths = (np.array([len(text[i]) for text in texts]) for i in (0, 1))
    shapes = sequence_shapes(0, max_prompt, max_response, None)
    return _fill(shapes, prompt_lengths, lengths, texts.__getitem__, {}, separate, multiple, layout)


def _fill(
    shapes: Sequences,
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
    text: Callable[[int], Any],
    behaviour: dict[str, np.ndarray],
    separate: bool,
    multiple: int,
    layout: Layout | None,
) -> Sequences:
    width, used = shapes.tokens.shape[1], prompt_lengths + lengths - 1
    if not len(used) or prompt_lengths.min() < 1 or lengths.min() < 1 or used.max() > width:
        raise InputError(f"sequences to pack: expected at least one, each with a prompt and a response, of ≤ {width}")
    rows = -(-len(used) // multiple) * multiple
    if layout:
        layout.check("sequences to pack", (len(used),), ("batch",))
        layout.check("rows to pack into", (rows,), ("batch",))
    owners = _owners(layout)
    mine = own_rows(layout, len(owners))
    row_B, start_B = place(used, width, rows, owners, separate)
    # pages that nothing is written to, those of other processes' rows, are never touched
    out: Any = jax.tree.map(lambda s: np.zeros((rows, *s.shape[1:]), s.dtype), shapes)
    out.depth[:] = -1
    for i in np.flatnonzero(mine[row_B * len(owners) // rows]).tolist():
        prompt, response = text(i)
        whole = np.concatenate([prompt, response])
        at = row_B[i], slice(start_B[i], start_B[i] + used[i])
        out.tokens[at], out.targets[at] = whole[:-1], whole[1:]
        out.positions[at], out.segments[at] = np.arange(used[i]), i + 1
        answer = row_B[i], slice(at[1].stop - lengths[i], at[1].stop)
        out.depth[answer] = np.arange(lengths[i])
        for name, values in behaviour.items():
            getattr(out, name)[answer] = values[i, : lengths[i]]
    return out


def place(
    used_B: np.ndarray, width: int, rows: int, owners: Sequence[int], separate: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(row, first column) of sequences of ``used`` columns each, the same on every process.

    Sequences belong, in order, to the batch shards, each of which has equally many rows; a sequence may go to any shard
    of the same owner. Rows are filled first-fit-decreasing and dealt to the owner's shards in turn.
    """
    row_B, start_B = np.zeros((2, len(used_B)), np.int64)
    owner_S = np.asarray(owners)
    owner_B = owner_S[np.arange(len(used_B)) * len(owner_S) // len(used_B)]
    for owner in np.unique(owner_S):
        own, shards = np.flatnonzero(owner_B == owner), np.flatnonzero(owner_S == owner)
        free = np.full(len(own), width)
        for n, i in enumerate(own if separate else own[np.argsort(-used_B[own], kind="stable")]):
            row = n if separate else int(np.argmax(free >= used_B[i]))
            start_B[i] = width - free[row]
            free[row] -= used_B[i]
            row_B[i] = shards[row % len(shards)] * (rows // len(owner_S)) + row // len(shards)
    return row_B, start_B


def _owners(layout: Layout | None) -> list[int]:
    """Of every batch shard a number that shards share which the same processes hold."""
    holders = shard_holders(layout)
    return [holders.index(h) for h in holders]


def over_passes(
    body: Callable[..., Any], carry: Any, rows: Sequences, *more: Any, micro_batch: int | None, layout: Layout | None
) -> Any:
    """``carry = body(carry, pass number, rows, *more)`` over passes of ``micro_batch`` rows that hold a sequence.

    Every batch shard gives its next rows to each pass, so all devices work in all of them; ``more`` are further pytrees
    of arrays that start with the row axis. The number of passes is read from ``rows``: it compiles nothing. None: one.
    """
    M, shards = rows.tokens.shape[0], batch_shards(layout)
    if micro_batch is None or micro_batch == M:
        return body(carry, 0, rows, *more)
    held = jnp.any(rows.segments > 0, axis=1).reshape(_grid(M, micro_batch, shards))
    passes = jnp.sum(jnp.any(held, axis=(0, 2)))

    def take(i: Array, x: Array) -> Array:
        grid = x.reshape(*_grid(M, micro_batch, shards), *x.shape[1:])
        return lax.dynamic_index_in_dim(grid, i, axis=1, keepdims=False).reshape(micro_batch, *x.shape[1:])

    def step(i: Array, carry: Any) -> Any:
        return body(carry, i, *jax.tree.map(lambda x: take(i, x), (rows, *more)))

    return lax.fori_loop(0, passes, step, carry)


def padding(rows: Sequences) -> Metrics:
    """``padding``: columns that hold no token, of all columns."""
    return {"padding": (jnp.sum(rows.segments == 0, dtype=jnp.float32), jnp.float32(rows.segments.size))}


def write_pass(whole: Array, i: Any, part: Array, layout: Layout | None) -> Array:
    """``whole`` [M, …] with the rows of pass ``i`` replaced by ``part``: undoes the split of ``over_passes``."""
    grid = whole.reshape(*_grid(len(whole), len(part), batch_shards(layout)), *whole.shape[1:])
    part = part.reshape(grid.shape[0], *grid.shape[2:])
    return lax.dynamic_update_index_in_dim(grid, part, i, axis=1).reshape(whole.shape)


def _grid(rows: int, micro_batch: int, shards: int) -> tuple[int, int, int]:
    """Rows of a shard lie together: [shards, passes, rows of a pass and shard]."""
    if rows % micro_batch or micro_batch % shards:
        raise InputError(
            f"micro_batch = {micro_batch}: must divide the {rows} rows of a batch and be a multiple of the {shards} "
            "batch shards (mesh.data × mesh.fsdp)."
        )
    return shards, rows // micro_batch, micro_batch // shards
