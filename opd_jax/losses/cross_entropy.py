"""Cross-entropy of a corpus from hidden states and head weights, chunked over positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from opd_jax.models.decoder import unembed
from opd_jax.types import Metrics

_CHUNK = 64  # positions whose logits exist at a time


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Bool[Array, "B T"],
    *,
    vocab_size: int,
) -> tuple[tuple[Array, Array], Metrics]:
    """Σ over masked positions of −log softmax(hidden · headᵀ)[token], in nats, and their count.

    Logits are recomputed chunk by chunk in the backward pass, so [B, T, V] is never held. Ids from ``vocab_size`` on
    carry no probability. Metric ``token_accuracy``: the share of tokens that are the most probable id.
    """
    B, T = tokens_BT.shape
    pad = -T % _CHUNK if T > _CHUNK else 0
    size = min(_CHUNK, T + pad)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sums(head: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, tokens, mask = inputs
        logits = unembed(hidden, head)
        logits = jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[..., None], axis=-1)[..., 0]
        right = (jnp.argmax(logits, axis=-1) == tokens) & mask
        return -jnp.sum(jnp.where(mask, logp, 0.0)), jnp.sum(right)

    def body(carry: tuple[Array, Array], inputs: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        loss, right = chunk_sums(head_VD, inputs)
        return (carry[0] + loss, carry[1] + right), None

    dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    xs = (chunks(hidden_BTD), chunks(tokens_BT), chunks(mask_BT))
    (loss, right), _ = jax.lax.scan(body, (jnp.zeros((), dtype), jnp.zeros((), jnp.int32)), xs)
    count = jnp.sum(mask_BT)
    return (loss, count), {"token_accuracy": (right.astype(dtype), count)}
