"""The held-out panel: filling and grouping of rows, ratios and their errors, and a student that equals its teacher."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STUDENT, TEACHER, VOCAB

from opd_jax.data.pipeline import stack_prompts
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.heldout import (
    BY_TOKEN,
    DETAILED,
    LISTED,
    MEASURED,
    Panel,
    batches_of,
    collect,
    grade_panel,
    make_measure,
    make_panel,
    mean_metrics,
    ratio_with_error,
    sample_panel,
    token_row,
    token_texts,
)
from opd_jax.evaluation.summary import summarise_lengths
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig
from opd_jax.sampling.decode import Engine, make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.packing import pack
from opd_jax.teacher import make_score
from opd_jax.types import Params, Rollouts

SHOWN = 3  # sequences of a batch
ONE = Layout(make_mesh(1, devices=jax.devices()[:1]))


def panel_of(problems: int, samples: int, batch: int, shards: int = 1) -> Panel:
    encoded = [list(range(1, 2 + i % 5)) for i in range(problems)]
    prompts = stack_prompts(encoded, range(problems), 5, samples)
    names = [f"p{i}" for i in range(problems)]
    return make_panel(prompts, names, [str(i) for i in range(problems)], batch, shards)


@pytest.mark.parametrize(
    ("problems", "samples", "batch", "shards", "size"),
    [
        (5, 2, 4, 1, 4),
        (5, 2, 10, 1, 10),
        (3, 1, 8, 1, 3),
        (1, 1, 4, 1, 1),
        (4, 3, 1, 1, 1),
        (30, 16, 64, 1, 60),
        (5, 2, 4, 2, 4),
        (7, 1, 4, 2, 4),
        (1, 1, 4, 8, 8),
    ],
)
def test_batches_are_alike_and_every_shard_gives_its_share(
    problems: int, samples: int, batch: int, shards: int, size: int
) -> None:
    panel = panel_of(problems, samples, batch, shards)
    rows, filled = problems * samples, len(panel.prompts.lengths)
    assert {len(b) for b in panel.batches} == {size}
    assert sorted(np.concatenate(panel.batches)) == list(range(filled))
    assert filled - rows < len(panel.batches) * shards
    assert (panel.rows, panel.samples) == (rows, samples)
    for b in panel.batches:
        np.testing.assert_array_equal(b * shards // filled, np.arange(size) * shards // size)
    kept = collect([jax.tree.map(lambda x, b=b: x[b], panel.prompts) for b in panel.batches], panel)
    np.testing.assert_array_equal(kept.ids, np.repeat(np.arange(problems), samples))
    np.testing.assert_array_equal(kept.samples, np.tile(np.arange(samples), problems))
    assert (kept.lengths == [1 + i % 5 for i in kept.ids]).all()


class Letters:
    """Token 1 ends; any other is a digit in a box."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(rf"\boxed{{{i - 10}}}" for i in ids if i > 1)


def test_answers_meet_the_rows_of_their_problem() -> None:
    panel = panel_of(3, 2, 4)
    tokens = np.array([[10, 1], [11, 1], [11, 1], [11, 99], [12, 1], [1, 1], [12, 1], [12, 1]])  # two rows to fill up
    lengths = np.array([2, 2, 2, 1, 2, 1, 2, 2])
    rollouts: Any = SimpleNamespace(tokens=tokens, lengths=lengths, stopped=np.arange(8) != 3)
    with AnswerPool(1) as pool:
        row, texts, verdicts = grade_panel(rollouts, panel, Letters(), pool)
        assert texts == [r"\boxed{0}", r"\boxed{1}", r"\boxed{1}", r"\boxed{1}", r"\boxed{2}", ""]
        assert verdicts is not None
        assert [v.correct for v in verdicts] == [True, False, True, True, True, False]
        assert (row["accuracy"], row["no_answer_rate"], row["boxed_rate"]) == (4 / 6, 1 / 6, 5 / 6)
        assert (row["response_length"], row["response_length_median"]) == (10 / 6, 2)
        assert (row["truncation_rate"], row["eos_rate"]) == (1 / 6, 5 / 6)
        without = make_panel(panel.prompts, ["a", "b", "c"], ["1", None, "2"], 4)
        row, _, verdicts = grade_panel(rollouts, without, Letters(), pool)
        assert verdicts is None
        assert "accuracy" not in row


