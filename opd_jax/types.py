"""Axis legend and the frozen pytrees that pass between the stages of a training step.

Axis letters, used as suffixes of array names and in einsums:

    B sequences   M rows, each of one or several sequences   T query positions (columns of a row)   S key positions
    P prompt positions   R response positions
    D model width (student)   E model width (teacher)   F hidden width   L layers
    N query heads   K key/value heads   H head size   V vocabulary   k support size   C chunk   G samples per prompt

Data flows one way: ``Prompts → Rollouts → Sequences → Scores → (loss, Metrics) → TrainState``. Padding is never
inferred from a token id: every ragged array comes with its lengths.
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
    advantage: Array | None = None  # [B] float32, of a task reward
    fixed: Array | None = None  # [B] bool: a text of a corpus, not sampled; None: all are sampled


@flax.struct.dataclass
class Sequences:
    """Rows for a forward pass, of one or several sequences each (``sampling/packing.py``): prompt, then response.

    The state at [m, t] predicts ``targets[m, t]``. The last token of a response predicts nothing that is trained and
    stands in ``targets`` alone.
    """

    tokens: Array  # [M, T] int32
    positions: Array  # [M, T] int32, counted within the sequence
    segments: Array  # [M, T] int32, 1 + index of the sequence in its batch; 0: padding
    targets: Array  # [M, T] int32
    depth: Array  # [M, T] int32, position in the response of the target; -1: the target is no response token
    logp: Array | None  # [M, T] float32, behaviour log-probability of the target (nats); None: a corpus
    topk_ids: Array | None  # [M, T, k] int32, the behaviour policy's most probable ids; None: a corpus
    weight: Array | None  # [M, T] float32, of the position in the loss; None: all alike
    advantage: Array | None  # [M, T] float32, of a task reward; None: there is no reward
    max_response: int = flax.struct.field(pytree_node=False)  # tokens; depths are below

    @property
    def mask(self) -> Array:
        """[M, T] bool: where a response token is predicted."""
        return self.depth >= 0


@flax.struct.dataclass
class Scores:
    """What a frozen teacher says about rollouts: its hidden state at every column of every row (not its logits)."""

    hidden: Array  # [M, T, E]; the state at [m, t] predicts targets[m, t]
    head: Array  # [V, E]
