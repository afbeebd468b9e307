"""Group-relative policy optimisation: rewards of whole responses, compared within the samples of one prompt."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from opd_jax.config import Objective
from opd_jax.losses.log_probs import reward_loss
from opd_jax.mesh import Layout
from opd_jax.models.decoder import DecoderConfig, head
from opd_jax.sampling.packing import padding
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Metrics, Params, Sequences

_TINY = 1e-6  # added to a group's standard deviation


def group_advantages(
    rewards_B: Float[np.ndarray, "B"], samples: int, scale: Literal["standardised", "centred"]
) -> Float[np.ndarray, "B"]:
    """A = (r − mean) / (std + 1e-6) over the ``samples`` consecutive rows of each prompt; ``centred``: r − mean.

    std has samples − 1 degrees of freedom. A reward that is NaN (a row that could not be judged) counts for nothing:
    its advantage is 0, and it is left out of mean and std. Equal rewards in a group give 0 (Shao et al. 2024, GRPO).
    """
    r_GS = np.asarray(rewards_B, np.float64).reshape(-1, samples)
    known = np.isfinite(r_GS)
    n = known.sum(1, keepdims=True)
    r_GS = np.where(known, r_GS, 0.0)
    off = np.where(known, r_GS - r_GS.sum(1, keepdims=True) / np.maximum(n, 1), 0.0)
    spread = np.max(r_GS, 1, where=known, initial=-np.inf) > np.min(r_GS, 1, where=known, initial=np.inf)
    if scale == "standardised":
        off = off / (np.sqrt((off**2).sum(1, keepdims=True) / np.maximum(n - 1, 1)) + _TINY)
    return np.where(spread[:, None], off, 0.0).reshape(-1)


def grpo_loss(
    params: Params,
    rows: Sequences,
    *,
    config: DecoderConfig,
    objective: Objective,
    vocab_size: int,
    dtype: Any = jnp.float32,
    remat: str = "none",
    layout: Layout | None = None,
) -> tuple[tuple[Array, Array], Metrics]:
    """((loss sum, response-token count), metrics) of rows with ``advantage``; one global token mean (paper A.1)."""
    assert rows.advantage is not None
    assert rows.logp is not None
    hidden = hidden_states(params, config, rows, dtype=dtype, remat=remat, layout=layout)
    sums, metrics = reward_loss(
        hidden,
        head(params),
        rows.targets,
        rows.mask,
        rows.advantage,
        rows.logp,
        objective,
        vocab_size=vocab_size,
        weights=rows.weight,
        depth=rows.depth,
        steps=rows.max_response,
    )
    return sums, metrics | padding(rows)
