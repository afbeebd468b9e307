"""What the loop does beside a step: several updates a batch, schedules of lengths, weights of positions, skipped
updates, the collapse alarm."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from tiny_runs import STUDENT, TEACHER, VOCAB, distance

from opd_jax.config import Config, Length, Objective
from opd_jax.config_files import parse_config
from opd_jax.errors import Failed
from opd_jax.losses import distillation_loss
from opd_jax.models.decoder import head
from opd_jax.objectives.opd import opd_loss
from opd_jax.sampling.packing import pack, split
from opd_jax.sampling.states import hidden_states
from opd_jax.training import loop
from opd_jax.training.loop import train
from opd_jax.training.stages import weighted
from opd_jax.types import Scores


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


def rows_of(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]


def test_parts_of_a_batch_hold_every_row_once() -> None:
    rollouts = tiny_runs.make_rollouts()
    parts = split(rollouts, 4)
    assert [len(p.lengths) for p in parts] == [2] * 4
    together = np.concatenate([p.prompts.ids for p in parts])
    np.testing.assert_array_equal(np.sort(together), np.asarray(rollouts.prompts.ids))
    for part in parts:
        np.testing.assert_array_equal(part.tokens, np.asarray(rollouts.tokens)[np.asarray(part.prompts.ids)])


@pytest.mark.exhaustive
def test_several_updates_on_each_batch_of_rollouts(models: Path, tmp_path: Path) -> None:
    """Two updates a step, each on half of the rows; a resumed run goes on with the step after."""
    settings: dict[str, Any] = {"objective": {"name": "sampled", "k": 4, "correction": "tis"}}
    settings |= {"mesh": {"data": 2, "tensor": 4}}
    config = tiny_runs.run_config(models, tmp_path / "run", steps=2, updates=2, **settings)
    train(config)
    rows = rows_of(config)
    assert [row["step"] for row in rows] == [1, 2]
    whole = tiny_runs.run_config(models, tmp_path / "whole", steps=1, **settings)
    train(whole)
    assert rows[0]["response_length"] == rows_of(whole)[0]["response_length"]
    assert rows[0]["loss"] != rows_of(whole)[0]["loss"]  # the second half met the weights after the first
    longer = config.model_copy(update={"steps": 3})
    train(longer, resume=True)
    assert [row["step"] for row in rows_of(longer)] == [1, 2, 3]
    assert np.isfinite(rows_of(longer)[2]["loss"])


@pytest.mark.exhaustive
def test_response_length_as_a_schedule(models: Path, tmp_path: Path) -> None:
    """No response is longer than the schedule allows, and at its last step some are as long as max_response."""
    rollout = {"prompts": 4, "samples": 2, "max_response": 10, "length": {"start": 2, "steps": 5}}
    config = tiny_runs.run_config(models, tmp_path / "run", steps=5, rollout=rollout)
    train(config)
    lengths = [row["response_length"] for row in rows_of(config)]
    assert all(mean <= limit for mean, limit in zip(lengths, [2, 4, 6, 8, 10], strict=True))
    assert lengths[0] > 1.5
    assert lengths[-1] > 4


def test_length_schedules() -> None:
    assert [Length(start=2, steps=5).at(step, 10) for step in (1, 2, 3, 4, 5, 6, 99)] == [2, 4, 6, 8, 10, 10, 10]
    assert [Length(start=8, end=4, steps=3).at(step, 100) for step in (1, 2, 3, 4)] == [8, 6, 4, 4]
    assert Length(start=50, end=80, steps=1).at(1, 60) == 50


def test_positions_weigh_as_they_should() -> None:
    """Packed rows with discount, skip and a horizon against one sequence a row with weights written out."""
    rollouts, objective = tiny_runs.make_rollouts(), Objective(k=4)
    positions = {"horizon": {"start": 3, "end": 7, "steps": 5}, "discount": 0.9, "skip": 1}
    config = tiny_runs.run_config(Path("unused"), Path("unused"), positions=positions)
    params, teacher = tiny_runs.params_of(STUDENT, 0), tiny_runs.params_of(STUDENT, 3)
    rows = weighted(pack(rollouts), config, step=3)  # horizon 5
    plain = pack(rollouts, separate=True)
    t = np.asarray(plain.depth)
    want_weight = np.where((t >= 1) & (t < 5), 0.9 ** np.maximum(t, 0), 0.0)

    def loss(params: Any) -> Any:
        hidden = hidden_states(params, STUDENT, plain)
        (total, count), _ = distillation_loss(
            hidden, head(params), hidden_states(teacher, STUDENT, plain), head(teacher), plain.targets, plain.mask,
            objective, vocab_size=VOCAB, weights=jnp.asarray(want_weight, jnp.float32), metrics=False,
        )  # fmt: skip
        return total / count

    def ours(params: Any) -> Any:
        scores = Scores(hidden_states(teacher, STUDENT, rows), head(teacher))
        (total, count), _ = opd_loss(params, rows, scores, config=STUDENT, objective=objective, vocab_size=VOCAB)
        return total / count

    want, want_gradient = jax.jit(jax.value_and_grad(loss))(params)
    got, gradient = jax.jit(jax.value_and_grad(ours))(params)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert distance(gradient, want_gradient) < 1e-5
    untouched = tiny_runs.run_config(Path("unused"), Path("unused"))
    assert weighted(plain, untouched, 1) is plain


def with_nan_teacher(steps: set[int], config: Config) -> Any:
    """``prepare`` of a run whose teacher says NaN at some steps."""
    setup = real_prepare(config)
    teaching: Any = setup.teaching
    calls = 0

    def broken(params: Any, rows: Any) -> Any:
        nonlocal calls
        calls += 1
        scores = teaching.score(TEACHER)(params, rows)
        return scores.replace(hidden=scores.hidden * np.nan) if calls in steps else scores

    return dataclasses.replace(setup, teaching=dataclasses.replace(teaching, score=lambda _: broken))


real_prepare = loop.prepare


def test_a_batch_that_is_not_finite_is_kept_and_the_run_goes_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "prepare", functools.partial(with_nan_teacher, {2, 3}))
    config = tiny_runs.run_config(models, tmp_path / "run", steps=4, max_skipped=3)
    train(config)
    rows = rows_of(config)
    assert [row["skipped"] for row in rows] == [0, 1, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, True, False]
    kept = sorted((tmp_path / "run" / "skipped").iterdir())
    assert [path.name for path in kept] == ["step2-update0-process0.npz", "step3-update0-process0.npz"]
    with np.load(kept[0]) as batch:
        assert batch["tokens"].shape == batch["depth"].shape
        assert (batch["depth"] >= 0).sum() == round(8 * rows[1]["response_length"])
    assert "loss or gradient not finite" in " ".join(capsys.readouterr().err.split())


@pytest.mark.exhaustive
def test_a_run_that_learns_nothing_any_more_ends(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count goes on across a resume: one skipped before the stop, two after it."""
    monkeypatch.setattr(loop, "prepare", functools.partial(with_nan_teacher, {2}))
    config = tiny_runs.run_config(models, tmp_path / "run", steps=2, max_skipped=3)
    train(config)
    monkeypatch.setattr(loop, "prepare", functools.partial(with_nan_teacher, {1, 2, 3, 4}))
    with pytest.raises(Failed, match="not finite in 3 steps in a row, up to step 4"):
        train(config.model_copy(update={"steps": 8}), resume=True)
    assert [row["step"] for row in rows_of(config)] == [1, 2, 3, 4]


