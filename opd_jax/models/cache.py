"""The key/value cache of a batch of rows: one array per tensor with layers as its first axis, updated in place."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from opd_jax.mesh import Layout, constrain


@flax.struct.dataclass
class Cache:
    k: Array  # [L, B, S, K, H]
    v: Array  # [L, B, S, K, H]
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
        shape = (layers, rows, columns, kv_heads, head_dim)
        axes = (None, "batch", None, "kv_heads", None)
        k, v = (constrain(jnp.zeros(shape, dtype), axes, layout) for _ in range(2))
        marks = jnp.zeros((rows, columns), jnp.int32)
        return cls(k, v, marks, marks)

    def write(self, layer: int, column: int | Array, k: Array, v: Array) -> Cache:
        """Writes [B, T, K, H] keys and values of one layer at columns column … column + T − 1."""
        at = (layer, 0, column, 0, 0)
        update = jax.lax.dynamic_update_slice
        return self.replace(
            k=update(self.k, k[None].astype(self.k.dtype), at), v=update(self.v, v[None].astype(self.v.dtype), at)
        )

    def mark(self, column: int | Array, positions: Array, segments: Array) -> Cache:
        """Records positions and segments [B, T] of columns just filled."""
        update = jax.lax.dynamic_update_slice
        return self.replace(
            positions=update(self.positions, positions.astype(jnp.int32), (0, column)),
            segments=update(self.segments, segments.astype(jnp.int32), (0, column)),
        )
