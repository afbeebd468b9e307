"""What teachers say about a batch of rollouts: one or several, with their own prompts, moving, extrapolated, cached.

Targets that are linear in logits are one teacher with a wider hidden state: the states of several networks side by
side, and their heads side by side, give the sum of their logits. So the losses know one teacher only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from opd_jax.config import Config
from opd_jax.data.pipeline import Tokens
from opd_jax.data.sources import Record
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig
from opd_jax.sampling.packing import pack, pack_beside
from opd_jax.teacher import read_only
from opd_jax.training.score_cache import ScoreCache
from opd_jax.types import Params, Rollouts, Scores, Sequences


@dataclasses.dataclass(frozen=True)
class Network:
    """A model on the mesh."""

    params: Params
    config: DecoderConfig


@dataclasses.dataclass(frozen=True)
class Teaching:
    """The teachers of a run, and who teaches what.

    teachers: in the order of the configuration; ``start``: the student before the run, where targets are extrapolated.
    route: of each record the index of its teacher. contexts: of each record its teacher's own prompt.
    """

    config: Config
    layout: Layout
    teachers: tuple[Network, ...]
    start: Network | None
    route: np.ndarray
    contexts: Sequence[Tokens] | None
    score: Callable[[DecoderConfig], Callable[[Params, Sequences], Scores]]
    packing: dict[str, Any]
    cache: ScoreCache | None

    def pack(self, rollouts: Rollouts) -> tuple[Sequences, Sequences, np.ndarray | None]:
        """Rows for the student, rows for the teachers, and for each column of the former its column in the latter
        (None: the same)."""
        if self.contexts is None:
            rows = pack(rollouts, **self.packing)
            return rows, rows, None
        own = [self.contexts[i] for i in np.asarray(rollouts.prompts.ids).tolist()]
        return pack_beside(rollouts, own, longest_context(self.config), **self.packing)

    def scores(
        self,
        moving: Params,
        rollouts: Rollouts,
        rows: Sequences,
        teacher: Sequences,
        columns: np.ndarray | None,
    ) -> Scores:
        """What the loss meets: hidden states at the student's columns, and a head.

        Args:
            rows: the student's, on the mesh; ``teacher`` and ``columns`` as ``pack`` made them, on the host.
        """
        only = self.teachers[0]
        if len(self.teachers) == 1 and not (self.start or self.cache) and columns is None:
            scores = self.score(only.config)(moving or only.params, rows)
            # the update donates ``moving``, and reads the head
            return Scores(scores.hidden, jnp.copy(scores.head)) if moving else scores
        teacher = read_only(teacher)
        route_M = self._route(rollouts, teacher)
        parts = []
        for i, network in enumerate(self.teachers):
            params = moving if i == 0 and moving else network.params
            own = teacher if len(self.teachers) == 1 else _only(teacher, route_M == i)
            if self.cache:
                scores = self._cached(self.cache, network, rollouts, own)
            else:
                scores = self.score(network.config)(params, self.layout.put_rows(own))
            parts.append((1.0, scores, route_M == i))
        if self.start:
            scale = self.config.objective.scale
            whole = self.score(self.start.config)(self.start.params, self.layout.put_rows(teacher))
            parts = [(scale, scores, mine) for _, scores, mine in parts] + [(1 - scale, whole, route_M >= 0)]
        if len(parts) == 1 and columns is None:
            return parts[0][1]
        weights = [self.layout.put_rows(np.where(mine, np.float32(w), np.float32(0))) for w, _, mine in parts]
        moved = None if columns is None else self.layout.put_rows(columns)
        hidden = _side_by_side([scores.hidden for _, scores, _ in parts], weights, moved)
        return Scores(hidden, _one_head([scores.head for _, scores, _ in parts]))

    def _cached(self, cache: ScoreCache, network: Network, rollouts: Rollouts, rows: Sequences) -> Scores:
        keys = cache.keys(rollouts)
        known_B, kept = cache.load(keys, rows, network.config.width)
        known = np.where(rows.segments > 0, known_B[rows.segments - 1], False)
        live = self.score(network.config)(network.params, self.layout.put_rows(_only(rows, ~known)))
        hidden = live.hidden
        if known_B.any():
            hidden = _known(self.layout.put_rows(known), self.layout.put_rows(kept), hidden)
        new = [None if there else key for key, there in zip(keys, known_B, strict=True)]
        if any(new):
            cache.store(new, rows, jax.device_get(hidden))
        return live.replace(hidden=hidden)  # pyright: ignore[reportAttributeAccessIssue]

    def weigh(self, rollouts: Rollouts, rows: Sequences) -> Sequences:
        """Rows whose position weights are multiplied by those of their teachers."""
        weights = np.array([t.weight for t in teachers_of(self.config)], np.float32)
        if np.all(weights == 1):
            return rows
        of_token = np.where(rows.mask, weights[self._route(rollouts, rows)], np.float32(0))
        return rows.replace(weight=of_token if rows.weight is None else of_token * rows.weight)  # pyright: ignore

    def _route(self, rollouts: Rollouts, rows: Sequences) -> np.ndarray:
        """[M, T] index of the teacher of each token; -1: padding."""
        of_sequence = self.route[np.asarray(rollouts.prompts.ids)]
        return np.where(rows.segments > 0, of_sequence[rows.segments - 1], -1)


def teachers_of(config: Config) -> list[Any]:
    """All ``Teacher`` sections."""
    return [config.teacher, *config.more_teachers] if config.teacher else []


def longest_context(config: Config) -> int:
    """Tokens that the teachers' own prompts may have."""
    longest = config.data.max_prompt
    return max(t.max_context or 2 * longest if t.context else longest for t in teachers_of(config))


def routes(config: Config, records: Sequence[Record]) -> np.ndarray:
    """Of each record the index of the teacher that names its source; 0, the first, where none does."""
    named = {source: i for i, t in enumerate(teachers_of(config)) for source in t.sources}
    return np.array([named.get(record.source, 0) for record in records])


def _only(rows: Sequences, own_MT: np.ndarray) -> Sequences:
    """Rows without the sequences of others; a pass that then holds none does not run."""
    return rows.replace(segments=np.where(own_MT, rows.segments, 0))  # pyright: ignore[reportAttributeAccessIssue]


@jax.jit
def _known(known_MT: Array, kept: Array, live: Array) -> Array:
    return jnp.where(known_MT[..., None], kept, live)


@jax.jit
def _one_head(heads: list[Array]) -> Array:
    rows = min(len(head) for head in heads)  # all cover the tokenizer
    return jnp.concatenate([head[:rows] for head in heads], axis=1)


@jax.jit
def _side_by_side(hidden: list[Array], weights_MT: list[Array], columns_MT: Array | None) -> Array:
    parts = []
    for h, w in zip(hidden, weights_MT, strict=True):
        # where, not times: what a network says of others' columns may be anything
        part = jnp.where(w[..., None] != 0, h * w[..., None], 0).astype(h.dtype)
        parts.append(part if columns_MT is None else jnp.take_along_axis(part, columns_MT[..., None], axis=1))
    return jnp.concatenate(parts, axis=-1)
