"""Support sets as lists of ids, and the top-k losses on them: [..., K] numbers instead of [..., V]."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from opd_jax.config import Objective
from opd_jax.losses.reference import FILL, divergence, policy_gradient, score_function


def support_ids(
    support: str, ids_p: Int[Array, "C k"], ids_q: Int[Array, "C k"] | None
) -> tuple[Int[Array, "C K"], Bool[Array, "C K"]]:
    """Ids of a support and which of them belong to it; members are distinct, the others are placeholders."""
    if support == "student":
        return ids_p, jnp.ones(ids_p.shape, bool)
    assert ids_q is not None
    if support == "teacher":
        return ids_q, jnp.ones(ids_q.shape, bool)
    p_in_q, q_in_p = contains(ids_q, ids_p), contains(ids_p, ids_q)
    if support == "overlap":
        return ids_p, p_in_q
    ids = jnp.concatenate([ids_p, ids_q], -1)
    keep_p = jnp.ones_like(p_in_q) if support == "union" else ~p_in_q
    return ids, jnp.concatenate([keep_p, ~q_in_p], -1)


def contains(ids: Int[Array, "C k"], wanted: Int[Array, "C j"]) -> Bool[Array, "C j"]:
    """Which of ``wanted`` stand in ``ids``."""
    return (wanted[..., :, None] == ids[..., None, :]).any(-1)


class Picks(NamedTuple):
    """What a loss other than the full divergence reads of one side's logits, at each token."""

    support: Float[Array, "C K"] | None = None  # logits of the support
    token: Float[Array, "C"] | None = None  # logit of the sampled token
    lse: Float[Array, "C"] | None = None  # log-sum-exp of all logits
    rest: Float[Array, "C"] | None = None  # log-sum-exp of those outside of the support


def token_loss(
    objective: Objective,
    student: Picks,
    teacher: Picks,
    member_CK: Any,  # Bool[Array, "C K"] | None
    behaviour_logp: Float[Array, "C"] | None = None,
    advantages: Float[Array, "C"] | None = None,
) -> Float[Array, "C"]:
    """Loss of each token on its support or its sampled token (0 for name=full), and the part of ``advantages``."""
    s: Any = student
    t: Any = teacher
    policy: Any = 0.0
    if objective.name == "sampled" or advantages is not None:
        logp = s.token - s.lse
        cost = logp - (t.token - t.lse) if objective.name == "sampled" else jnp.zeros_like(logp)
        cost = cost if advantages is None else cost - advantages
        policy = policy_gradient(logp, cost, behaviour_logp, objective)
    if not objective.name.startswith("topk"):
        return policy
    logp_S = jax.nn.log_softmax(jnp.where(member_CK, s.support, FILL))
    logq_S = jax.nn.log_softmax(jnp.where(member_CK, t.support, FILL))
    if objective.name == "topk" and objective.normalise and not objective.tail:
        return policy + divergence(logp_S, logq_S, objective).sum(-1)
    logp, logq = s.support - s.lse[:, None], t.support - t.lse[:, None]
    if objective.name == "topk_reference":
        weight = jnp.exp(logp_S if objective.normalise else logp)
        return policy + jnp.where(member_CK, score_function(logp, weight * (logp - logq)), 0).sum(-1)
    if not objective.tail:
        return policy + jnp.where(member_CK, divergence(logp, logq, objective), 0).sum(-1)
    # The mass outside is summed directly: 1 - mass(S) has no correct digit left where S holds nearly everything.
    logp = jnp.concatenate([jnp.where(member_CK, logp, FILL), (s.rest - s.lse)[:, None]], -1)
    logq = jnp.concatenate([jnp.where(member_CK, logq, FILL), (t.rest - t.lse)[:, None]], -1)
    return policy + divergence(logp, logq, objective).sum(-1)
