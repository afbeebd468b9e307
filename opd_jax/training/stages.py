"""One training step on the host: prompts, rollouts, rewards, scores, updates; what each took and what they measured."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from typing import Any

import jax
import numpy as np

from opd_jax import hosts
from opd_jax.config import Config
from opd_jax.errors import InputError
from opd_jax.evaluation.rewards import Judged
from opd_jax.mesh import own_rows
from opd_jax.objectives.grpo import group_advantages
from opd_jax.sampling.packing import join_texts, split
from opd_jax.training.setup import Setup, rollout_law
from opd_jax.training.state import TrainState
from opd_jax.training.throughput import throughput, update_flops
from opd_jax.types import Metrics, Rollouts, Sequences

Row = dict[str, Any]
StepResult = tuple[TrainState, Row, list[Sequences]]  # … and the rows of updates that were skipped


def rollout_step(setup: Setup, state: TrainState, step: int) -> StepResult:
    """Sample, judge, score, update: on-policy distillation, and GRPO (paper §2, A.1)."""
    graphs, config = setup.graphs, setup.config
    clock = Clock()
    batch = clock("data", next(setup.batches))
    prompts, texts = batch if config.off_policy else (batch, [])
    sampled = _sampled(setup, state, step, prompts, clock) if prompts is not None else None
    judged: Row = {}
    if setup.judge and sampled:
        sampled, judged = clock("reward", rewarded(setup, sampled))
    sizes = config.data.max_prompt, config.rollout.max_response
    host: Any = join_texts(sampled, texts, *sizes, setup.layout) if texts else sampled
    measure = (step - 1) % config.metrics_every == 0
    update = graphs.update if measure else graphs.update_unmeasured
    metrics, skipped = [], []
    for part in split(host, config.updates, setup.layout):
        if setup.teaching:
            packed, beside, columns = setup.teaching.pack(part)
            packed = setup.teaching.weigh(part, weighted(packed, config, step))
            if texts:  # nobody's most probable ids are known there: the loss takes the student's own
                packed = packed.replace(logp=None, topk_ids=None)  # pyright: ignore[reportAttributeAccessIssue]
            rows = clock("pack", setup.layout.put_rows(packed))
            scores = clock("score", setup.teaching.scores(state.moving, part, rows, beside, columns))
            state, measured = clock("update", update(state, rows, scores.hidden, frozen=scores.head))
        else:
            packed = weighted(graphs.pack(part), config, step)
            rows = clock("pack", setup.layout.put_rows(packed))
            state, measured = clock("update", update(state, rows))
        metrics.append(hosts.fetch(measured))
        if not _finite(metrics[-1]):
            skipped.append(packed)
    row = means(jax.tree.map(lambda *x: sum(x), *metrics)) | judged | {
        "padding_unpacked": 1 - float(np.mean(host.prompts.lengths + host.lengths - 1)) / packed.tokens.shape[1],
    }  # fmt: skip
    if sampled is not None:
        row["response_length"] = float(np.mean(sampled.lengths))
        row["truncation_rate"] = float(np.mean(~np.asarray(sampled.stopped)))
        if step == 1:
            row["rollouts"] = digest(sampled)
    row |= _rates(setup, clock, host.prompts.lengths, host.lengths, measure)
    return state, row | _common(setup, state) | clock.row(), skipped


def _sampled(setup: Setup, state: TrainState, step: int, prompts: Any, clock: Clock) -> Rollouts:
    config = setup.config
    weights = clock("reshard", setup.graphs.engine(setup.student).cast(state.params))
    limit = config.rollout.length and config.rollout.length.at(step, config.rollout.max_response)
    return clock("rollout", setup.rollout(weights, prompts, rollout_law(config), config.seed, step, limit))


def sft_step(setup: Setup, state: TrainState, step: int) -> StepResult:
    """One update on texts of a corpus."""
    clock = Clock()
    host = clock("data", next(setup.batches))
    packed = setup.graphs.pack_texts(host)
    rows = clock("pack", setup.layout.put_rows(packed))
    state, metrics = clock("update", setup.graphs.update(state, rows))
    metrics = hosts.fetch(metrics)
    prompts, responses = (np.array([len(text[i]) for text in host]) for i in (0, 1))
    row = means(metrics) | {"padding_unpacked": 1 - float(np.mean(prompts + responses - 1)) / packed.tokens.shape[1]}
    row |= _rates(setup, clock, prompts, responses, True)
    return state, row | _common(setup, state) | clock.row(), [] if _finite(metrics) else [packed]


def rewarded(setup: Setup, rollouts: Rollouts) -> tuple[Rollouts, Row]:
    """Rollouts with ``advantage``, and what the rewards were. Every process judges its own rows; all know them all."""
    reward, judge = setup.config.reward, setup.judge
    assert reward
    assert judge
    B, samples = len(rollouts.lengths), setup.config.rollout.samples
    mine = np.flatnonzero(own_rows(setup.layout, B)).tolist()
    ids, lengths = np.asarray(rollouts.prompts.ids), np.asarray(rollouts.lengths)

    def judged(i: int) -> Judged:
        record, n = setup.records[int(ids[i])], int(lengths[i])
        text = setup.tokenizer.decode(np.asarray(rollouts.tokens[i, :n]).tolist(), skip_special_tokens=True)
        return Judged(record.id, record.problem, record.answer, text, n, bool(rollouts.stopped[i]))

    with hosts.refused_together():
        terms = judge([judged(i) for i in mine])
    names = list(terms)
    values = np.full((len(names), B), np.nan)
    values[:, mine] = [terms[name] for name in names]
    terms = dict(zip(names, hosts.merge(values), strict=True))
    total = judge.total(terms)
    advantages = reward.weight * group_advantages(total, samples, reward.advantage)
    known = np.isfinite(total)
    if not known.any():
        raise InputError(
            f"reward.terms: none of the {B} responses of a step could be judged, so there is nothing to learn from. "
            "Mend the function; reward.skip_bad=true leaves out single responses."
        )
    flat = np.all(advantages.reshape(-1, samples) == 0, axis=1)
    row = {f"reward/{name}": _mean(terms[name]) for name in names} | {
        "reward": _mean(total),
        "reward_groups_alike": float(np.mean(flat)),  # no gradient comes from them
    }
    if reward.skip_bad:
        row["reward_skipped"] = int(np.sum(~known))
    return dataclasses.replace(rollouts, advantage=advantages.astype(np.float32)), row  # pyright: ignore


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def digest(rollouts: Rollouts) -> str:
    """Of the bits of tokens and behaviour log-probabilities; of several processes, of this one's rows."""
    arrays = (rollouts.tokens, rollouts.lengths, rollouts.logp)
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in arrays)).hexdigest()[:16]


