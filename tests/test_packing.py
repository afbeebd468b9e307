"""Packed rows against rows padded one by one: every token once, the same loss and gradient, nothing compiled twice."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STUDENT, TEACHER, VOCAB, distance

from opd_jax.config import Objective, Optimizer
from opd_jax.config_files import parse_config
from opd_jax.errors import InputError
from opd_jax.evaluation.heldout import make_measure
from opd_jax.losses import distillation_loss
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, forward, head, parameter_shardings
from opd_jax.objectives.opd import opd_loss
from opd_jax.objectives.sft import sft_loss
from opd_jax.sampling import packing
from opd_jax.sampling.packing import pack, pack_texts, place
from opd_jax.sampling.states import hidden_states
from opd_jax.teacher import make_score
from opd_jax.training.graphs import rows_per_pass
from opd_jax.training.optimizer import make_optimizer
from opd_jax.training.state import create_state
from opd_jax.training.step import global_gradient, make_update
from opd_jax.types import Params, Rollouts, Scores, Sequences

PROMPT, RESPONSE, ROWS = 6, 9, 16
# a sliding window in the first layer, so that a leak between neighbours in a row would reach the other with it
WINDOWED = dataclasses.replace(STUDENT, windows=(3, None))
OBJECTIVES = [
    Objective(name="sampled", k=4, correction="tis"),
    Objective(name="full", k=4),
    Objective(name="topk", k=4),
    Objective(name="topk_reference", k=4),
]
gradient = jax.jit(global_gradient, static_argnums=0, static_argnames=("micro_batch", "layout"))


def ragged(seed: int = 0, rows: int = ROWS, longest: int = RESPONSE) -> Any:
    """Among them responses of one token, and one that fills the width behind the longest prompt."""
    rollouts: Any = jax.device_get(tiny_runs.make_rollouts(rows, PROMPT, RESPONSE))
    rng = np.random.default_rng(seed)
    prompt_lengths = rng.integers(1, PROMPT + 1, rows)
    lengths = np.minimum(rng.geometric(0.4, rows), longest)
    lengths[:3], prompt_lengths[2] = (1, 1, longest), PROMPT
    inside = np.arange(RESPONSE) < lengths[:, None]
    tokens, prompts = rng.integers(0, VOCAB, (rows, RESPONSE)), rng.integers(0, VOCAB, (rows, PROMPT))
    return rollouts.replace(
        prompts=rollouts.prompts.replace(
            tokens=np.where(np.arange(PROMPT) >= PROMPT - prompt_lengths[:, None], prompts, 0).astype(np.int32),
            lengths=prompt_lengths.astype(np.int32),
        ),
        tokens=np.where(inside, tokens, 0).astype(np.int32),
        lengths=lengths.astype(np.int32),
        logp=np.where(inside, -rng.random((rows, RESPONSE)) * 4, 0).astype(np.float32),
        topk_ids=np.argsort(rng.random((rows, RESPONSE, VOCAB)), axis=-1)[..., :4].astype(np.int32),
    )


def texts(rollouts: Rollouts) -> list[tuple[list[int], list[int]]]:
    prompts = zip(rollouts.prompts.tokens, rollouts.prompts.lengths, strict=True)
    responses = zip(rollouts.tokens, rollouts.lengths, strict=True)
    return [(p[len(p) - m :].tolist(), y[:n].tolist()) for (p, m), (y, n) in zip(prompts, responses, strict=True)]


@pytest.mark.parametrize("separate", [False, True])
def test_every_token_stands_in_one_place(separate: bool) -> None:
    for seed in range(20):
        rollouts = ragged(seed)
        rows = pack(rollouts, separate=separate)
        assert rows.tokens.shape == (ROWS, PROMPT + RESPONSE)
        used = 0
        for i, (prompt, response) in enumerate(texts(rollouts)):
            (row, *others), columns = np.nonzero(rows.segments == i + 1)
            n, whole, r = len(columns), prompt + response, len(response)
            used += n
            assert set(others) <= {row}
            np.testing.assert_array_equal(np.diff(columns), 1)
            np.testing.assert_array_equal(rows.tokens[row, columns], whole[:-1])
            np.testing.assert_array_equal(rows.targets[row, columns], whole[1:])
            np.testing.assert_array_equal(rows.positions[row, columns], np.arange(n))
            np.testing.assert_array_equal(rows.depth[row, columns], [-1] * (n - r) + list(range(r)))
            np.testing.assert_array_equal(rows.mask[row, columns], np.arange(n) >= len(prompt) - 1)
            assert rows.logp is not None
            assert rows.topk_ids is not None
            np.testing.assert_array_equal(rows.logp[row, columns[-r:]], rollouts.logp[i, :r])
            np.testing.assert_array_equal(rows.topk_ids[row, columns[-r:]], rollouts.topk_ids[i, :r])
            assert not separate or (row, columns[0]) == (i, 0)
        assert used == (rows.segments > 0).sum()
        empty = rows.segments == 0
        for name in ("tokens", "targets", "positions", "logp"):
            assert not getattr(rows, name)[empty].any()
        assert (rows.depth[empty] == -1).all()
        corpus = pack_texts(texts(rollouts), PROMPT, RESPONSE, separate=separate)
        for name in ("tokens", "positions", "segments", "targets", "depth"):
            np.testing.assert_array_equal(getattr(corpus, name), getattr(rows, name))


def test_no_two_rows_would_fit_into_one() -> None:
    """The rule of first fit; rows that are left empty are the last."""
    for seed in range(20):
        rows = pack(ragged(seed))
        fill = (rows.segments > 0).sum(1)
        filled = fill[fill > 0]
        assert (fill[: len(filled)] > 0).all()
        assert len(filled) < ROWS * 2 / 3
        assert np.sort(filled)[:2].sum() > PROMPT + RESPONSE


@pytest.mark.parametrize("separate", [False, True])
def test_sequences_stay_with_the_process_that_sampled_them(separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes with the shards 0, 1 | 2, 3: each writes only rows of its own, together they are the whole."""
    owners = [5, 5, 7, 7]
    used = np.random.default_rng(0).integers(1, 12, 32)
    row, _ = place(used, 12, 40, owners, separate)
    np.testing.assert_array_equal(np.take(owners, row // 10), np.repeat(owners, 8))
    for own in (row[:16], row[16:]):  # dealt in turn: neither shard has more than one row more
        per_shard = np.bincount(np.unique(own) // 10)
        assert np.ptp(per_shard[per_shard > 0]) <= 1

    parts = []
    for mine in ([True, True, False, False], [False, False, True, True], [True] * 4):
        monkeypatch.setattr(packing, "_owners", lambda _: owners)
        monkeypatch.setattr(packing, "own_rows", lambda *_, mine=mine: np.array(mine))
        parts.append(pack(ragged(), separate=separate))
    one, two, whole = parts
    assert not one.segments[8:].any()
    assert not two.segments[:8].any()
    np.testing.assert_array_equal(one.segments + two.segments, whole.segments)
    np.testing.assert_array_equal(one.tokens + two.tokens, whole.tokens)
    assert set(np.unique(one.segments)) == set(range(9))


def test_what_does_not_fit_is_refused() -> None:
    rollouts = ragged()
    with pytest.raises(InputError, match="each with a prompt and a response"):
        pack(rollouts.replace(lengths=rollouts.lengths * 0))
    with pytest.raises(InputError, match=r"sequences to pack.*size 16.*mesh.data"):
        pack(rollouts, layout=Layout(make_mesh(6, 1, 1, devices=jax.devices()[:6])))
    with pytest.raises(InputError, match=r"micro_batch = 5: must divide the 16 rows"):
        make_score(TEACHER, micro_batch=5)(tiny_runs.params_of(TEACHER, 1), pack(rollouts))


@functools.cache
def weights() -> tuple[Params, Params]:
    return tiny_runs.params_of(STUDENT, 0), tiny_runs.params_of(TEACHER, 1)


def packed_loss(params: Params, rows: Sequences, hidden: Any, teacher_head: Any, *, objective: Objective, **kw: Any):
    scores = Scores(hidden, teacher_head)
    return opd_loss(params, rows, scores, config=WINDOWED, objective=objective, vocab_size=VOCAB, **kw)


def padded_states(params: Params, config: DecoderConfig, rollouts: Rollouts) -> Any:
    """One right-aligned prompt and its response a row; the states that predict the response, [B, R, D]."""
    tokens = jnp.concatenate([rollouts.prompts.tokens, rollouts.tokens[:, :-1]], axis=1)
    columns = jnp.arange(tokens.shape[1]) - (PROMPT - rollouts.prompts.lengths[:, None])
    real = (columns >= 0) & (columns < (rollouts.prompts.lengths + rollouts.lengths)[:, None])
    return forward(params, config, tokens, jnp.maximum(columns, 0), real.astype(jnp.int32))[:, PROMPT - 1 :]


@functools.partial(jax.jit, static_argnums=3)
@functools.partial(jax.value_and_grad, has_aux=True)
def padded(params: Params, teacher: Params, rollouts: Rollouts, objective: Objective) -> Any:
    (total, count), metrics = distillation_loss(
        padded_states(params, WINDOWED, rollouts), head(params), padded_states(teacher, TEACHER, rollouts),
        head(teacher), rollouts.tokens, jnp.arange(RESPONSE) < rollouts.lengths[:, None], objective,
        vocab_size=VOCAB, metric_k=4, topk_ids=rollouts.topk_ids,
        behaviour_logp=None if objective.correction == "none" else rollouts.logp,
    )  # fmt: skip
    return total / count, metrics


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(o, id=o.name, marks=[pytest.mark.exhaustive] * (o.name in ("sampled", "topk_reference")))
        for o in OBJECTIVES
    ],
)
def test_packed_equals_padded(objective: Objective) -> None:
    params, teacher = weights()
    rollouts = ragged()
    (want, want_metrics), want_grads = padded(params, teacher, rollouts, objective)
    rows = pack(rollouts)
    scores = make_score(TEACHER, micro_batch=4)(teacher, rows)
    loss_fn = functools.partial(packed_loss, objective=objective)
    grads, loss, metrics = gradient(loss_fn, params, rows, scores.hidden, frozen=scores.head, micro_batch=2)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert distance(grads, want_grads) < 1e-5
    assert metrics.keys() == want_metrics.keys() | {"padding"}
    for name, (total, count) in want_metrics.items():
        np.testing.assert_allclose(metrics[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(metrics[name][1], count, err_msg=name)
    assert metrics["padding"][1] == -(-np.sum(rows.segments.any(1)) // 2) * 2 * (PROMPT + RESPONSE)


def test_packed_equals_padded_in_supervised_fine_tuning() -> None:
    """Rows one by one, all at once; packed, in passes; the loss also by hand."""
    params, pairs = weights()[0], texts(ragged())
    loss_fn = functools.partial(sft_loss, config=WINDOWED, vocab_size=VOCAB, dtype=jnp.float32)
    want, separate, _ = gradient(loss_fn, params, pack_texts(pairs, PROMPT, RESPONSE, separate=True))
    grads, loss, metrics = gradient(loss_fn, params, pack_texts(pairs, PROMPT, RESPONSE), micro_batch=2)
    logp = jax.nn.log_softmax((padded_states(params, WINDOWED, ragged()) @ head(params).T)[..., :VOCAB])
    of_tokens = np.take_along_axis(np.asarray(logp), np.asarray(ragged().tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, -of_tokens[tiny_runs.response_mask(ragged())].mean(), rtol=1e-5)
    np.testing.assert_allclose(loss, separate, rtol=1e-5)
    assert distance(grads, want) < 1e-5
    assert metrics["token_accuracy"][1] == ragged().lengths.sum()


def test_defect_16_padding_and_neighbours_are_not_attended_to() -> None:
    """MaxText let padding of packed rows be seen by real tokens: other ids there change no bit of a state."""
    rows: Any = pack(ragged())
    states = jax.jit(functools.partial(hidden_states, config=WINDOWED))
    want = np.asarray(states(weights()[0], rows=rows))
    others = (rows.tokens + 7) % VOCAB
    padding = np.asarray(states(weights()[0], rows=rows.replace(tokens=np.where(rows.segments, rows.tokens, others))))
    np.testing.assert_array_equal(padding[rows.segments > 0], want[rows.segments > 0])
    odd = rows.segments % 2 == 1
    neighbours = np.asarray(states(weights()[0], rows=rows.replace(tokens=np.where(odd, rows.tokens, others))))
    np.testing.assert_array_equal(neighbours[odd], want[odd])
    assert sum(len(set(row[row > 0] % 2)) == 2 for row in rows.segments) > 3, "no row has an odd and an even one"


def test_batches_of_any_fill_compile_once() -> None:
    optimizer, _ = make_optimizer(Optimizer(lr=1e-3), 10)
    traced: list[None] = []

    def loss_fn(*args: Any) -> Any:
        traced.append(None)
        return packed_loss(*args, objective=OBJECTIVES[1], metrics=False)

    update, score = make_update(loss_fn, optimizer, micro_batch=2), make_score(TEACHER, micro_batch=2)
    state, computed, once = create_state(weights()[0], optimizer), [], 0
    for longest in (1, 5, RESPONSE):
        rows = pack(ragged(longest=longest))
        scores = score(weights()[1], rows)
        state, metrics = update(state, rows, scores.hidden, frozen=scores.head)
        once = once or len(traced)
        passes = -(-np.sum(rows.segments.any(1)) // 2)
        assert metrics["padding"][1] == passes * 2 * (PROMPT + RESPONSE)
        empty = ~rows.segments.any(1)
        assert not np.asarray(scores.hidden)[empty][-2:].any()  # no pass wrote there
        computed.append(float(metrics["padding"][1]))
    assert len(traced) == once
    assert update._cache_size() == 1
    assert len(set(computed)) > 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("sizes", "micro_batch", "separate"),
    [
        ((8, 1, 1), 8, False),
        ((2, 2, 2), 4, False),
        pytest.param((2, 2, 2), 8, True, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_packed_rows_on_a_mesh(sizes: tuple[int, int, int], micro_batch: int, separate: bool) -> None:
    """Losses, gradients and the metrics of every sequence, against padded rows on one device."""
    layout = Layout(make_mesh(*sizes))
    params, teacher = weights()
    (want, _), want_grads = padded(params, teacher, ragged(), OBJECTIVES[1])
    placed = [jax.device_put(p, parameter_shardings(c, layout)) for p, c in ((params, WINDOWED), (teacher, TEACHER))]
    rows = layout.put_rows(pack(ragged(), separate=separate, multiple=micro_batch, layout=layout))
    scores = make_score(TEACHER, layout=layout, micro_batch=micro_batch)(placed[1], rows)
    assert scores.hidden.sharding.is_equivalent_to(layout.sharding(("batch",)), 3)
    loss_fn = functools.partial(packed_loss, objective=OBJECTIVES[1], layout=layout, metrics=False)
    grads, loss, _ = gradient(
        loss_fn, placed[0], rows, scores.hidden, frozen=scores.head, micro_batch=micro_batch, layout=layout
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert distance(jax.device_get(grads), want_grads) < 1e-5
    settings: Any = {"k": 4, "vocab_size": VOCAB, "dtype": jnp.float32, "shown": 99}
    measure = make_measure(WINDOWED, layout=layout, micro_batch=micro_batch, **settings)
    got, tokens = measure(placed[0], rows, scores.hidden, scores.head)
    alone = pack(ragged(), separate=True)
    scores = make_score(TEACHER)(teacher, alone)
    one_by_one, by_token = make_measure(WINDOWED, layout=None, **settings)(params, alone, scores.hidden, scores.head)
    for name, (total, count) in one_by_one.items():
        np.testing.assert_allclose(got[name][0], total, rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_array_equal(got[name][1], count, err_msg=name)
    np.testing.assert_array_equal(one_by_one["reverse_kl"][1], ragged().lengths)
    for name, values in by_token.items():
        np.testing.assert_allclose(tokens[name][: len(values)], values, rtol=1e-4, atol=1e-4, err_msg=name)
    assert not np.asarray(by_token["reverse_kl"])[~tiny_runs.response_mask(ragged())].any()


def test_rows_of_a_pass() -> None:
    """Given, or an eighth of the batch, so that empty rows can be left out; all where nothing is packed."""

    def rows(shards: int, **settings: Any) -> int:
        tree = {
            "run_dir": "r", "steps": 1, "student": {"path": "s"}, "teacher": {"path": "t"}, "data": {"source": "d"},
            "rollout": {"prompts": 24, "samples": 2}, **settings,
        }  # fmt: skip
        return rows_per_pass(parse_config(tree), shards)

    assert rows(1) == 6
    assert rows(4) == 4 * 2
    assert rows(48) == 48
    assert rows(4, micro_batch=16) == 16
    assert rows(4, pack=False) == 48
