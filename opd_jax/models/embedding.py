"""The embedding of tokens where the table lies in parts on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from opd_jax.mesh import Layout


def embed(
    table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: Any, layout: Layout | None
) -> Float[Array, "B T D"]:
    """table[tokens] in ``dtype``; the gradient of the table is summed in the table's own.

    Where rows and width are cut over the same axis, each device looks up its columns for all rows of the axis and swaps
    them for all columns of its own rows; the gradient goes back the same way. Left to the compiler, the gradient
    gathers the activations of all rows on every device, which grows with the mesh.
    """
    table = dict(layout.table) if layout else {}
    width, vocab = table.get("embed", ()), table.get("vocab", ())
    if layout is None or layout.mesh.size == 1 or not width or not set(width) <= set(table["batch"]):
        return table_VD[tokens_BT].astype(dtype)

    def local(table_VD: Array, tokens_BT: Array) -> Array:
        tokens = lax.all_gather(tokens_BT, width, tiled=True)
        first = lax.axis_index(vocab) * table_VD.shape[0]
        here = (tokens >= first) & (tokens < first + table_VD.shape[0])
        rows = table_VD[jnp.where(here, tokens - first, 0)].astype(dtype)
        rows = jnp.where(here[..., None], rows, 0)
        return lax.psum(lax.all_to_all(rows, width, split_axis=0, concat_axis=2, tiled=True), vocab)

    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec(("vocab", "embed")), layout.spec(("batch", None))),
        out_specs=layout.spec(("batch", None, None)),
        check_vma=False,
    )(table_VD, tokens_BT)