def weighted(rows: Sequences, config: Config, step: int) -> Sequences:
    """Rows with the weights of ``config.positions`` at a step; as they are where all positions weigh the same."""
    p = config.positions
    if p == type(p)():
        return rows
    longest = config.rollout.max_response
    horizon = longest if p.horizon is None else p.horizon.at(step, longest)
    depth = np.asarray(rows.depth)
    weight = np.where((depth >= p.skip) & (depth < horizon), np.float32(p.discount) ** np.maximum(depth, 0), 0.0)
    return rows.replace(weight=weight.astype(np.float32))  # pyright: ignore[reportAttributeAccessIssue]


def means(metrics: Metrics) -> Row:
    """(sum, count) → mean, on the host; curves over position become lists, with null where a bin is empty."""

    def mean(total: Any, count: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.asarray(total, np.float64) / np.asarray(count, np.float64)
        return ratio.tolist()

    return {name: mean(*value) for name, value in metrics.items()}


def _finite(metrics: Metrics) -> bool:
    """Whether the update was made (``make_update`` skips those that are not finite)."""
    return all(bool(np.isfinite(metrics[name][0])) for name in ("loss", "gradient_norm"))


class Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, result: Any) -> Any:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
        return result

    def row(self) -> Row:
        return {f"time/{stage}": seconds for stage, seconds in self.seconds.items()}


def _rates(setup: Setup, clock: Clock, prompts: np.ndarray, responses: np.ndarray, measure: bool) -> Row:
    teacher = setup.teacher.config if setup.teacher else None
    flops = update_flops(setup.config, setup.student, teacher, prompts, responses, metrics=measure)
    rates = throughput(prompts, responses, clock.seconds, flops, list(setup.layout.mesh.devices.flat))
    plain = update_flops(setup.config, setup.student, teacher, prompts, responses, metrics=False)
    return {"update_flops": flops} | ({"metrics_flops": flops - plain} if measure else {}) | rates


def _common(setup: Setup, state: TrainState) -> Row:
    updates, skipped = hosts.fetch((state.step, state.skipped))
    epochs = {f"epoch/{name}" if name else "epoch": value for name, value in setup.batches.epochs().items()}
    return {"learning_rate": float(hosts.fetch(setup.graphs.schedule(updates - 1))), "skipped": int(skipped)} | epochs
