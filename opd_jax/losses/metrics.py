"""What distillation does to the student, measured at each position from the same logits as the loss (paper §2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from opd_jax.losses.reference import FILL
from opd_jax.losses.supports import contains
from opd_jax.types import Metrics

BY_POSITION = ("overlap_ratio", "entropy_gap", "student_entropy", "teacher_entropy", "reverse_kl")


def token_metrics(
    s_CV: Float[Array, "C V"], t_CV: Float[Array, "C V"], ids_p: Int[Array, "C k"], ids_q: Int[Array, "C k"]
) -> dict[str, Array]:
    """Every metric at each position, from logits at temperature 1 and both top-k lists (Eqs. 6-10, App. B.2).

    Entropies and divergences in nats. ``overlap_advantage`` is 0 where the lists share no id: Eq. 7 has no value there.
    """
    lse_s, lse_t = jax.nn.logsumexp(s_CV, -1, keepdims=True), jax.nn.logsumexp(t_CV, -1, keepdims=True)
    logp_CV, logq_CV = s_CV - lse_s, t_CV - lse_t
    p_CV, q_CV = jnp.exp(logp_CV), jnp.exp(logq_CV)
    entropy_p, entropy_q = -(p_CV * logp_CV).sum(-1), -(q_CV * logq_CV).sum(-1)

    logp, logq = jnp.take_along_axis(s_CV, ids_p, -1) - lse_s, jnp.take_along_axis(t_CV, ids_p, -1) - lse_t
    shared = contains(ids_q, ids_p)
    size = shared.sum(-1)
    logp_I = jax.nn.log_softmax(jnp.where(shared, logp, FILL))
    logq_I = jax.nn.log_softmax(jnp.where(shared, logq, FILL))
    advantage_I = (jnp.exp(logp_I) * (logq_I - logp_I)).sum(-1) / jnp.maximum(size, 1)

    advantage = jax.nn.softmax(logp) * (logq - logp)
    extreme = jnp.abs(advantage).argmax(-1, keepdims=True)
    gap = jnp.take_along_axis(jnp.exp(logp) - jnp.exp(logq), extreme, -1)[..., 0]
    return {
        "overlap_ratio": shared.mean(-1, dtype=logp.dtype),
        "overlap_advantage": advantage_I,
        "entropy_gap": jnp.abs(entropy_q - entropy_p),
        "student_entropy": entropy_p,
        "teacher_entropy": entropy_q,
        "overlap_mass_student": jnp.where(shared, jnp.exp(logp), 0).sum(-1),
        "overlap_mass_teacher": jnp.where(shared, jnp.exp(logq), 0).sum(-1),
        "reverse_kl": (p_CV * (logp_CV - logq_CV)).sum(-1),
        "forward_kl": (q_CV * (logq_CV - logp_CV)).sum(-1),
        "extreme_advantage_gap": gap,
        "argmax_agreement": (ids_p[..., 0] == ids_q[..., 0]).astype(logp.dtype),
    }


def reduce_metrics(values_BT: dict[str, Array], mask_BT: Array, bins: int) -> Metrics:
    """(sum, count) of each metric over the mask, and ``NAME_by_position`` over equal bins of the T positions."""
    steps = mask_BT.shape[1]
    bin_T = np.arange(steps) * bins // steps
    metrics: Metrics = {}
    for name, value_BT in values_BT.items():
        keep_BT = mask_BT & (values_BT["overlap_ratio"] > 0) if name == "overlap_advantage" else mask_BT
        sum_T = jnp.where(keep_BT, value_BT, 0).sum(0)
        count_T = keep_BT.sum(0, dtype=sum_T.dtype)
        metrics[name] = (sum_T.sum(), count_T.sum())
        if name in BY_POSITION:
            zero = jnp.zeros(bins, sum_T.dtype)
            metrics[f"{name}_by_position"] = (zero.at[bin_T].add(sum_T), zero.at[bin_T].add(count_T))
    return metrics
