"""Parameter gradients of single tokens, as far as their inner products tell: exactly, or through random projections.

The loss of a token has one gradient δ in its logits; the gradient in the parameters θ is that of ⟨δ, z(θ)⟩ with δ held
fixed, whatever the objective. Exact gradients take one backward pass a token. A projection g · v on a direction v of
random signs is a derivative along v, which one pass gives for all tokens of a batch at once; m directions give every
norm with a relative error of 1/√(2m).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from opd_jax.config import Objective
from opd_jax.errors import InputError
from opd_jax.losses.reference import reference_token_loss
from opd_jax.losses.supports import contains
from opd_jax.models.decoder import DecoderConfig, head, parameter_specs
from opd_jax.models.top_k import top_k
from opd_jax.sampling.packing import pack
from opd_jax.sampling.states import hidden_states
from opd_jax.tracking.console import console
from opd_jax.types import Params, Rollouts, Sequences

DRAWS = 4  # fresh tokens at each state, for the noise of ``sampled``
FULL, SAMPLED = "full", "sampled"
VARIANTS = {
    FULL: Objective(),
    SAMPLED: Objective(name="sampled"),
    "topk k=1": Objective(name="topk", k=1),
    "topk k=4": Objective(name="topk", k=4),
    "topk k=16": Objective(name="topk", k=16),
    "topk k=1 tail": Objective(name="topk", tail=True, k=1),
    "topk k=16 tail": Objective(name="topk", tail=True, k=16),
    "topk_reference k=1": Objective(name="topk_reference", k=1),
    "topk_reference k=16": Objective(name="topk_reference", k=16),
    "topk k=16 teacher": Objective(name="topk", support="teacher", k=16),
    "topk k=16 overlap": Objective(name="topk", support="overlap", k=16),
    "topk k=16 union": Objective(name="topk", support="union", k=16),
}
CLASSES = ("overlap", "student only", "outside")  # of the sampled token: in S_p ∩ S_q, S_p \ S_q, not in S_p
DIRECTIONS = 1024
NO_GRADIENT = 1e-5  # mean norm of the full KL's gradient in the logits of a state: what float32 rounds
_GROUP = 2**28  # numbers of one group of exact gradients, 1 GiB
_GROUPS = 8  # passes over all tokens from which projections are taken instead
_AT_ONCE = 2**26  # numbers of gradients, or directions, that exist on the device at once
_LOGITS = 2**28  # numbers of logit gradients of a batch
_COLUMNS = 2048  # of the rows of a batch of projections, of a block of inner products
_BLOCK = 32  # directions of one call


class States(NamedTuple):
    """Tokens of rollouts that are looked at, in the order of their sequences."""

    sequence: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]  # in the response
    problem: Int[np.ndarray, " n"]

    @property
    def sequences(self) -> int:
        return int(self.sequence.max()) + 1


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Inner products of the gradients of n tokens and of the S sequences that they belong to."""

    states: States
    token: Float[np.ndarray, "n n"]  # of the full KL
    sums: Float[np.ndarray, "variants S variants S"]  # of the sequences' sums
    squares: Float[np.ndarray, "variants n"]  # ‖g‖² of each token
    distances: Float[np.ndarray, "variants n"]  # ‖g − g of full‖²; of sampled the mean over the draws
    classes: Int[np.ndarray, " n"]
    logit_norm: float  # mean ‖δ‖ of the full KL
    directions: int | None  # None: exact


