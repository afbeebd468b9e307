"""Axis legend and the frozen pytrees that pass between the stages of a training step.

Axis letters, used as suffixes of array names and in einsums:

    B sequences   T query positions   S key positions   P prompt positions   R response positions
    D model width (student)   E model width (teacher)   F hidden width   L layers
    N query heads   K key/value heads   H head size   V vocabulary   k support size   C chunk   G samples per prompt

Data flows one way: ``Prompts → Rollouts → Scores → (loss, Metrics) → TrainState``. Padding is never inferred from a
token id: every ragged array comes with its lengths.
"""

from __future__ import annotations

from typing import Any

import flax.struct
from jax import Array

Params = dict[str, Any]
"""A plain nested dict of arrays: the weights of one model."""

Metrics = dict[str, tuple[Array, Array]]
"""Name → (sum, count); a mean is taken only where it is printed. Curves over output-position bins are arrays."""


@flax.struct.dataclass
class Prompts:
    """Token ids of prompts, right-aligned (padding on the left), so that every response starts at column P."""

    tokens: Array  # [B, P] int32
    lengths: Array  # [B] int32, ≥ 1
    ids: Array  # [B] uint32, identifies the prompt in the random-number law
    samples: Array  # [B] uint32, index of the sample of that prompt


@flax.struct.dataclass
class Rollouts:
    """Responses with what the behaviour policy knew when it sampled them. End-of-sequence is part of the response."""

    prompts: Prompts
    tokens: Array  # [B, R] int32
    lengths: Array  # [B] int32, 1 … R
    stopped: Array  # [B] bool: ended by an end-of-sequence id; False: cut at the length limit
    logp: Array  # [B, R] float32, log-probability under the law that sampled (nats)
    entropy: Array  # [B, R] float32, entropy of the untempered, untruncated distribution (nats)
    topk_ids: Array  # [B, R, k] int32, the k most probable ids at each sampled state, most probable first
    topk_logp: Array  # [B, R, k] float32, their log-probabilities at temperature 1, untruncated


@flax.struct.dataclass
class Scores:
    """What a frozen teacher says about rollouts: its hidden state at every response position (not its logits)."""

    hidden: Array  # [B, R, E]; the state at r predicts tokens[:, r]
    head: Array  # [V, E]
