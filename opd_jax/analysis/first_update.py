"""What a first update would be: norm and coherence of its gradients; what a step takes in memory and time.

Cheaper than ``opd analyze gradients``: one backward pass a rollout, of the full KL summed over its tokens.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from opd_jax.analysis.coherence import bilinear, coherence, linear
from opd_jax.analysis.estimates import prompt_weights
from opd_jax.analysis.pair import Drawn, Network, Pair
from opd_jax.analysis.token_gradients import random_signs
from opd_jax.config import Objective
from opd_jax.losses import distillation_loss
from opd_jax.models.decoder import DecoderConfig, head, parameter_specs
from opd_jax.models.flops import causal_pairs, forward_flops
from opd_jax.models.hf import load_model
from opd_jax.sampling.packing import pack
from opd_jax.sampling.states import hidden_states
from opd_jax.types import Params, Sequences

Row = dict[str, Any]

ROLLOUTS = 16  # of different problems
# of a sketch; inner products have a relative error of about √(2 / buckets). Weights whose index is the same modulo
# BUCKETS share one: a prime far from the powers of 2, or all of one hidden coordinate would share a few (with 2¹⁶ and
# a width of 512, 128 of them). Of the weights of one row, column or head in Llama and Qwen from 135M to 8B at least
# 0.4 of the buckets are used.
BUCKETS = 65_003
STEP = (64, 4)  # prompts × samples of a step (paper, default set-up)


def first_update(pair: Pair, student: Network, teacher: Network, drawn: Drawn) -> Row:
    """Gradients of the first rollout of at most ``ROLLOUTS`` problems, in float32 weights as training has them
    (read once more, whatever ``pair.dtype``).

    ``norm`` is that of the token mean over these rollouts, nats a token; ``coherence`` that of the rollouts' sums.
    ``rates``: tokens a second, prompts included, of the teacher's forward pass (score) and of the student's forward and
    backward pass (update), here.
    """
    chosen = np.arange(0, drawn.panel.rows, drawn.panel.samples)[:ROLLOUTS]
    host = pack(jax.tree.map(lambda x: np.asarray(x)[chosen], drawn.rollouts), separate=True)
    width = int((np.asarray(host.segments) > 0).sum(1).max())
    host = jax.tree.map(lambda x: np.asarray(x)[:, :width], host)
    own, _ = load_model(student.path)
    other = jax.device_put(teacher.params, jax.local_devices()[0])
    score, backward = _passes(student.config, teacher.config, pair.vocab_size, pair.dtype)
    sketches, squares, tokens = [], [], np.asarray(host.mask).sum(1).astype(float)
    seconds = np.zeros((len(chosen), 2))
    for i in range(len(chosen)):
        rows = jax.tree.map(lambda x, i=i: x[i : i + 1], host)
        start = time.monotonic()
        hidden = jax.block_until_ready(score(other, rows))
        middle = time.monotonic()
        sketch, square = jax.device_get(backward(own, rows, hidden, head(other)))
        seconds[i] = middle - start, time.monotonic() - middle
        sketches.append(sketch)
        squares.append(square)
    stored = np.array(sketches, np.float64)
    gram = stored @ stored.T
    np.fill_diagonal(gram, squares)
    n, weights = len(chosen), prompt_weights(len(chosen))
    held = coherence(gram, np.arange(n), np.ones(n, bool), weights)
    later = seconds[1:].sum(0) if n > 1 else seconds.sum(0)  # the first pass holds the compilation
    used = (np.asarray(host.segments) > 0).sum(1)
    used = used[1:].sum() if n > 1 else used.sum()
    return {
        "rollouts": n,
        "tokens": int(tokens.sum()),
        "norm": bilinear(gram, weights).root().over(linear(tokens, weights)).row(n),
        "coherence": held and held.row(n),
        "rates": {"score": float(used / later[0]), "update": float(used / later[1])},
    }


def sketched(leaves: Sequence[Array]) -> Float[Array, " buckets"]:
    """Every weight in one bucket, with a random sign: inner products of sketches are those of gradients, on average."""
    sketch = jnp.zeros(BUCKETS)
    for i, g in enumerate(leaves):
        signed = (g * random_signs(jax.random.fold_in(jax.random.key(0), i), g)).ravel()
        sketch += jnp.pad(signed, (0, -g.size % BUCKETS)).reshape(-1, BUCKETS).sum(0)
    return sketch


def step_cost(pair: Pair, student: DecoderConfig, teacher: DecoderConfig, drawn: Drawn, rates: Row) -> Row:
    """Bytes that a step holds beside activations, its FLOPs, and its seconds here at the ``rates`` (tokens a second)
    that were measured, for 64 prompts × 4 rollouts of the lengths seen."""
    lengths = drawn.lengths.astype(float)
    prompts = np.asarray(drawn.rollouts.prompts.lengths)[: drawn.panel.rows].astype(float)
    times = math.prod(STEP) / len(lengths)
    used, pairs = (prompts + lengths - 1), functools.partial(causal_pairs, lengths=prompts + lengths - 1)
    of_student = forward_flops(student, float(used.sum()), pairs(student))
    of_teacher = forward_flops(teacher, float(used.sum()), pairs(teacher))
    V, R, D, E = min(student.vocab_size, teacher.vocab_size), float(lengths.sum()), student.width, teacher.width
    flops = {"rollout": of_student + 2 * V * D * R, "score": of_teacher}
    flops["update"] = 3 * of_student + V * R * (6 * D + 2 * E)
    weights, theirs, size = _weights(student), _weights(teacher), pair.dtype.itemsize
    held = {"weights, float32": 4 * weights, "gradient, float32": 4 * weights, "AdamW moments, float32": 8 * weights}
    held |= {f"weights to sample, {pair.dtype}": size * weights, f"teacher, {pair.dtype}": size * theirs}
    work = {"rollout": R, "score": float(used.sum()), "update": float(used.sum())}
    return {
        "bytes": held,
        "flops": {name: x * times for name, x in flops.items()},
        "rates": {name: rates[name] for name in work},
        "seconds": {name: x * times / rates[name] for name, x in work.items()},
    }


def _weights(c: DecoderConfig) -> int:
    return sum(math.prod(s.shape) for s in jax.tree.leaves(parameter_specs(c), is_leaf=lambda x: hasattr(x, "shape")))


@functools.cache
def _passes(student: DecoderConfig, teacher: DecoderConfig, vocab_size: int, dtype: Any) -> tuple[Any, Any]:
    @jax.jit
    def score(params: Params, rows: Sequences) -> Array:
        return hidden_states(params, teacher, rows, dtype=dtype)

    @jax.jit
    def backward(params: Params, rows: Sequences, hidden: Array, teacher_head: Array) -> tuple[Array, Array]:
        def loss(params: Params) -> Array:
            own = hidden_states(params, student, rows, dtype=dtype, remat="full")
            sides = own, head(params), hidden, teacher_head
            given: Any = {"metrics": False, "vocab_size": vocab_size}
            return distillation_loss(*sides, rows.targets, rows.mask, Objective(), **given)[0][0]

        leaves = jax.tree.leaves(jax.grad(loss)(params))
        return sketched(leaves), jnp.sum(jnp.stack([(g**2).sum() for g in leaves]))

    return score, backward
