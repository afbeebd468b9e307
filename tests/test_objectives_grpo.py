"""Advantages, policy gradient and its mixture with a teacher's objective, against NumPy in float64."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STUDENT, TEACHER, VOCAB, distance

from opd_jax.config import Objective
from opd_jax.losses.log_probs import reward_loss
from opd_jax.models.decoder import forward
from opd_jax.objectives.grpo import group_advantages, grpo_loss
from opd_jax.objectives.opd import opd_loss
from opd_jax.sampling.packing import pack
from opd_jax.teacher import make_score
from opd_jax.types import Params, Rollouts

CORRECTIONS = {
    "none": Objective(),
    "importance": Objective(correction="importance"),
    "ppo": Objective(correction="ppo"),
    "clip higher": Objective(correction="ppo", ratio_low=0.7, ratio_high=1.6),
    "tis": Objective(correction="tis", ratio_high=1.3),
    "icepop": Objective(correction="icepop", ratio_low=0.6, ratio_high=1.5),
}
SETTINGS: dict[str, Any] = {"config": STUDENT, "vocab_size": VOCAB, "dtype": jnp.float32}
NAN = math.nan


def by_hand(group: list[float], scale: str) -> list[float]:
    known = [r for r in group if math.isfinite(r)]
    if len(set(known)) < 2:
        return [0.0] * len(group)
    mean, std = statistics.fmean(known), statistics.stdev(known) + 1e-6
    return [((r - mean) / (std if scale == "standardised" else 1)) if math.isfinite(r) else 0.0 for r in group]


@pytest.mark.parametrize("scale", ["standardised", "centred"])
def test_advantages(scale: Any) -> None:
    groups = [
        [1.0, 0.0, 0.0, 1.0],
        [0.3, -2.0, 5.0, 0.3],
        [0.1, NAN, 0.1, 0.1],  # the float64 mean is another number
        [1e8, 1e8 + 1, 1e8, 1e8],
        [NAN, 1.0, 0.0, 0.0],  # three are left
        [NAN, 1.0, NAN, 1.0],
        [NAN, NAN, NAN, 2.0],
        [NAN] * 4,
        [math.inf, 1.0, 0.0, -math.inf],
    ]
    got = group_advantages(np.array(groups).reshape(-1), 4, scale)
    want = [a for group in groups for a in by_hand(group, scale)]
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.reshape(-1, 4).sum(1), 0, atol=1e-7)


def naive(
    hidden: np.ndarray, head: np.ndarray, tokens: Any, advantage: Any, behaviour: Any, weight: Any, o: Objective
) -> tuple[float, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Σ w · loss over [n] tokens, its gradients in hidden states and head, and what the metrics average."""
    z = hidden @ head[:VOCAB].T
    logp = z - z.max(-1, keepdims=True)
    logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
    p, n = np.exp(logp), np.arange(len(tokens))
    ratio, (low, high) = np.exp(logp[n, tokens] - behaviour), o.ratio_bounds
    loss, slope = [], []  # slope: d loss / d log p(y)
    for r, a in zip(ratio, advantage, strict=True):
        clipped = min(max(r, low), high)
        loss_slope = {
            "none": (-a, -a),
            "importance": (-r * a, -r * a),
            "ppo": (-min(r * a, clipped * a), -r * a if r * a <= clipped * a else 0.0),
            "tis": (-min(r, high) * a,) * 2,
            "icepop": (-r * a if low <= r <= high else 0.0,) * 2,
        }[o.correction]
        loss.append(loss_slope[0])
        slope.append(loss_slope[1])
    dz = (weight * slope)[:, None] * (np.eye(VOCAB)[tokens] - p)
    dhead = np.concatenate([dz.T @ hidden, np.zeros((len(head) - VOCAB, head.shape[1]))])
    out = {"student_entropy": -(p * logp).sum(-1), "ratio": ratio, "clipped": (ratio < low) | (ratio > high)}
    return float(weight @ loss), dz @ head[:VOCAB], dhead, out