def test_ratio_with_error_against_jackknife_and_bootstrap() -> None:
    """Rows of one prompt share a random effect: errors that took rows for independent would be half as large."""
    rng = np.random.default_rng(0)
    groups, rows = 300, 4
    counts = rng.integers(1, 9, (groups, rows)).astype(float)
    sums = counts * (1 + rng.normal(size=(groups, 1)) + 0.3 * rng.normal(size=(groups, rows)))
    mean, error = ratio_with_error(sums.reshape(-1), counts.reshape(-1), groups)
    s, c = sums.sum(1), counts.sum(1)
    assert mean == pytest.approx(s.sum() / c.sum(), rel=1e-12)
    left_out = (s.sum() - s) / (c.sum() - c)
    jackknife = np.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.02)
    picks = rng.integers(0, groups, (4000, groups))
    assert error == pytest.approx((s[picks].sum(1) / c[picks].sum(1)).std(), rel=0.05)
    independent = ratio_with_error(sums.reshape(-1), counts.reshape(-1), groups * rows)[1]
    assert independent < 0.6 * error


def test_ratio_with_error_at_the_ends() -> None:
    assert ratio_with_error(np.array([2.0, 4.0]), np.array([1, 2]), 2) == (2.0, 0.0)
    mean, error = ratio_with_error(np.array([3.0]), np.array([2]), 1)
    assert mean == 1.5
    assert np.isnan(error)  # one prompt says nothing about prompts
    assert np.isnan(ratio_with_error(np.zeros(2), np.zeros(2), 2)).all()  # as where no position has an overlap
    mean, _ = ratio_with_error(np.array([5.0, 0.0]), np.array([2, 0]), 2)  # an empty prompt weighs nothing
    assert mean == 2.5


def of_shown(panel: Panel) -> np.ndarray:
    """Panel rows whose tokens are measured, in the order in which they come."""
    return np.concatenate([rows[:SHOWN] for rows in panel.batches])


def check_tokens(tokens: dict[str, np.ndarray], out: Rollouts, reverse_kl_B: np.ndarray) -> None:
    """Each token's values in their place: against what the sampler knew, and against their sums."""
    inside = tiny_runs.response_mask(out)
    assert set(tokens) == set(BY_TOKEN)
    for name, values in tokens.items():
        assert values.shape[:2] == inside.shape, name
        assert not values[~inside].any(), name
    np.testing.assert_allclose(tokens["reverse_kl"].sum(1), reverse_kl_B, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tokens["logp"][inside], np.asarray(out.logp)[inside], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tokens["student_top_ids"][..., :4][inside], np.asarray(out.topk_ids)[inside])
    np.testing.assert_allclose(
        tokens["student_top_logp"][..., :4][inside], np.asarray(out.topk_logp)[inside], rtol=1e-4, atol=1e-5
    )
    listed = tokens["teacher_top_ids"] == np.asarray(out.tokens)[..., None]
    held = listed & inside[..., None]
    assert held.any()
    whole = np.broadcast_to(tokens["logq"][..., None], held.shape)
    np.testing.assert_allclose(tokens["teacher_top_logp"][held], whole[held], rtol=1e-5)
    assert (
        tokens["logq"][inside & ~listed.any(-1)] <= tokens["teacher_top_logp"][inside & ~listed.any(-1)][:, -1]
    ).all()


def evaluate(student: Params, teacher: Params, network: DecoderConfig, panel: Panel, engine: Engine) -> dict[str, Any]:
    score = make_score(network, dtype=jnp.float32, layout=ONE, micro_batch=1)
    measure = make_measure(STUDENT, k=4, vocab_size=VOCAB, dtype=jnp.float32, layout=ONE, micro_batch=1, shown=SHOWN)
    rollouts = sample_panel(engine, engine.cast(student), panel, Law(), 0, 6)
    measured, by_token = [], []
    for out in batches_of(rollouts, panel):
        rows = pack(out)
        scores = score(teacher, rows)
        sums, tokens = measure(student, rows, scores.hidden, scores.head)
        total, count = (np.asarray(x)[: len(out.lengths)] for x in sums["reverse_kl"])
        np.testing.assert_array_equal(count, out.lengths)
        check_tokens(jax.device_get(tokens), jax.tree.map(lambda x: x[:SHOWN], out), total[:SHOWN])
        by_token.append(tokens["reverse_kl"])
        measured.append(sums)
    per_row = collect(measured, panel)
    assert {np.shape(total) for total, _ in per_row.values()} == {(panel.rows,)}
    kl = {"kl_by_token": np.concatenate(by_token)[np.argsort(of_shown(panel))].tolist()}
    lengths = summarise_lengths(rollouts.lengths[: panel.rows], rollouts.stopped[: panel.rows], panel.samples)
    return mean_metrics(per_row, panel) | lengths | kl


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(STUDENT, stop_ids=(1,), vocab_size=VOCAB, support=4, layout=ONE)


