"""What distillation does to the student, measured at each position from the same logits as the loss (paper §2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from opd_jax.losses.reference import FILL, kl_estimators
from opd_jax.losses.supports import contains
from opd_jax.losses.vocabulary import Vocabulary
from opd_jax.types import Metrics


def token_metrics(
    words: Vocabulary,
    s_CV: Float[Array, "C V"],
    t_CV: Float[Array, "C V"],
    ids_p: Int[Array, "C k"],
    ids_q: Int[Array, "C k"],
    tokens_C: Int[Array, "C"],
    k: int,
    lists: int = 0,
) -> dict[str, Array]:
    """Every metric at each position, from logits at temperature 1 and both top-k lists (Eqs. 6-10, App. B.2).

    Entropies and divergences in nats. ``overlap_advantage`` is 0 where the lists share no id: Eq. 7 has no value there.
    The lists may be longer than ``k``; ``lists``: see ``position_metrics``.
    """
    listed = (ids_p[:, :lists], ids_q[:, :lists]) if lists else ()
    ids_p, ids_q = ids_p[:, :k], ids_q[:, :k]
    lse_s, lse_t = words.logsumexp(s_CV)[:, None], words.logsumexp(t_CV)[:, None]
    logp_CV, logq_CV = s_CV - lse_s, t_CV - lse_t
    p_CV, q_CV = jnp.exp(logp_CV), jnp.exp(logq_CV)
    sums = [-p_CV * logp_CV, -q_CV * logq_CV, p_CV * (logp_CV - logq_CV), q_CV * (logq_CV - logp_CV)]
    entropy_p, entropy_q, reverse, forward = words.sum(jnp.stack([x.sum(-1) for x in sums]))

    at = jnp.concatenate([ids_p, tokens_C[:, None]], -1)
    logp, logq = words.take(s_CV, at) - lse_s, words.take(t_CV, at) - lse_t
    sampled = {"logp": logp[:, -1], "logq": logq[:, -1]} if lists else {}
    for name, z_CV, lse, ids in zip(("student", "teacher"), (s_CV, t_CV), (lse_s, lse_t), listed, strict=False):
        sampled |= {f"{name}_top_ids": ids, f"{name}_top_logp": words.take(z_CV, ids) - lse}
    estimates = kl_estimators(logp[:, -1], logq[:, -1])
    logp, logq = logp[:, :-1], logq[:, :-1]
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
        "reverse_kl": reverse,
        "forward_kl": forward,
        **estimates,
        "extreme_advantage_gap": gap,
        "argmax_agreement": (ids_p[..., 0] == ids_q[..., 0]).astype(logp.dtype),
        **sampled,
    }


def reduce_metrics(
    values_BT: dict[str, Array], mask_BT: Array, bins: int, depth_BT: Array | None = None, steps: int | None = None
) -> Metrics:
    """(sum, count) of each metric over the mask, and ``NAME_by_position`` over equal bins of ``steps`` positions.

    ``depth`` is the position of each token; None: its column, of T.
    """
    if not values_BT:
        return {}
    if depth_BT is None or steps is None:
        steps = mask_BT.shape[1]
        depth_BT = jnp.broadcast_to(jnp.arange(steps), mask_BT.shape)
    in_bin_BTP = depth_BT[..., None] * bins // steps == jnp.arange(bins)
    keeps = [mask_BT & (values_BT["overlap_ratio"] > 0) if n == "overlap_advantage" else mask_BT for n in values_BT]
    kept = jnp.stack([jnp.where(keep, x, 0) for keep, x in zip(keeps, values_BT.values(), strict=True)])

    def binned(x_nBT: Array) -> Array:
        return jnp.einsum("nbt,btp->np", x_nBT, in_bin_BTP.astype(kept.dtype), precision="highest")

    sums_nP, counts_nP = binned(kept), binned(jnp.stack(keeps).astype(kept.dtype))
    metrics: Metrics = {n: (sums_nP[i].sum(), counts_nP[i].sum()) for i, n in enumerate(values_BT)}
    return metrics | {f"{n}_by_position": (sums_nP[i], counts_nP[i]) for i, n in enumerate(values_BT)}