@pytest.mark.parametrize("name", CORRECTIONS)
def test_reward_loss(name: str) -> None:
    """Value, gradients and metrics; weights; more positions than a chunk; what stands under the mask is not read."""
    rng, objective = np.random.default_rng(0), CORRECTIONS[name]
    B, T, D = 3, 70, 8
    hidden, head = rng.normal(size=(B, T, D)), rng.normal(size=(VOCAB + 3, D)) / 3
    tokens, mask = rng.integers(0, VOCAB, (B, T)), rng.random((B, T)) < 0.6
    z = hidden @ head[:VOCAB].T
    logp = np.take_along_axis(z - np.log(np.exp(z).sum(-1, keepdims=True)), tokens[..., None], -1)[..., 0]
    behaviour, advantage = logp + rng.normal(0, 0.5, (B, T)), rng.normal(size=(B, T))
    weight = rng.random((B, T))
    h, *rest = (x[mask] for x in (hidden, tokens, advantage, behaviour, weight))
    loss, dhidden, dhead, measured = naive(h, head, rest[0], rest[1], rest[2], rest[3], objective)
    ratio, (low, high) = measured["ratio"], objective.ratio_bounds
    if "ratio_high" in objective.model_fields_set or name == "ppo":  # every case of clipping is there, both signs
        assert min(np.sum((ratio > high) & (s * rest[1] > 0)) for s in (1, -1)) > 3
        assert name == "tis" or min(np.sum((ratio < low) & (s * rest[1] > 0)) for s in (1, -1)) > 3

    advantage, behaviour = (np.where(mask, x, NAN) for x in (advantage, behaviour))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(hidden: Any, head: Any) -> Any:
        arrays: Any = (tokens, mask, np.float32(advantage), np.float32(behaviour), objective)
        settings: Any = {"vocab_size": VOCAB, "weights": np.float32(weight)}
        (total, count), metrics = reward_loss(hidden, head, *arrays, **settings)
        return total, (count, metrics)

    (total, (count, metrics)), grads = run(jnp.float32(hidden), jnp.float32(head))
    np.testing.assert_allclose(total, loss, rtol=1e-5)
    np.testing.assert_allclose(count, rest[-1].sum(), rtol=1e-6)
    want = np.zeros(hidden.shape)
    want[mask] = dhidden
    assert distance(grads, (want, dhead)) < 1e-5
    for key, values in measured.items():
        np.testing.assert_allclose(metrics[key][0], values.sum(), rtol=1e-5, err_msg=key)
        assert metrics[key][1] == mask.sum()


@functools.cache
def batch() -> tuple[Rollouts, np.ndarray]:
    """Four groups of two ragged rollouts; rewards of one group are alike, one row could not be judged."""
    rollouts = tiny_runs.make_rollouts()
    rewards = np.array([1.0, 0.0, 0.5, 0.5, NAN, 1.0, 0.25, 2.0])
    advantage = group_advantages(rewards, 2, "standardised").astype(np.float32)
    logp = np.random.default_rng(3).normal(-3, 0.7, rollouts.tokens.shape) * tiny_runs.response_mask(rollouts)
    return dataclasses.replace(rollouts, advantage=jnp.asarray(advantage), logp=jnp.float32(logp)), advantage


