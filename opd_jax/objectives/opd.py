"""On-policy distillation: the divergence of student and teacher on the student's own rollouts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from opd_jax.config import Objective
from opd_jax.losses import distillation_loss
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.states import response_mask, response_states
from opd_jax.types import Metrics, Params, Rollouts, Scores


def opd_loss(
    params: Params,
    rollouts: Rollouts,
    scores: Scores,
    *,
    config: DecoderConfig,
    objective: Objective,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    metrics: bool = True,
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """((loss sum, response-token count), metrics) of a batch of rollouts; divide once, globally (paper, Eqs. 3–5)."""
    hidden = response_states(params, config, rollouts, dtype=dtype, remat=remat, layout=layout)
    return distillation_loss(
        hidden,
        head(params),
        scores.hidden,
        scores.head,
        rollouts.tokens,
        response_mask(rollouts),
        objective,
        vocab_size=vocab_size,
        topk_ids=rollouts.topk_ids,
        behaviour_logp=rollouts.logp if objective.correction != "none" else None,
        metrics=metrics,
        metric_k=objective.k,
        layout=layout,
    )