@pytest.mark.parametrize("alarm", ["stop", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("off", "warn"))])
def test_the_alarm_in_a_run(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alarm: str) -> None:
    """What ``collapse`` says is tested by itself; here what the loop does with it."""
    monkeypatch.setattr(loop, "collapse", lambda history: "overlap fell" if len(history) == 3 else None)
    config = tiny_runs.run_config(models, tmp_path / "run", steps=4, alarm=alarm, checkpoint={"every": 2})
    if alarm == "stop":
        with pytest.raises(Failed, match=r"step 3: the run may be collapsing: overlap fell\."):
            train(config)
        assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2"]
    else:
        train(config)
    said = [row.get("alarm") for row in rows_of(config)]
    assert (
        said
        == {"off": [None] * 4, "warn": [None, None, "overlap fell", None], "stop": [None, None, "overlap fell"]}[alarm]
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": 3}, "updates=3 does not divide"),
        ({"updates": 2, "objective": {"name": "sampled"}}, "set objective.correction=tis"),
        ({"updates": 2, "micro_batch": 8}, "micro_batch=8 does not divide"),
        ({"positions": {"discount": 1.5}}, "positions.discount"),
        ({"rollout": {"length": {"start": 0, "steps": 3}}}, "rollout.length.start"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    base = tiny_runs.run_config(Path("m"), Path("r")).model_dump(mode="json")
    with pytest.raises(ValueError, match=message):
        parse_config(base | settings)
