"""On-policy distillation: the divergence of student and teacher on the student's own rollouts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from opd_jax.config import Objective
from opd_jax.losses import distillation_loss
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.packing import padding
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Metrics, Params, Scores, Sequences


def opd_loss(
    params: Params,
    rows: Sequences,
    scores: Scores,
    *,
    config: DecoderConfig,
    objective: Objective,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    remat: str = "none",
    metrics: bool = True,
    metric_k: int | None = None,
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """((loss sum, response-token count), metrics) of rows of rollouts; divide once, globally (paper, Eqs. 3–5).

    ``objective.weight`` · divergence, and where rows have an ``advantage`` its policy-gradient loss (paper §7).
    """
    hidden = hidden_states(params, config, rows, dtype=dtype, remat=remat, layout=layout)
    beta = objective.weight
    (loss, count), measured = distillation_loss(
        hidden,
        head(params),
        scores.hidden,
        scores.head,
        rows.targets,
        rows.mask,
        objective,
        vocab_size=vocab_size,
        topk_ids=rows.topk_ids,
        behaviour_logp=rows.logp if objective.correction != "none" else None,
        metrics=metrics,
        metric_k=metric_k or objective.k,
        advantages=None if rows.advantage is None else rows.advantage / beta,
        weights=rows.weight,
        depth=rows.depth,
        steps=rows.max_response,
        layout=layout,
    )
    return (beta * loss, count), measured | padding(rows)
