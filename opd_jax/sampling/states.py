"""Teacher-forced passes over sequences: the hidden state at every column of every row."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, forward
from opd_jax.types import Params, Sequences


def hidden_states(
    params: Params,
    config: DecoderConfig,
    rows: Sequences,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    layout: Layout | None = None,
    kernel: bool = True,
) -> Float[Array, "M T D"]:
    """Hidden states of one forward pass; the state at [m, t] predicts ``rows.targets[m, t]``."""
    return forward(
        params, config, rows.tokens, rows.positions, rows.segments,
        dtype=dtype, remat=remat, layout=layout, kernel=kernel,
    )  # fmt: skip
