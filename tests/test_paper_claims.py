"""Verdicts of the claims: intervals against SciPy; every claim on made-up results that bear it out or contradict it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from scipy import stats

from opd_jax.paper.claims import CLAIMS, FAILS, HOLDS, UNDECIDED, alike, interval, more, verdict

Row = dict[str, Any]


def test_interval_is_student_s_t() -> None:
    values = [0.91, 0.87, 0.95, 0.90, 0.93]
    mean, low, high = interval(values)
    expected = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose([mean, low, high], [np.mean(values), *expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (more("", [0.1, 0.11, 0.09]), HOLDS),
        (more("", [-0.1, -0.11, -0.09]), FAILS),
        (more("", [0.1, -0.1, 0.05]), UNDECIDED),
        (more("", [0.1, 0.11, 0.09], 0.5), FAILS),
        (more("", [0.7]), UNDECIDED),  # a single seed bounds nothing
        (alike("", [0.01, 0.0, -0.01]), HOLDS),
        (alike("", [0.2, 0.21, 0.19]), FAILS),
        (alike("", [-0.2, -0.21, -0.19]), FAILS),
        (alike("", [0.02, 0.04, 0.0]), UNDECIDED),
        (alike("", [0.0, 0.0, 0.0], 0.01), HOLDS),
    ],
)
def test_a_check_holds_fails_or_is_undecided_by_its_interval(check: Any, expected: str) -> None:
    assert check.verdict == expected


def test_a_claim_fails_with_one_check_and_holds_with_all() -> None:
    good, bad, open_ = more("", [1.0, 1.1]), more("", [-1.0, -1.01]), more("", [1.0, -1.0])
    good = more("", [1.0, 1.01])
    assert verdict([good, good]) == HOLDS
    assert verdict([good, open_]) == UNDECIDED
    assert verdict([good, open_, bad]) == FAILS


def run(first: float, last: float, teacher: float = 0.95, **curves: tuple[float, ...]) -> Row:
    of = {
        "accuracy": (first, last), "overlap_ratio": (0.5, 0.6), "entropy_gap": (0.3, 0.1), "student_entropy": (1, 1),
        "overlap_advantage": (-0.2, -0.01), "overlap_mass_student": (0.9, 0.99),
    } | curves  # fmt: skip
    return {
        "step": [0, 100] if len(of["accuracy"]) == 2 else [0, 50, 100],
        "evaluations": {name: _curve(ends, len(of["accuracy"])) for name, ends in of.items()},
        "steps": {"gradient_norm": [curves.get("norm", (1.0, 0.1))[0]] * 5},
        "cost": {"time/rollout": 0.1, "time/score": 0.1, "time/update": 0.3},
        "teacher_accuracy": teacher,
        "student_entropy_by_position": [[1.0, 1.0, 1.0, 1.0], [0.9, 0.9, 0.9, 1.1]],
    }


def _curve(ends: tuple[float, ...], points: int) -> list[float]:
    return list(ends) if len(ends) == points else [ends[0]] * (points - 1) + [ends[-1]]


def models(**accuracy: float) -> Row:
    return {name: {"accuracy": value} for name, value in accuracy.items()}


def depth(*gains: float) -> Row:
    return {"depths": [{"depth": i, "difference": {"value": g}} for i, g in enumerate(gains)]}


BORNE_OUT: dict[str, Row] = {
    "3.1": {
        "models": models(base=0.3, compatible=0.93, mismatched=0.95),
        "runs": {
            "compatible": run(0.3, 0.9, overlap_ratio=(0.7, 0.8)),
            "mismatched": run(0.3, 0.7, overlap_ratio=(0.3, 0.75)),
        },
    },
    "3.2": {
        "models": {},
        "runs": {"rewarded": run(0.3, 0.9), "taught": run(0.3, 0.91), "large": run(0.3, 0.35, 0.5)},
    },
    "3.3": {
        "models": models(base=0.3, rewarded=0.95, large=0.4),
        "runs": {"base": run(0.95, 0.3, 0.3), "large": run(0.95, 0.31, 0.4)},
    },
    "3.3+": {
        "models": models(base=0.3, rewarded=0.95, large=0.4),
        "runs": {"base": run(0.95, 0.3, 0.3), "large": run(0.95, 0.31, 0.4)},
    },
    "3.3b": {
        "models": models(base=0.3, rewarded=0.95, large=0.4),
        "runs": {"base": run(0.95, 0.6, 0.3), "large": run(0.95, 0.6, 0.4)},
    },
    "4.1": {
        "models": {},
        "runs": {
            "rewarded": run(0.3, 0.93),
            "large": run(0.3, 0.35, 0.4, overlap_ratio=(0.6, 0.61), entropy_gap=(0.2, 0.19), norm=(0.3, 0.3)),
        },
    },
    "4.2": {
        "models": models(base=0.3, rewarded=0.95),
        "runs": {
            name: run(0.3, 0.5 if "non_overlap" in name else 0.9)
            for support in ("student", "overlap", "non_overlap")
            for name in (support, f"{support} raw", f"{support} clipped")
        },
        "share_of_steps_clipped": {"student clipped": 1.0},
    },
    "4.2+": {
        "models": {},
        "runs": {
            "student": run(0.3, 0.9),
            "overlap": run(0.3, 0.9),
            "overlap alone": run(0.3, 0.4),
        },
    },
    "5.1": {
        "models": {},
        "runs": {
            "direct": run(0.3, 0.8, accuracy=(0.3, 0.1, 0.8)),
            "cold start": run(0.6, 0.9, overlap_ratio=(0.7, 0.8)),
        },
    },
    "5.2": {
        "models": {},
        "runs": {
            "aligned": run(0.3, 0.9, student_entropy=(1, 0.5)),
            "without template": run(0.3, 0.8),
            "other content": run(0.3, 0.7),
            "mixed content": run(0.3, 0.85),
        },
    },
    "5.2+": {
        "models": {},
        "runs": {
            "aligned": run(0.3, 0.9, student_entropy=(1, 0.5)),
            "mixed content": run(0.3, 0.9, student_entropy=(1, 0.5)),
            "a tenth": run(0.3, 0.8, student_entropy=(1, 0.52)),
            "other content": run(0.3, 0.6, student_entropy=(1, 0.6)),
        },
    },
    "6.1": {
        "models": {},
        "runs": {"5": run(0.3, 0.4), "10": run(0.3, 0.8), "20": run(0.3, 0.9), "40": run(0.3, 0.88)},
        "depth": depth(0.6, 0.4, 0.1),
    },
    "6.1+": {
        "models": {},
        "runs": {"collapsed": run(0.3, 0.0)},
    },
    "6.2": {
        "models": {},
        "runs": {},
        "reward": {name: {"auroc": {"value": 0.8}} for name in ("rewarded", "large", "mismatched")},
        "coherence": {"rewarded": 0.3, "large": 0.1, "mismatched": 0.2},
        "ratio": {"rewarded": 3.0, "large": 1.0, "mismatched": 2.0},
    },
    "6.3": {
        "models": {},
        "runs": {"sampled": run(0.3, 0.9), "full": run(0.3, 0.9), "Eq. 5, k = 1": run(0.3, 0.3)}
        | {f"Eq. 5, k = {k}": run(0.3, 0.9) for k in (4, 16)}
        | {f"published, k = {k}": run(0.3, 0.7 if k == 1 else 0.9) for k in (1, 4, 16)},
        "gradients": [{"name": "full", "bias": 0.0, "noise": None}, {"name": "sampled", "bias": None, "noise": 0.3}],
        "noise_of_problems": 0.2,
    },
    "6.3+": {
        "models": {},
        "runs": {"sampled": run(0.3, 0.9), "four": run(0.3, 0.7)}
        | {name: run(0.3, 0.9) for name in ("four and the rest", "eight")},
    },
    "remedy": {
        "models": models(base=0.3, large=0.5),
        "runs": {"reward alone": run(0.3, 0.88), "teacher alone": run(0.3, 0.4), "with reward": run(0.3, 0.9)},
    },
}


def seeds(row: Row) -> list[Row]:
    """Three seeds that differ by a little noise of all numbers."""
    rng = np.random.default_rng(0)

    def shaken(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shaken(v) for name, v in value.items()}
        if isinstance(value, list):
            return [shaken(v) for v in value]
        return value + 1e-4 * rng.standard_normal() if isinstance(value, float) else value

    return [shaken(row) for _ in range(3)]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.number)
def test_a_claim_holds_on_results_that_bear_it_out(claim: Any) -> None:
    checks = claim.checks(seeds(BORNE_OUT[claim.experiment]))
    assert [check.text for check in checks if check.verdict != HOLDS] == []


def swapped(row: Row, a: str, b: str, of: str = "runs") -> Row:
    row = copy.deepcopy(row)
    row[of][a], row[of][b] = row[of][b], row[of][a]
    return row


CONTRADICTED = {
    "3.1": swapped(BORNE_OUT["3.1"], "compatible", "mismatched"),
    "3.2": swapped(BORNE_OUT["3.2"], "rewarded", "large"),
    "3.3": BORNE_OUT["3.3"] | {"runs": {"base": run(0.95, 0.9), "large": run(0.95, 0.6)}},
    "3.3+": BORNE_OUT["3.3+"] | {"runs": {"base": run(0.95, 0.9), "large": run(0.95, 0.6)}},
    "3.3b": BORNE_OUT["3.3"],
    "4.1": swapped(BORNE_OUT["4.1"], "rewarded", "large"),
    "4.2": swapped(BORNE_OUT["4.2"], "overlap", "non_overlap"),
    "4.2+": swapped(BORNE_OUT["4.2+"], "overlap", "overlap alone"),
    "5.1": swapped(BORNE_OUT["5.1"], "direct", "cold start"),
    "5.2": swapped(BORNE_OUT["5.2"], "aligned", "other content"),
    "5.2+": swapped(BORNE_OUT["5.2+"], "a tenth", "other content"),
    "6.1": BORNE_OUT["6.1"] | {"depth": depth(0.1, 0.4, 0.6)},
    "6.1+": {"runs": {"collapsed": run(0.3, 0.9)}},
    "6.2": swapped(BORNE_OUT["6.2"], "rewarded", "large", "ratio")
    | {
        "reward": {
            name: {"auroc": {"value": v}} for name, v in {"rewarded": 0.45, "large": 0.3, "mismatched": 0.3}.items()
        }
    },
    "6.3": swapped(BORNE_OUT["6.3"], "Eq. 5, k = 1", "published, k = 16"),
    "6.3+": swapped(BORNE_OUT["6.3+"], "four", "four and the rest"),
    "remedy": swapped(BORNE_OUT["remedy"], "teacher alone", "with reward"),
}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.number)
def test_a_claim_fails_on_results_that_contradict_it(claim: Any) -> None:
    assert verdict(claim.checks(seeds(CONTRADICTED[claim.experiment]))) == FAILS


@pytest.mark.parametrize(
    ("number", "addition", "experiment", "teacher"), [("1", "1+", "3.1", "mismatched"), ("5", "5b", "4.2", "rewarded")]
)
def test_a_seed_whose_teacher_did_not_learn_is_counted_by_a_claim_and_left_out_by_its_addition(
    number: str, addition: str, experiment: str, teacher: str
) -> None:
    rows = seeds(BORNE_OUT[experiment])
    rows[1]["models"][teacher]["accuracy"] = 0.1
    rows[1]["runs"] = CONTRADICTED[experiment]["runs"]
    counted, left = (next(c for c in CLAIMS if c.number == n).checks(rows) for n in (number, addition))
    assert [len(checks[0].values) for checks in (counted, left)] == [3, 2]
    assert (verdict(counted), verdict(left)) == (UNDECIDED, HOLDS)
    for row in rows:
        row["models"][teacher]["accuracy"] = 0.1
    assert verdict(next(c for c in CLAIMS if c.number == addition).checks(rows)) == UNDECIDED
