"""Ragged sequences in rows of one width: several to a row, filled first-fit-decreasing, and rows in passes.

A batch of B sequences has B rows whatever their lengths, so nothing compiles twice. Packing leaves most of them empty,
and a pass over rows that hold nothing does not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from opd_jax.errors import InputError
from opd_jax.mesh import Layout, batch_shards, own_rows, shard_holders
from opd_jax.types import Metrics, Prompts, Rollouts, Sequences


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
    P = rollouts.prompts.tokens.shape[1]
    prompt_lengths, lengths = np.asarray(rollouts.prompts.lengths), np.asarray(rollouts.lengths)
    prompt_tokens, tokens = np.asarray(rollouts.prompts.tokens), np.asarray(rollouts.tokens)

    def text(i: int) -> tuple[np.ndarray, np.ndarray]:
        return prompt_tokens[i, P - prompt_lengths[i] :], tokens[i, : lengths[i]]

    shapes = _shapes(rollouts, P)
    return _fill(shapes, prompt_lengths, lengths, text, _behaviour(rollouts), separate, multiple, layout)


def pack_beside(
    rollouts: Rollouts,
    contexts: Sequence[Sequence[int]],
    longest: int,
    *,
    separate: bool = False,
    multiple: int = 1,
    layout: Layout | None = None,
) -> tuple[Sequences, Sequences, np.ndarray]:
    """Rollouts as in ``pack``, the same responses behind other prompts, and of each response token's column in the
    former rows its column in the latter, [M, T]; a sequence stands in the same row of both.

    Args:
        contexts: of each sequence its other prompt, of at most ``longest`` tokens.

    Raises:
        InputError: a context that is empty or too long.
    """
    P = rollouts.prompts.tokens.shape[1]
    prompt_lengths, lengths = np.asarray(rollouts.prompts.lengths), np.asarray(rollouts.lengths)
    context_lengths = np.array([len(c) for c in contexts])
    room = np.maximum(prompt_lengths, context_lengths) + lengths - 1
    prompt_tokens, tokens = np.asarray(rollouts.prompts.tokens), np.asarray(rollouts.tokens)

    def own(i: int) -> tuple[np.ndarray, np.ndarray]:
        return prompt_tokens[i, P - prompt_lengths[i] :], tokens[i, : lengths[i]]

    def other(i: int) -> tuple[Any, np.ndarray]:
        return contexts[i], tokens[i, : lengths[i]]

    shapes, behaviour = _shapes(rollouts, max(P, longest)), _behaviour(rollouts)
    rows = _fill(shapes, prompt_lengths, lengths, own, behaviour, separate, multiple, layout, room)
    beside = _fill(shapes, context_lengths, lengths, other, behaviour, separate, multiple, layout, room)
    shift = np.where(rows.mask, (context_lengths - prompt_lengths)[rows.segments - 1], 0)
    return rows, beside, (np.arange(rows.tokens.shape[1]) + shift).astype(np.int32)


def _shapes(rollouts: Rollouts, longest_prompt: int) -> Sequences:
    _, R, k = rollouts.topk_ids.shape
    return sequence_shapes(0, longest_prompt, R, k, rollouts.advantage is not None)


def _behaviour(rollouts: Rollouts) -> dict[str, np.ndarray]:
    """What a rollout has at each token of its response."""
    found = {"logp": np.asarray(rollouts.logp), "topk_ids": np.asarray(rollouts.topk_ids)}
    if rollouts.advantage is not None:
        found["advantage"] = np.broadcast_to(np.asarray(rollouts.advantage)[:, None], rollouts.tokens.shape)
    return found


def join_texts(
    rollouts: Rollouts | None,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    max_prompt: int,
    max_response: int,
    layout: Layout | None = None,
) -> Rollouts:
    """Rollouts and (prompt, response) pairs of a corpus in one batch, evenly mixed: every batch shard, and each part
    that ``split`` makes, has its share of both."""
    n = len(texts)
    prompts = Prompts(
        tokens=np.zeros((n, max_prompt), np.int32),  # pyright: ignore[reportArgumentType]
        lengths=np.array([len(p) for p, _ in texts], np.int32),  # pyright: ignore[reportArgumentType]
        ids=np.zeros(n, np.uint32),  # pyright: ignore[reportArgumentType]
        samples=np.zeros(n, np.uint32),  # pyright: ignore[reportArgumentType]
    )
    tokens = np.zeros((n, max_response), np.int32)
    for i, (prompt, response) in enumerate(texts):
        prompts.tokens[i, max_prompt - len(prompt) :] = prompt  # pyright: ignore[reportIndexIssue]
        tokens[i, : len(response)] = response
    k = 0 if rollouts is None else rollouts.topk_ids.shape[2]
    zeros = np.zeros((n, max_response), np.float32)
    lists = np.zeros((n, max_response, k), np.float32)
    lengths = np.array([len(r) for _, r in texts], np.int32)
    ended, fixed = np.ones((2, n), bool)
    made: Any = (prompts, tokens, lengths, ended, zeros, zeros, lists.astype(np.int32), lists, None, fixed)
    if rollouts is None:
        return Rollouts(*made)
    sampled = dataclasses.replace(rollouts, fixed=np.zeros(len(rollouts.lengths), bool))  # pyright: ignore
    shards = batch_shards(layout)
    share = len(rollouts.lengths) // shards, n // shards
    order = np.argsort(np.concatenate([(np.arange(m) + 0.5) / max(m, 1) for m in share]), kind="stable")

    def both(a: Any, b: Any) -> np.ndarray:
        parts = [np.asarray(x).reshape(shards, -1, *x.shape[1:]) for x in (a, b)]
        return np.concatenate(parts, axis=1)[:, order].reshape(-1, *a.shape[1:])

    return jax.tree.map(both, sampled, Rollouts(*made))


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
    room: np.ndarray | None = None,
) -> Sequences:
    """``room``: columns to keep for each sequence, where it is to have more than it uses."""
    width, used = shapes.tokens.shape[1], prompt_lengths + lengths - 1
    room = used if room is None else room
    if not len(used) or prompt_lengths.min() < 1 or lengths.min() < 1 or room.max() > width:
        raise InputError(f"sequences to pack: expected at least one, each with a prompt and a response, of ≤ {width}")
    rows = -(-len(used) // multiple) * multiple
    if layout:
        layout.check("sequences to pack", (len(used),), ("batch",))
        layout.check("rows to pack into", (rows,), ("batch",))
    owners = _owners(layout)
    mine = own_rows(layout, len(owners))
    row_B, start_B = place(room, width, rows, owners, separate)
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
    used = jnp.any(held, axis=(0, 2))
    order = jnp.argsort(~used, stable=True)

    def take(i: Array, x: Array) -> Array:
        grid = x.reshape(*_grid(M, micro_batch, shards), *x.shape[1:])
        return lax.dynamic_index_in_dim(grid, i, axis=1, keepdims=False).reshape(micro_batch, *x.shape[1:])

    def step(n: Array, carry: Any) -> Any:
        i = order[n]
        return body(carry, i, *jax.tree.map(lambda x: take(i, x), (rows, *more)))

    return lax.fori_loop(0, jnp.sum(used), step, carry)


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
