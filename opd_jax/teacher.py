"""Frozen teachers: their hidden states at the student's response positions, which meet the loss chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.states import response_states
from opd_jax.types import Params, Rollouts, Scores


def make_score(
    config: DecoderConfig, *, dtype: Any = jnp.float32, layout: Layout | None = None
) -> Callable[[Params, Rollouts], Scores]:
    """Builds ``score(teacher_params, rollouts) → Scores``, jitted; the loss sends no gradient to the teacher."""

    @jax.jit
    def hidden(params: Params, rollouts: Rollouts) -> Array:
        return response_states(params, config, rollouts, dtype=dtype, layout=layout)

    # the head joins outside: a jitted function that returns an argument returns a copy of it
    return lambda params, rollouts: Scores(hidden=hidden(params, rollouts), head=head(params))
