"""Supervised fine-tuning: cross-entropy of the response tokens of a corpus."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from opd_jax.losses.cross_entropy import cross_entropy
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, forward, head
from opd_jax.types import Metrics, Params


def sft_loss(
    params: Params,
    batch: dict[str, Array],
    *,
    config: DecoderConfig,
    vocab_size: int,
    dtype: Any,
    remat: str = "none",
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """((Σ −log p(y_t), response-token count), metrics) of left-aligned rows.

    Args:
        batch: ``tokens`` [B, T], ``lengths`` [B], ``prompt_lengths`` [B]; prompt tokens are not trained.
    """
    tokens, lengths = batch["tokens"], batch["lengths"][:, None]
    columns = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = (columns < lengths).astype(jnp.int32)
    hidden = forward(params, config, tokens, columns, segments, dtype=dtype, remat=remat, layout=layout)[:, :-1]
    mask = ((columns >= batch["prompt_lengths"][:, None]) & (columns < lengths))[:, 1:]
    return cross_entropy(hidden, head(params), tokens[:, 1:], mask, vocab_size=vocab_size)
