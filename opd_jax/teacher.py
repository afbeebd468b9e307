"""Frozen teachers: their hidden states at the student's response positions, which meet the loss chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.states import response_states
from opd_jax.types import Params, Rollouts, Scores


def make_score(config: DecoderConfig, *, dtype: Any, layout: Layout | None) -> Callable[[Params, Rollouts], Scores]:
    """Builds the jitted ``score(teacher_params, rollouts) → Scores``; no gradient reaches the teacher."""

    def score(params: Params, rollouts: Rollouts) -> Scores:
        hidden = response_states(params, config, rollouts, dtype=dtype, layout=layout)
        return jax.lax.stop_gradient(Scores(hidden=hidden, head=head(params)))

    return jax.jit(score)
