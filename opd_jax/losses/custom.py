"""A loss of one's own on the logits of both sides, position by position, without logits for all of them at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from opd_jax.models.decoder import unembed

TokenLoss = Callable[..., Array]


def custom_loss(
    token_loss: TokenLoss,
    student_hidden_BTD: Float[Array, "B T D"],
    student_head_VD: Float[Array, "V D"],
    teacher_hidden_BTE: Float[Array, "B T E"],
    teacher_head_VE: Float[Array, "W E"],
    tokens_BT: Int[Array, "B T"],
    mask_BT: Array,
    *extra: Array,
    vocab_size: int | None = None,
    chunk: int = 64,
) -> tuple[Array, Array]:
    """Σ mask · token_loss and Σ mask, from ``token_loss(student_logits, teacher_logits, tokens, *extra)``.

    The function sees [B, C, V] logits in float32 (only valid ids), [B, C] tokens and returns [B, C] in nats; the
    student's side is differentiated by JAX, the teacher's and ``extra`` are constants. Chunks of ``chunk`` positions
    are recomputed in the backward pass, so that [B, T, V] is never held. What stands under the mask must be finite.

    Args:
        extra: further [B, T, …] arrays, cut in the same way (advantages, weights).
        vocab_size: size of the tokenizer; None: the narrower head.
    """
    valid = vocab_size or min(student_head_VD.shape[0], teacher_head_VE.shape[0])
    T = tokens_BT.shape[1]
    chunk = min(chunk, T)

    def chunks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, -T % chunk), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sum(head: Array, hidden: Array, teacher_hidden: Array, tokens: Array, mask: Array, *rest: Array) -> Array:
        teacher_logits = lax.stop_gradient(unembed(teacher_hidden, teacher_head_VE[:valid]))
        loss = token_loss(unembed(hidden, head[:valid]), teacher_logits, tokens, *map(lax.stop_gradient, rest))
        return jnp.sum(jnp.where(mask, loss, 0))

    arrays = (student_hidden_BTD, teacher_hidden_BTE, tokens_BT, mask_BT.astype(bool), *extra)
    parts = tuple(map(chunks, arrays))
    dtype = jnp.promote_types(student_hidden_BTD.dtype, jnp.float32)

    def body(total: Array, part: tuple[Array, ...]) -> tuple[Array, None]:
        return total + chunk_sum(student_head_VD, *part), None

    total, _ = lax.scan(body, jnp.zeros((), dtype), parts)
    return total, jnp.sum(mask_BT, dtype=dtype)
