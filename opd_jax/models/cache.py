"""The key/value cache of a batch of rows: one array per layer, so that the decode loop updates it in place.

One array with layers as an axis is copied whole at every write by XLA on CPU (docs/decisions.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from opd_jax.mesh import Layout, constrain


@flax.struct.dataclass
class Cache:
    k: tuple[Array, ...]  # per layer [B, K, S, H]
    v: tuple[Array, ...]  # per layer [B, K, S, H]
    positions: Array  # [B, S] int32, rotary position of each column
    segments: Array  # [B, S] int32, 0: empty or padding

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        columns: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        layout: Layout | None = None,
    ) -> Cache:
        def zeros() -> tuple[Array, ...]:
            shape, axes = (rows, kv_heads, columns, head_dim), ("batch", "kv_heads", None, None)
            return tuple(constrain(jnp.zeros(shape, dtype), axes, layout) for _ in range(layers))

        positions, segments = (jnp.zeros((rows, columns), jnp.int32) for _ in range(2))  # apart: they are donated
        return cls(zeros(), zeros(), positions, segments)

    def write(self, layer: int, column: int | Array, k: Array, v: Array) -> Cache:
        """Writes [B, K, T, H] keys and values of one layer at columns column … column + T − 1."""

        def put(arrays: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
            old = arrays[layer]
            updated = jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, 0, column, 0))
            return (*arrays[:layer], updated, *arrays[layer + 1 :])

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def mark(self, column: int | Array, positions: Array, segments: Array) -> Cache:
        """Records positions and segments [B, T] of columns just filled."""
        update = jax.lax.dynamic_update_slice
        return dataclasses.replace(
            self,
            positions=update(self.positions, positions.astype(jnp.int32), (0, column)),
            segments=update(self.segments, segments.astype(jnp.int32), (0, column)),
        )