def test_a_student_that_is_its_teacher(engine: Engine) -> None:
    params = tiny_runs.params_of(STUDENT, 0)
    row = evaluate(params, params, STUDENT, panel_of(5, 1, 3), engine)
    for name in ("reverse_kl", "forward_kl", "entropy_gap", "overlap_advantage"):
        assert abs(row[name]) < 1e-6
    assert row["overlap_ratio"] == 1
    assert row["overlap_mass_student"] == pytest.approx(row["overlap_mass_teacher"], abs=1e-6)
    assert 0 < row["student_entropy"] == pytest.approx(row["teacher_entropy"], abs=1e-6)


def test_an_evaluation_repeats_itself_and_does_not_depend_on_its_batches(engine: Engine) -> None:
    """The random numbers belong to the prompts: other slots and batches give the same numbers."""
    student, teacher = tiny_runs.params_of(STUDENT, 0), tiny_runs.params_of(TEACHER, 1)
    first = evaluate(student, teacher, TEACHER, panel_of(5, 1, 3), engine)
    assert first == evaluate(student, teacher, TEACHER, panel_of(5, 1, 3), engine)
    assert set(first) >= {*MEASURED, *(name + "_se" for name in MEASURED)}
    assert first["reverse_kl"] > 0.01
    assert first["forward_kl"] > 0.01
    assert 0 <= first["overlap_ratio"] < 1
    assert first["eos_rate"] == 1 - first["truncation_rate"]
    other = evaluate(student, teacher, TEACHER, panel_of(5, 1, 5), engine)
    np.testing.assert_allclose(other.pop("kl_by_token"), first.pop("kl_by_token")[:SHOWN], rtol=1e-4, atol=1e-5)
    assert other == {name: pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True) for name, value in first.items()}


def test_without_samples_no_tokens_are_listed() -> None:
    rows = pack(tiny_runs.make_rollouts())
    hidden = jax.ShapeDtypeStruct((*rows.tokens.shape, TEACHER.width), jnp.float32)
    head = jax.ShapeDtypeStruct((TEACHER.vocab_size, TEACHER.width), jnp.float32)
    params = jax.eval_shape(lambda: tiny_runs.params_of(STUDENT, 0))
    for shown, names in ((0, set()), (99, set(BY_TOKEN))):
        measure = make_measure(STUDENT, k=4, vocab_size=VOCAB, dtype=jnp.float32, layout=None, shown=shown)
        _, tokens = jax.eval_shape(measure, params, rows, hidden, head)
        assert set(tokens) == names
        assert {len(x.shape) for x in tokens.values()} == ({2, 3} if shown else set())
        assert {x.shape[0] for x in tokens.values()} == ({rows.tokens.shape[0]} if shown else set())


def test_texts_of_tokens() -> None:
    """A tokenizer that marks words by a space in front, and drops that of the first (as SentencePiece's do)."""

    class Words:
        def decode(self, ids: list[int]) -> str:
            return "".join([" three", " blind", " mi", "ce"][i] for i in ids).strip()

    assert token_texts([0, 1, 2, 3, 2], Words()) == ["three", " blind", " mi", "ce", " mi"]


@pytest.mark.parametrize("n", [1, 2 * DETAILED, 2 * DETAILED + 1, 3000])
def test_a_sample_row_holds_the_ends_of_a_response(n: int) -> None:
    """Values of the first and the last tokens, at their tokens; a row stays below 200 kB of values."""
    rng = np.random.default_rng(n)
    tokens, scale = rng.integers(10, 20, n), np.arange(n, dtype=np.float32)
    lists = rng.integers(10, 20, (n, LISTED))
    by_token = {name: scale / 8 for name in ("reverse_kl", "logp", "logq")}
    for who in ("student", "teacher"):
        by_token |= {f"{who}_top_ids": lists, f"{who}_top_logp": np.log(np.full((n, LISTED), 0.125))}
    row = token_row(tokens, by_token, Letters())
    assert row["tokens"] == [rf"\boxed{{{i - 10}}}" for i in tokens]
    kept = [i for i in range(n) if i < DETAILED or i >= n - DETAILED]
    assert row["logq"] == row["kl_by_token"] == [round(i / 8, 4) for i in kept]
    for who in ("top_student", "top_teacher"):
        assert row[who] == [[[rf"\boxed{{{i - 10}}}", 0.125] for i in lists[j]] for j in kept]
    assert len(json.dumps({k: v for k, v in row.items() if k != "tokens"})) < 300_000