def choose_states(lengths: Int[np.ndarray, " S"], tokens: int, samples: int) -> States:
    """At most ``tokens`` response tokens: one at random of each of as many equal stretches of all rollouts in a row."""
    total = int(lengths.sum())
    edges = np.linspace(0, total, min(tokens, total) + 1).astype(int)
    chosen = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    return States(sequence[chosen], position[chosen], sequence[chosen] // samples)


class Batch(NamedTuple):
    """Rows of one sequence each, and the states among them; what is not ``held`` only fills up."""

    rows: Sequences  # [B, T]
    at: tuple[np.ndarray, np.ndarray]  # row and column of each state
    held: np.ndarray  # [C] bool
    states: np.ndarray  # [C] index among all
    first: int  # sequence


class Both(NamedTuple):
    """What every pass is compiled for."""

    student: DecoderConfig
    teacher: DecoderConfig
    vocab_size: int
    k: int  # of the lists that class a token
    variants: tuple[tuple[str, Objective], ...]

    @property
    def rows(self) -> int:
        """Gradients at each state: ``sampled`` has several."""
        return len(self.variants) + (DRAWS - 1) * any(name == SAMPLED for name, _ in self.variants)


def token_gradients(
    both: Both,
    student: Params,
    teacher: Params,
    rollouts: Rollouts,
    states: States,
    *,
    seed: int = 0,
    directions: int | None = None,
    title: str = "gradients",
) -> Gradients:
    """Gradients of the tokens ``states`` of rollouts, on one device, in the precision of the weights.

    Args:
        directions: random directions to project on; 0: exact gradients; None: exact if the model is small, which is
            if groups of 2²⁸ numbers, at most 8, hold the gradients, else 1,024.
    """
    width, parts = len(both.variants), _leaf_groups(both.student, _stored(both, states), directions)
    batches = _batches(both, rollouts, states, parts)
    directions = None if parts else directions or DIRECTIONS
    calls = len(parts) * len(batches) if parts else len(batches) * math.ceil((directions or 0) / _BLOCK)
    n, S = len(states.sequence), states.sequences
    token, sums = np.zeros((n, n)), np.zeros((width * S,) * 2)
    squares, distances = np.zeros((2, width, n))
    classes, logit_norm = np.zeros(n, int), 0.0
    at_states = functools.partial(_logit_gradients, both, student, teacher)
    of_tokens, of_directions = jax.random.split(jax.random.key(seed))
    for i, batch in enumerate(batches):
        delta, _, of_class = at_states(batch.rows, batch.at, jax.random.fold_in(of_tokens, i))
        classes[batch.states[batch.held]] = np.asarray(of_class)[batch.held]
        logit_norm += float(jnp.linalg.norm(delta[0], axis=-1)[batch.held].sum()) / n
    defined = logit_norm > NO_GRADIENT
    with console.progress(calls if defined else 0, title, unit="pass", show=()) as bar:
        for part in (parts or [None]) if defined else []:
            columns = sum(leaf.size for i, leaf in enumerate(jax.tree.leaves(student)) if part and i in part)
            stored = np.zeros((n + width * S, columns or directions or 0), np.float32)
            for i, batch in enumerate(batches):
                held, where = batch.held, batch.states[batch.held]
                delta, hidden, _ = at_states(batch.rows, batch.at, jax.random.fold_in(of_tokens, i))
                for start, found in _features(both, student, part, directions, of_directions, batch, delta, hidden):
                    reduced = _reduce(both, len(batch.rows.tokens), found, batch.at[0], held)
                    full, summed, of_squares, of_distances = jax.device_get(reduced)
                    at = slice(start, start + full.shape[-1])
                    stored[where, at] = full[held]
                    last = min(batch.first + summed.shape[1], S)
                    for v in range(width):
                        stored[n + v * S + batch.first : n + v * S + last, at] += summed[v, : last - batch.first]
                    squares[:, where] += of_squares[:, held]
                    distances[:, where] += of_distances[:, held]
                    bar.advance()
            token += stored[:n] @ stored[:n].T
            sums += inner_products(stored[n:])
    of_sums = sums.reshape(width, S, width, S)
    return Gradients(states, token, of_sums, squares, distances, classes, logit_norm, directions)


def inner_products(rows: Float[np.ndarray, "S columns"]) -> Float[np.ndarray, "S S"]:
    """In float64, by blocks of columns: a bias is the difference of two that are nearly equal, and what float32 loses
    would make one of 0 seem 2e-4."""
    found = np.zeros((len(rows),) * 2)
    for start in range(0, rows.shape[1], _COLUMNS):
        block = rows[:, start : start + _COLUMNS].astype(np.float64)
        found += block @ block.T
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _reduce(both: Both, sequences: int, found: Array, row: Array, held: Array) -> tuple[Array, ...]:
    """Of gradients [K, C, columns]: those of the full KL, the sums over the states of each row, ‖g‖², distances."""
    found = jnp.where(held[:, None], found, 0)
    rows, distances, i = [], [], 0
    for name, _ in both.variants:
        draws = DRAWS if name == SAMPLED else 1
        rows.append(found[i])
        distances.append(((found[i : i + draws] - found[0]) ** 2).sum(-1).mean(0))
        i += draws
    of = jnp.stack(rows)
    member = (row == jnp.arange(sequences)[:, None]).astype(of.dtype)
    return of[0], jnp.einsum("sc,vcp->vsp", member, of), (of**2).sum(-1), jnp.stack(distances)


def _stored(both: Both, states: States) -> int:
    return len(states.sequence) + len(both.variants) * states.sequences


def check_exact(c: DecoderConfig, tokens: int, sequences: int) -> None:
    """Exact gradients of so many tokens and sequences fit in memory.

    Raises:
        InputError: those of the largest weight alone are beyond all that small models are given.
    """
    rows = tokens + len(VARIANTS) * sequences
    size = rows * max(math.prod(s.shape) for s in _specs(c))
    if size > _GROUPS * _GROUP:
        raise InputError(
            f"--directions 0: exact gradients of {tokens:,} tokens and {sequences:,} rollouts take "
            f"{size / 2**28:,.0f} GiB for the largest weight alone, more than {_GROUPS * _GROUP / 2**28:.0f}. "
            f"Take --directions {DIRECTIONS}, or fewer --tokens and rollouts."
        )


def _leaf_groups(c: DecoderConfig, rows: int, directions: int | None) -> list[set[int]]:
    """Weights whose exact gradients are held at the same time, by their place in the tree; []: take projections."""
    if directions:
        return []
    sizes = [math.prod(s.shape) for s in _specs(c)]
    groups: list[set[int]] = []
    room = 0
    for i, size in enumerate(sizes):
        if not groups or size * rows > room:
            groups.append(set())
            room = _GROUP
        groups[-1].add(i)
        room -= size * rows
    small = len(groups) <= _GROUPS and max(sizes) * rows <= _GROUP
    return groups if small or directions == 0 else []


def _batches(both: Both, rollouts: Rollouts, states: States, groups: Sequence[set[int]]) -> list[Batch]:
    """Exact: one sequence at a time, or a part of its states; projections: as many sequences as give ``_COLUMNS``."""
    host = pack(rollouts, separate=True)
    width = int((np.asarray(host.segments) > 0).sum(1).max())
    host = jax.tree.map(lambda x: np.asarray(x)[:, :width], host)
    of_row = [np.flatnonzero(states.sequence == s) for s in range(states.sequences)]
    most = max(len(x) for x in of_row)
    if groups:
        sizes = [math.prod(s.shape) for s in _specs(both.student)]
        weights = max(sum(sizes[i] for i in g) for g in groups)
        size, together = max(1, min(most, _AT_ONCE // (both.rows * weights))), 1
    else:
        size = max(1, _LOGITS // (both.rows * both.vocab_size))
        together = max(1, min(_COLUMNS // width, size // most))
        size = min(size, together * most)
    found = []
    for first in range(0, states.sequences, together):
        sequences = np.arange(first, min(first + together, states.sequences))
        rows = jax.tree.map(lambda x, s=sequences: x[np.resize(s, together)], host)
        among = np.concatenate([of_row[s] for s in sequences])
        for start in range(0, len(among), size):
            part = among[start : start + size]
            chosen, held = np.resize(part, size), np.arange(size) < len(part)
            row = states.sequence[chosen] - first
            begin = np.argmax(np.asarray(rows.depth) == 0, axis=1)[row]
            found.append(Batch(rows, (row, begin + states.position[chosen]), held, chosen, first))
    return found


def _specs(c: DecoderConfig) -> list[Any]:
    return jax.tree.leaves(parameter_specs(c), is_leaf=lambda x: hasattr(x, "shape"))


def _states(params: Params, c: DecoderConfig, rows: Sequences, at: tuple[Array, Array]) -> Float[Array, "C D"]:
    return hidden_states(params, c, rows, dtype=params["embed"].dtype, kernel=False)[at]


@functools.partial(jax.jit, static_argnums=0)
def _logit_gradients(
    both: Both, student: Params, teacher: Params, rows: Sequences, at: tuple[Array, Array], key: Array
) -> tuple[Float[Array, "K C V"], Float[Array, "C D"], Int[Array, " C"]]:
    """dloss/dlogits of every variant at each state (several draws of ``sampled``), the hidden states, the classes."""
    hidden = _states(student, both.student, rows, at)
    z = hidden @ head(student)[: both.vocab_size].T
    t = _states(teacher, both.teacher, rows, at) @ head(teacher)[: both.vocab_size].T
    drawn = jax.random.categorical(key, z, shape=(DRAWS, len(z)))

    def gradient(objective: Objective, tokens: Array) -> Array:
        return jax.grad(lambda z: reference_token_loss(z, t, tokens, objective).sum())(z)

    found = []
    for name, objective in both.variants:
        found += [gradient(objective, tokens) for tokens in drawn[: DRAWS if name == SAMPLED else 1]]
    in_p, in_q = (contains(top_k(x, both.k), rows.targets[at][:, None])[:, 0] for x in (z, t))
    return jnp.stack(found), hidden, jnp.where(in_p, jnp.where(in_q, 0, 1), 2)


def _features(
    both: Both, student: Params, part: set[int] | None, directions: int | None, key: Array, batch: Batch, delta: Array,
    hidden: Array,
) -> Iterator[tuple[int, Array]]:  # fmt: skip
    """(first column, [K, C, columns]) of the gradients of a batch."""
    if part is not None:
        yield 0, _exact(both.student, frozenset(part), student, batch.rows, batch.at, delta)
        return
    assert directions
    back = jnp.einsum("kcv,vd->kcd", delta, head(student)[: both.vocab_size])
    for start in range(0, directions, _BLOCK):
        numbers = jnp.arange(start, min(start + _BLOCK, directions))
        found = _projected(both.student, student, batch.rows, batch.at, delta, back, hidden, key, numbers)
        yield start, found / math.sqrt(directions)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _exact(
    c: DecoderConfig, part: frozenset[int], params: Params, rows: Sequences, at: tuple[Array, Array], delta: Array
) -> Float[Array, "K C P"]:
    leaves, tree = jax.tree.flatten(params)

    def products(chosen: list[Array]) -> Array:
        its = iter(chosen)
        own = tree.unflatten([next(its) if i in part else leaf for i, leaf in enumerate(leaves)])
        z = _states(own, c, rows, at) @ head(own)[: delta.shape[-1]].T
        return jnp.einsum("kcv,cv->kc", delta, z)

    chosen = [leaf for i, leaf in enumerate(leaves) if i in part]
    values, pull = jax.vjp(products, chosen)
    units = jnp.eye(values.size, dtype=values.dtype).reshape(-1, *values.shape)
    at_once = max(1, min(len(units), _AT_ONCE // sum(x.size for x in chosen)))
    found = lax.map(lambda u: jnp.concatenate([g.ravel() for g in pull(u)[0]]), units, batch_size=at_once)
    return found.reshape(*values.shape, -1)


@functools.partial(jax.jit, static_argnums=0)
def _projected(
    c: DecoderConfig, params: Params, rows: Sequences, at: tuple[Array, Array], delta: Array, back: Array,
    hidden: Array, key: Array, numbers: Array,
) -> Float[Array, "K C m"]:  # fmt: skip
    """⟨g, v⟩ = ⟨δ W, dh/dv⟩ + ⟨δ, V_W h⟩, W the head and V_W its part of v.

    dh/dv is the derivative of the backward pass, which is linear in its argument: products of the model have a rule
    for reverse mode alone.
    """
    states, pull = jax.vjp(lambda p: _states(p, c, rows, at), params)
    along = jax.vjp(lambda u: pull(u)[0], jnp.zeros_like(states))[1]
    leaves, tree = jax.tree.flatten(params)

    def project(number: Array) -> Array:
        keys = jax.random.split(jax.random.fold_in(key, number), len(leaves))
        v = tree.unflatten([random_signs(k, w) for k, w in zip(keys, leaves, strict=True)])
        of_head = jnp.einsum("kcv,cv->kc", delta, hidden @ head(v)[: delta.shape[-1]].T)
        return jnp.einsum("kcd,cd->kc", back, along(v)[0]) + of_head

    at_once = max(1, min(len(numbers), _AT_ONCE // (sum(w.size for w in leaves) + 8 * hidden.size * c.layers)))
    return jnp.moveaxis(lax.map(project, numbers, batch_size=at_once), 0, -1)


def random_signs(key: Array, like: Array) -> Array:
    """Random signs: a bit each, as random words would take longer to make than to use."""
    words = jax.random.bits(key, (-(-like.size // 32),), jnp.uint32)
    bits = (words[:, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (2 * bits.astype(like.dtype) - 1).ravel()[: like.size].reshape(like.shape)
