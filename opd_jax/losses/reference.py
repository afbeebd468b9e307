"""The objectives in dense ``jax.numpy``: what ``fused`` must equal in value and gradient, written to be read."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from opd_jax.config import Objective

# Logit of an excluded id. exp(FILL - max) is exactly 0 and FILL - FILL is exactly 0, where -inf would give NaN.
FILL = -1e30


def reference_loss(
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    topk_ids: Int[Array, "B T K"] | None = None,
    behaviour_logp: Float[Array, "B T"] | None = None,
    advantages: Float[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    student_readout: Callable[[Array], Array] | None = None,
    teacher_readout: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Σ_t w_t · loss_t and Σ_t w_t from [B, T, V] logits; arguments as for ``distillation_loss`` (paper §2).

    Readouts map the products hidden · headᵀ to logits.
    """
    valid = vocab_size or min(student_head_VD.shape[0], teacher_head_VE.shape[0])
    s_BTV = _logits(student_hidden_BTD, student_head_VD[:valid], student_readout) / objective.temperature
    t_BTV = _logits(teacher_hidden_BTE, teacher_head_VE[:valid], teacher_readout) / objective.temperature
    loss_BT = reference_token_loss(
        s_BTV, lax.stop_gradient(t_BTV), tokens_BT, objective, topk_ids, behaviour_logp, advantages
    )
    weight_BT = mask_BT.astype(loss_BT.dtype) * (1 if weights is None else weights)
    return jnp.sum(loss_BT * weight_BT), jnp.sum(weight_BT)


def reference_token_loss(
    s_BTV: Float[Array, "*C V"],
    t_BTV: Float[Array, "*C V"],
    tokens_BT: Int[Array, "*C"],
    objective: Objective,
    topk_ids: Int[Array, "*C K"] | None = None,
    behaviour_logp: Float[Array, "*C"] | None = None,
    advantages: Float[Array, "*C"] | None = None,
) -> Float[Array, "*C"]:
    """Loss of each position from both sides' logits over the valid vocabulary (temperature already divided out)."""
    logp, logq = jax.nn.log_softmax(s_BTV), jax.nn.log_softmax(t_BTV)
    logp_y = jnp.take_along_axis(logp, tokens_BT[..., None], -1)[..., 0]
    logq_y = jnp.take_along_axis(logq, tokens_BT[..., None], -1)[..., 0]
    reward = 0 if advantages is None else advantages
    if objective.name == "sampled":
        return policy_gradient(logp_y, logp_y - logq_y - reward, behaviour_logp, objective)
    task = 0 if advantages is None else policy_gradient(logp_y, -advantages, behaviour_logp, objective)
    if objective.name == "full":
        return task + divergence(logp, logq, objective).sum(-1)
    return task + _support_loss(s_BTV, t_BTV, logp, logq, objective, topk_ids)


def _support_loss(
    s_BTV: Array, t_BTV: Array, logp: Array, logq: Array, objective: Objective, topk_ids: Array | None
) -> Float[Array, "*C"]:
    member = _support(s_BTV, t_BTV, objective, topk_ids)
    logp_S = jax.nn.log_softmax(jnp.where(member, s_BTV, FILL))
    logq_S = jax.nn.log_softmax(jnp.where(member, t_BTV, FILL))
    if objective.name == "topk_reference":
        weight = jnp.exp(logp_S if objective.normalise else logp)
        return jnp.where(member, score_function(logp, weight * (logp - logq)), 0).sum(-1)
    if objective.tail:
        rest_p = jax.nn.logsumexp(jnp.where(member, FILL, logp), -1, keepdims=True)
        rest_q = jax.nn.logsumexp(jnp.where(member, FILL, logq), -1, keepdims=True)
        logp = jnp.concatenate([jnp.where(member, logp, FILL), rest_p], -1)
        logq = jnp.concatenate([jnp.where(member, logq, FILL), rest_q], -1)
        return divergence(logp, logq, objective).sum(-1)
    if objective.normalise:
        return divergence(logp_S, logq_S, objective).sum(-1)
    return jnp.where(member, divergence(logp, logq, objective), 0).sum(-1)


