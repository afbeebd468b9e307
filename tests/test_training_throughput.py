"""Rates of a step and the share of the peak that its update reaches, against counts made by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_runs

from opd_jax.models.flops import weight_count
from opd_jax.training.throughput import loss_flops, throughput, update_flops

PROMPTS, RESPONSES = np.array([4, 6]), np.array([3, 1])  # 6 columns each: the last token is only a target
STUDENT, TEACHER = tiny_runs.STUDENT, tiny_runs.TEACHER  # widths 32 and 48, 24 and 32 ids


def config(**settings: Any) -> Any:
    return tiny_runs.run_config(Path("models"), Path("run"), **settings)


def test_update_by_hand() -> None:
    """Three times the forward pass of 12 tokens that see 2 × 21 keys; head products of 4 response tokens."""
    layers = 3 * (2 * weight_count(STUDENT)["layers"] * 12 + 2 * (4 * 8 * 4) * 42)
    student, teacher = 2 * 24 * 32, 2 * 24 * 48  # products with the ids that both have
    expected = layers + 4 * (student + teacher + 2 * student)
    assert update_flops(config(), STUDENT, TEACHER, PROMPTS, RESPONSES, metrics=True) == expected
    of_text = update_flops(config(kind="sft"), STUDENT, None, PROMPTS, RESPONSES, metrics=True)
    assert of_text == layers + 4 * 3 * student


def test_top_k_needs_no_vocabulary_where_nothing_is_measured() -> None:
    settings = config(objective={"name": "topk", "k": 4})
    support = 2 * 4 * (2 * 32 + 48)  # logits of 4 ids of both, and the gradient in the student's
    assert loss_flops(settings, STUDENT, TEACHER, 1, metrics=False) == support
    assert loss_flops(settings, STUDENT, TEACHER, 1, metrics=True) == support + 2 * 24 * (32 + 48)


def test_rates() -> None:
    seconds = {"data": 0.5, "rollout": 1.0, "score": 2.0, "update": 0.5}
    cpus, chips = ([SimpleNamespace(device_kind=kind)] * 4 for kind in ("cpu", "TPU v5 lite"))
    row = throughput(PROMPTS, RESPONSES, seconds, 1e12, cpus)
    assert row == {
        "tokens_per_second": 4 / 4.0,
        "tokens_per_second/rollout": 4 / 1.0,
        "tokens_per_second/score": 12 / 2.0,
        "tokens_per_second/update": 12 / 0.5,
    }
    row = throughput(PROMPTS, RESPONSES, {"data": 1.0, "update": 0.5}, 1e14, chips)
    assert row["mfu"] == pytest.approx(1e14 / (0.5 * 4 * 197e12))
    assert "tokens_per_second/score" not in row
