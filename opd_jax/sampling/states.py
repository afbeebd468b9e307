"""Teacher-forced passes over rollouts: the hidden state behind every response token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, forward
from opd_jax.types import Params, Rollouts


def response_mask(rollouts: Rollouts) -> Bool[Array, "B R"]:
    """True at response tokens, end-of-sequence included."""
    return jnp.arange(rollouts.tokens.shape[1]) < rollouts.lengths[:, None]


def response_states(
    params: Params,
    config: DecoderConfig,
    rollouts: Rollouts,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    layout: Layout | None = None,
) -> Float[Array, "B R D"]:
    """Hidden states of one forward pass over prompt and response; the state at r predicts ``rollouts.tokens[:, r]``."""
    P, R = rollouts.prompts.tokens.shape[1], rollouts.tokens.shape[1]
    # the last response token predicts nothing that is trained: leave its column out
    tokens = jnp.concatenate([rollouts.prompts.tokens, rollouts.tokens[:, :-1]], axis=1)
    columns = jnp.arange(P + R - 1) - (P - rollouts.prompts.lengths[:, None])
    ends = (rollouts.prompts.lengths + rollouts.lengths)[:, None]
    segments = ((columns >= 0) & (columns < ends)).astype(jnp.int32)
    positions = jnp.maximum(columns, 0)
    hidden = forward(params, config, tokens, positions, segments, dtype=dtype, remat=remat, layout=layout)
    return hidden[:, P - 1 :]
