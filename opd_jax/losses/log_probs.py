"""Log-probabilities of given tokens from hidden states and head weights, and the losses that need no teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Bool, Float, Int

from opd_jax.config import Objective
from opd_jax.losses.metrics import reduce_metrics
from opd_jax.losses.reference import policy_gradient
from opd_jax.models.decoder import unembed
from opd_jax.types import Metrics

_CHUNK = 64  # positions whose logits exist at a time


def token_log_probs(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Bool[Array, "B T"]]:
    """log softmax(hidden · headᵀ)[token], the entropy (nats), and whether the token is the most probable id.

    Logits are recomputed chunk by chunk in the backward pass, so [B, T, V] is never held. Ids from ``vocab_size`` on
    carry no probability. Only the first is differentiated.
    """
    B, T = tokens_BT.shape
    pad = -T % _CHUNK if T > _CHUNK else 0
    size = min(_CHUNK, T + pad)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(head: Array, hidden: Array, tokens: Array) -> tuple[Array, Array, Array]:
        logits = unembed(hidden, head)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        logp = jax.nn.log_softmax(logits, axis=-1)
        fixed = lax.stop_gradient(logp)
        entropy = -jnp.sum(jnp.where(fixed > -jnp.inf, jnp.exp(fixed) * fixed, 0.0), axis=-1)
        chosen = jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
        return chosen, entropy, jnp.argmax(logits, axis=-1) == tokens

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T]

    def body(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array, Array]]:
        return None, of_chunk(head_VD, *inputs)

    _, values = lax.scan(body, None, (chunks(hidden_BTD), chunks(tokens_BT)))
    logp, entropy, right = map(join, values)
    return logp, entropy, right


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    vocab_size: int,
) -> tuple[tuple[Array, Array], Metrics]:
    """Σ over masked positions of −log p(token), in nats, and their count.

    Metric ``token_accuracy``: the share of tokens that are the most probable id.
    """
    logp, _, right = token_log_probs(hidden_BTD, head_VD, tokens_BT, vocab_size=vocab_size)
    count = jnp.sum(mask_BT)
    accuracy = jnp.sum(right & mask_BT).astype(logp.dtype), count
    return (-jnp.sum(jnp.where(mask_BT, logp, 0.0)), count), {"token_accuracy": accuracy}


def reward_loss(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    advantages_BT: Float[Array, "B T"],
    behaviour_logp_BT: Float[Array, "B T"],
    objective: Objective,
    *,
    vocab_size: int,
    weights: Float[Array, "B T"] | None = None,
    depth: Int[Array, "B T"] | None = None,
    steps: int | None = None,
    bins: int = 16,
) -> tuple[tuple[Array, Array], Metrics]:
    """Σ w_t · policy-gradient loss of −advantage, with ``objective.correction``, and Σ w_t (GRPO; paper A.1).

    Metrics, and their curves over ``depth``: ``student_entropy`` (nats), ``ratio`` p(y)/μ(y) of the current to the
    sampling policy, and ``clipped``, the share of tokens whose ratio is out of ``objective.ratio_bounds``.
    """
    logp, entropy, _ = token_log_probs(hidden_BTD, head_VD, tokens_BT, vocab_size=vocab_size)
    weight = jnp.where(mask_BT, 1.0 if weights is None else weights, 0.0).astype(logp.dtype)
    # what stands elsewhere has no influence, were it NaN
    advantages_BT, behaviour_logp_BT = (jnp.where(mask_BT, x, 0.0) for x in (advantages_BT, behaviour_logp_BT))
    loss = policy_gradient(logp, -advantages_BT.astype(logp.dtype), behaviour_logp_BT, objective)
    ratio, (low, high) = lax.stop_gradient(jnp.exp(logp - behaviour_logp_BT)), objective.ratio_bounds
    clipped = ((ratio < low) | (ratio > high)).astype(logp.dtype)
    values = {"student_entropy": entropy, "ratio": ratio, "clipped": clipped}
    measured = reduce_metrics(values, mask_BT, bins, depth, steps)
    return (jnp.sum(loss * weight), jnp.sum(weight)), measured