def test_grpo_loss_and_gradient_equal_those_of_single_sequences() -> None:
    """Packed rows, against one sequence a row: their hidden states, NumPy from there, and back through the model."""
    params, objective = tiny_runs.params_of(STUDENT, 0, spread=1.0), CORRECTIONS["clip higher"]
    rollouts, advantage = batch()
    starts, lengths = np.asarray(rollouts.prompts.lengths), np.asarray(rollouts.lengths)
    whole = np.zeros((len(lengths), max(starts + lengths)), np.int32)
    for i, (P, R) in enumerate(zip(starts, lengths, strict=True)):
        whole[i, :P], whole[i, P : P + R] = rollouts.prompts.tokens[i, -P:], rollouts.tokens[i, :R]

    def states(params: Params) -> Any:  # padding comes after all that is read
        positions = jnp.broadcast_to(jnp.arange(whole.shape[1]), whole.shape)
        return forward(params, STUDENT, jnp.asarray(whole), positions, jnp.ones_like(whole))

    hidden = np.asarray(jax.jit(states)(params), np.float64)
    head, dhidden, dhead = np.asarray(params["embed"], np.float64), np.zeros(hidden.shape), 0.0
    total, clipped = 0.0, 0.0
    for i, (P, R) in enumerate(zip(starts, lengths, strict=True)):
        loss, dhidden[i, P - 1 : P + R - 1], d, measured = naive(
            hidden[i, P - 1 : P + R - 1], head, np.asarray(rollouts.tokens)[i, :R], np.full(R, advantage[i]),
            np.asarray(rollouts.logp, np.float64)[i, :R], np.ones(R), objective,
        )  # fmt: skip
        total, dhead, clipped = total + loss, dhead + d, clipped + measured["clipped"].sum()
    want = jax.jit(lambda params, d: jax.vjp(states, params)[1](d)[0])(params, jnp.float32(dhidden))
    want["embed"] += jnp.float32(dhead)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def packed(params: Params, rows: Any) -> Any:
        (loss, count), metrics = grpo_loss(params, rows, objective=objective, **SETTINGS)
        return loss, (count, metrics)

    (loss, (count, metrics)), grads = packed(params, pack(rollouts))
    np.testing.assert_allclose(loss, total, rtol=1e-4)
    assert count == lengths.sum()  # one mean over all tokens: rows without advantage count, too
    assert metrics["clipped"] == (clipped, lengths.sum())
    assert 0 < clipped < lengths.sum()
    assert distance(grads, want) < 1e-5


@pytest.mark.parametrize(
    ("name", "correction"),
    [
        ("sampled", "tis"),
        *(
            pytest.param(name, c, marks=pytest.mark.exhaustive)
            for name, c in [("sampled", "none"), ("full", "none"), ("full", "tis"), ("topk", "none"), ("topk", "tis")]
        ),
    ],
)
def test_a_mixed_objective_is_the_sum_of_its_parts(name: Any, correction: Any) -> None:
    """β · OPD + the policy gradient of α · A, in value and gradient."""
    alpha, beta = 0.7, 0.3
    objective = Objective(name=name, k=4, correction=correction, weight=beta)
    alone = objective.model_copy(update={"weight": 1.0, "correction": correction if name == "sampled" else "none"})
    rollouts, advantage = batch()
    rows = pack(dataclasses.replace(rollouts, advantage=jnp.float32(alpha * advantage)))
    weight: Any = np.float32(np.random.default_rng(4).random(rows.tokens.shape))
    rows = dataclasses.replace(rows, weight=weight)
    with jax.enable_x64(True):
        rows = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64 if x.dtype == np.float32 else None), rows)
        wide: Any = [
            jax.tree.map(lambda w: jnp.float64(w), tiny_runs.params_of(n, i)) for i, n in enumerate((STUDENT, TEACHER))
        ]
        scores = make_score(TEACHER, dtype=jnp.float64)(wide[1], rows)
        assert scores.hidden.dtype == jnp.float64
        settings = SETTINGS | {"dtype": jnp.float64}

        def mixed(params: Params) -> Any:
            return opd_loss(params, rows, scores, objective=objective, metrics=False, **settings)[0]

        def parts(params: Params) -> Any:
            opd = opd_loss(
                params, dataclasses.replace(rows, advantage=None), scores, objective=alone, metrics=False, **settings
            )[0]
            policy = grpo_loss(params, rows, objective=objective, **settings)[0]
            return beta * opd[0] + policy[0], policy[1]

        both = jax.jit(lambda params: [jax.value_and_grad(f, has_aux=True)(params) for f in (mixed, parts)])
        ((got, count), grads), ((want, n), want_grads) = both(wide[0])
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert count == n
        assert distance(grads, want_grads) < 1e-6