def divergence(logp: Array, logq: Array, objective: Objective) -> Array:
    """The terms whose sum over outcomes is the divergence (p student, q teacher).

    reverse: p log(p/q) · forward: q log(q/p) · jsd: m = (1-β)p + βq, β q log(q/m) + (1-β) p log(p/m), which vanishes
    at β = 0 and 1, where GKD's convention puts forward and reverse instead · skew: p log(p / (αq + (1-α)p)).
    """
    beta, alpha = objective.beta, objective.alpha
    if objective.divergence == "reverse" or (objective.divergence == "jsd" and beta == 1):
        return jnp.exp(logp) * (logp - logq)
    if objective.divergence == "forward" or objective.divergence == "jsd":
        if objective.divergence == "forward" or beta == 0:
            return jnp.exp(logq) * (logq - logp)
        logm = jnp.logaddexp(logp + jnp.log1p(-beta), logq + jnp.log(beta))
        return beta * jnp.exp(logq) * (logq - logm) + (1 - beta) * jnp.exp(logp) * (logp - logm)
    logm = logq if alpha == 1 else jnp.logaddexp(logp + jnp.log1p(-alpha), logq + jnp.log(alpha))
    return jnp.exp(logp) * (logp - logm)


def policy_gradient(logp: Array, cost: Array, behaviour_logp: Array | None, objective: Objective) -> Array:
    """Σ over y ~ μ of this estimates Σ over y ~ p of cost; r = p(y) / μ(y), μ the behaviour policy, cost a constant.

    none: r = 1 · importance: r · cost · ppo: max(r · cost, clip(r, low, high) · cost) · tis: sg(min(r, high)) · cost ·
    icepop: sg(r) · cost within [low, high], else 0. Gradients: weight · cost · ∇log p(y), the weight being r, or 0
    where PPO clips, or what tis and icepop make of r.
    """
    if objective.correction == "none" or behaviour_logp is None:
        return score_function(logp, cost)
    cost = lax.stop_gradient(cost)
    low, high = objective.ratio_bounds
    ratio = jnp.exp(logp - behaviour_logp)
    if objective.correction == "importance":
        return ratio * cost
    if objective.correction == "ppo":
        return jnp.maximum(ratio * cost, ratio.clip(low, high) * cost)
    fixed = lax.stop_gradient(ratio)
    weight = jnp.minimum(fixed, high) if objective.correction == "tis" else fixed * ((fixed >= low) & (fixed <= high))
    return score_function(logp, weight * cost)


def kl_estimators(logp: Array, logq: Array) -> dict[str, Array]:
    """Values whose mean over y ~ p is KL(p ‖ q), from log p(y) and log q(y); nats.

    k1 = log p/q, unbiased · k2 = ½ (log p/q)², biased, of small variance · k3 = q/p - 1 - log q/p, unbiased and never
    negative (J. Schulman, "Approximating KL Divergence"). As losses they have other gradients than the KL: k1's has
    mean zero; objective ``sampled`` is the right one.
    """
    ratio = logp - logq
    return {"kl_k1": ratio, "kl_k2": ratio**2 / 2, "kl_k3": jnp.expm1(-ratio) + ratio}


def position_weights(
    lengths_B: Array, steps: int, *, discount: float = 1.0, skip: int = 0, depth: float = 0.0
) -> Array:
    """[B, steps] weights of response positions t = 0, 1, …: discount^t · (1 + depth · t / length), 0 for t < skip.

    Pass them as ``weights``; the loss is then the weighted mean. Positions past the length weigh 0.
    """
    t = jnp.arange(steps)
    length = jnp.maximum(lengths_B, 1)[:, None]
    weight = discount**t * (1 + depth * t / length)
    return jnp.where((t >= skip) & (t < lengths_B[:, None]), weight, 0.0)


def score_function(logp: Array, cost: Array) -> Array:
    """The value is ``cost``, the gradient is cost · ∇logp: differentiating the cost itself would have mean zero."""
    cost = lax.stop_gradient(cost)
    return cost + cost * (logp - lax.stop_gradient(logp))


def _logits(hidden_BTD: Array, head_VD: Array, readout: Callable[[Array], Array] | None) -> Array:
    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    head_VD = head_VD.astype(hidden_BTD.dtype)
    products = jnp.einsum("btd,vd->btv", hidden_BTD, head_VD, preferred_element_type=dtype)
    return products if readout is None else readout(products)


def _support(s_BTV: Array, t_BTV: Array, objective: Objective, topk_ids: Array | None) -> Bool[Array, "*C V"]:
    vocab = s_BTV.shape[-1]
    k = min(objective.k, vocab)
    ids_p = lax.top_k(s_BTV, k)[1] if topk_ids is None else topk_ids[..., :k]
    in_p = jax.nn.one_hot(ids_p, vocab, dtype=bool).any(-2)
    in_q = jax.nn.one_hot(lax.top_k(t_BTV, k)[1], vocab, dtype=bool).any(-2)
    return {
        "student": in_p,
        "teacher": in_q,
        "overlap": in_p & in_q,
        "non_overlap": in_p ^ in_q,
        "union": in_p | in_q,
    }[objective.support]
