"""Supervised fine-tuning: cross-entropy of the response tokens of a corpus."""

from __future__ import annotations

from typing import Any

from jax import Array

from opd_jax.losses.log_probs import cross_entropy
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.packing import padding
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Metrics, Params, Sequences


def sft_loss(
    params: Params,
    rows: Sequences,
    *,
    config: DecoderConfig,
    vocab_size: int,
    dtype: Any,
    remat: str = "none",
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """((Σ −log p(y_t), response-token count), metrics) of rows of a corpus; prompt tokens are not trained."""
    hidden = hidden_states(params, config, rows, dtype=dtype, remat=remat, layout=layout)
    sums, metrics = cross_entropy(hidden, head(params), rows.targets, rows.mask, vocab_size=vocab_size)
    return sums, metrics | padding(rows)
