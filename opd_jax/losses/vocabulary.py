"""Logits and what is summed over them, where a mesh axis may hold the vocabulary in parts."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from opd_jax.losses.reference import FILL
from opd_jax.models.top_k import top_k


@flax.struct.dataclass
class Readout:
    """From products to logits: z = softcap · tanh(scale · (hidden · headᵀ + bias) / softcap), without cap if None."""

    bias: Array | None = None  # [V]
    scale: float = flax.struct.field(pytree_node=False, default=1.0)
    softcap: float | None = flax.struct.field(pytree_node=False, default=None)

    def __call__(self, products: Array) -> Array:
        z = products if self.bias is None else products + self.bias[: products.shape[-1]]
        z = z * self.scale if self.scale != 1 else z
        return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)

    def pull_back(self, dz: Array, z: Array) -> Array:
        """dloss/dproducts from dloss/dz at the logits z."""
        if self.softcap is not None:  # clipped: a padding id's logit is far outside of the cap
            dz = dz * (1 - (z / self.softcap).clip(-1, 1) ** 2)
        return dz * self.scale if self.scale != 1 else dz


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The columns of [C, V] logits that one shard holds. Every result is that of the whole vocabulary."""

    columns: int  # in this shard
    valid: int  # ids from here on carry no probability
    axes: tuple[str, ...] = ()  # mesh axes over which the columns are spread, in order; (): all are here

    def ids(self) -> Int[Array, "W"]:
        return self._first() + jnp.arange(self.columns)

    def sum(self, x: Array) -> Array:
        """The sum of the shards' partial results."""
        return lax.psum(x, self.axes) if self.axes else x

    def logsumexp(self, z_CW: Float[Array, "C W"]) -> Float[Array, "C"]:
        peak = z_CW.max(-1)
        if self.axes:
            peak = lax.pmax(peak, self.axes)
        return jnp.log(self.sum(jnp.exp(z_CW - peak[:, None]).sum(-1))) + peak

    def local(self, ids: Int[Array, "C k"]) -> tuple[Int[Array, "C k"], Array | bool]:
        """Columns of ``ids`` here (placeholders where they stand elsewhere), and which of them stand here."""
        if not self.axes:
            return ids, True
        column = ids - self._first()
        return column.clip(0, self.columns - 1), (column >= 0) & (column < self.columns)

    def take(self, z_CW: Float[Array, "C W"], ids: Int[Array, "C k"]) -> Float[Array, "C k"]:
        column, here = self.local(ids)
        return self.sum(jnp.where(here, jnp.take_along_axis(z_CW, column, -1), 0))

    def add_at(self, z_CW: Float[Array, "C W"], ids: Int[Array, "C k"], update: Float[Array, "C k"]) -> Array:
        """z with ``update`` added at ``ids``, repeated ids adding up."""
        column, here = self.local(ids)
        rows = jnp.arange(z_CW.shape[0])[:, None]
        return z_CW.at[rows, column].add(jnp.where(here, update, 0).astype(z_CW.dtype))

    def top_k(self, z_CW: Float[Array, "C W"], k: int) -> Int[Array, "C k"]:
        """Ids of the k largest logits, largest first, ties to the lowest id."""
        if not self.axes:
            return top_k(z_CW, k)
        # Shards come in the order of their ids, so merging breaks ties to the lowest id as well.
        column = top_k(z_CW, min(k, self.columns))
        best = jnp.take_along_axis(z_CW, column, -1)
        best, ids = (lax.all_gather(x, self.axes, axis=1, tiled=True) for x in (best, column + self._first()))
        return jnp.take_along_axis(ids, lax.top_k(best, k)[1], -1)

    def mask(self, z_CW: Float[Array, "C W"]) -> Float[Array, "C W"]:
        """z with padding ids excluded."""
        return jnp.where(self.ids() < self.valid, z_CW, FILL)

    def _first(self) -> Array | int:
        return lax.axis_index(self.axes) * self.columns if self.axes else 0
