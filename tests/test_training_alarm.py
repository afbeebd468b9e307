"""The collapse alarm on made histories: quiet on noise and ordinary progress, loud on a collapse, within ten steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from opd_jax.training.alarm import FEWEST, RECENT, collapse

STEPS, TURN = 120, 60


def healthy(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """What a run that learns logs: overlap rises, entropy and gradients fall, with noise and single gradient spikes."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        done = step / STEPS
        spike = 20.0 if rng.random() < 0.05 else 1.0
        rows.append(
            {
                "step": step + 1,
                "overlap_ratio": 0.7 + 0.2 * done + 0.01 * rng.normal(),
                "truncation_rate": float(np.clip(0.3 - 0.2 * done + 0.04 * rng.normal(), 0, 1)),
                "gradient_norm": float(np.exp(-1 - 2 * done + 0.4 * rng.normal()) * spike),
                "student_entropy_by_position": [0.5 - 0.1 * done + 0.05 * x for x in rng.normal(size=8)] + [None, None],
            }
        )
    return rows


def collapsing(what: str, seed: int) -> list[dict[str, Any]]:
    rows = healthy(seed)
    for i, row in enumerate(rows[TURN:], start=1):
        if what == "entropy":  # from the end of the response forward
            row["student_entropy_by_position"][5:8] = [0.5 + 0.3 * i] * 3
        if what == "overlap":
            row["overlap_ratio"] -= 0.04 * i
        if what == "truncation":
            row["truncation_rate"] = min(1.0, row["truncation_rate"] + 0.1 * i)
        row["gradient_norm"] *= 1 + i
    return rows


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    rows = healthy(seed)
    assert all(collapse(rows[: i + 1]) is None for i in range(STEPS))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("what", "name"),
    [("entropy", "late-position entropy"), ("overlap", "overlap with"), ("truncation", "truncated responses")],
)
def test_a_collapse_is_seen_within_ten_steps(what: str, name: str, seed: int) -> None:
    rows = collapsing(what, seed)
    seen = [i for i in range(STEPS) if collapse(rows[: i + 1])]
    assert TURN < seen[0] <= TURN + 10
    text = collapse(rows[: seen[0] + 1])
    assert text is not None
    assert name in text


def test_steps_without_metrics_do_not_dilute_the_level() -> None:
    """With ``metrics_every`` only some rows have an overlap."""
    rows = collapsing("overlap", 0)
    sparse = [row if i % 3 == 0 else {"step": row["step"], "gradient_norm": 1.0} for i, row in enumerate(rows)]
    seen = [i for i in range(STEPS) if collapse(sparse[: i + 1])]
    assert seen[0] > TURN
    assert collapse(sparse[:TURN]) is None


def test_a_short_history_says_nothing() -> None:
    rows = collapsing("truncation", 0)[TURN - 2 :]
    assert collapse(rows[: FEWEST + RECENT - 1]) is None
    assert collapse([]) is None
