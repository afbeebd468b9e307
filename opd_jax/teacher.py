"""Frozen teachers: their hidden states at every column of the student's rows, which meet the loss chunk by chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from opd_jax.mesh import Layout, constrain
from opd_jax.models.decoder import ACTIVATION, DecoderConfig, head
from opd_jax.sampling.packing import over_passes, write_pass
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Params, Scores, Sequences


@functools.lru_cache(maxsize=8)  # runs of one process share what is compiled
def make_score(
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    layout: Layout | None = None,
    micro_batch: int | None = None,
) -> Callable[[Params, Sequences], Scores]:
    """Builds ``score(teacher_params, rows) → Scores``, jitted, in passes of ``micro_batch`` rows (None: all at once).

    The loss sends no gradient to the teacher.
    """

    @jax.jit
    def hidden(params: Params, rows: Sequences) -> Array:
        def score(whole: Array, i: Any, part: Sequences) -> Array:
            return write_pass(whole, i, hidden_states(params, config, part, dtype=dtype, layout=layout), layout)

        nothing = constrain(jnp.zeros((*rows.tokens.shape, config.width), dtype), ACTIVATION, layout)
        return over_passes(score, nothing, rows, micro_batch=micro_batch, layout=layout)

    # the head joins outside: a jitted function that returns an argument returns a copy of it
    return lambda params, rows: Scores(hidden=hidden(params, read_only(rows)), head=head(params))


def read_only(rows: Sequences) -> Sequences:
    """Rows without what only the student's loss reads: nothing of that is moved or compiled for a teacher."""
    bare: dict[str, None] = dict.fromkeys(("logp", "topk_ids", "weight", "advantage"))
    return rows.replace(**bare)  # pyright: ignore[reportAttributeAccessIssue]
