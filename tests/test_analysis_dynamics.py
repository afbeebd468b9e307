"""Dynamics of runs: windows, trends and maps against NumPy and SciPy; signs in words; runs that have no such data."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import BINS, make_run
from matplotlib.figure import Figure
from scipy import stats

from opd_jax.analysis.dynamics import METRICS, SIGNS, dynamics, section, trend, window_change
from opd_jax.cli import main
from opd_jax.config_files import dump_config, parse_config
from opd_jax.errors import InputError
from opd_jax.tracking.labels import axis_label
from opd_jax.tracking.run_dir import RunDir, open_run, read_rows
from opd_jax.tracking.writers import MetricWriter, plain

LENGTH = 1024  # most tokens of a response of the made-up runs
GOOD, FLAT = "all 3 signs of a successful", "All 3 signs stay flat"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "good", samples=False), make_run(root / "flat", fails=True, samples=False)]


def run_of(path: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> RunDir:
    """A run with these rows; row i is that of step i + 1."""
    tree = {
        "run_dir": str(path), "steps": len(rows) or 1, "student": {"path": "s"}, "teacher": {"path": "t"},
        "data": {"source": "task:products"}, "rollout": {"max_response": 40}, **settings,
    }  # fmt: skip
    run = open_run(path, dump_config(parse_config(tree)), resume=False)
    with MetricWriter(run) as writer:
        for i, row in enumerate(rows):
            writer.write(i + 1, row)
    return run


def rows_of(overlap: Sequence[float | None], **more: Sequence[float]) -> list[dict[str, Any]]:
    return [{"overlap_ratio": x, **{name: held[i] for name, held in more.items()}} for i, x in enumerate(overlap)]


def test_numbers_are_those_of_numpy_and_scipy(runs: list[RunDir]) -> None:
    (found,) = dynamics(runs[:1])["runs"]
    rows = read_rows(runs[0].metrics)
    assert (found["measured_steps"], found["window"], found["steps"]) == (200, 10, [1, 200])
    assert set(found["metrics"]) == set(METRICS)
    for name, metric in found["metrics"].items():
        values = np.array([row[name] for row in rows])
        first, last = values[:10], values[-10:]
        assert metric["values"] == values.tolist()
        assert metric["first"]["steps"] == [1, 10]
        assert metric["last"]["steps"] == [191, 200]
        for end, part in (("first", first), ("last", last)):
            assert metric[end]["mean"] == pytest.approx(part.mean())
            assert metric[end]["error"] == pytest.approx(stats.sem(part))
        change = stats.ttest_ind(last, first, equal_var=False).confidence_interval()
        assert metric["change"]["mean"] == pytest.approx(last.mean() - first.mean())
        assert (metric["change"]["low"], metric["change"]["high"]) == pytest.approx((change.low, change.high))
        slope = np.polyfit(np.arange(1, 201), values, 1)[0]
        assert metric["trend"]["mean"] == pytest.approx(100 * slope, rel=1e-6, abs=1e-12)


def brute_force_error(x: np.ndarray, u: np.ndarray) -> float:
    """Newey and West's error of a slope: the sum over all pairs of steps with Bartlett's weights."""
    n, lags = len(x), int(0.75 * len(x) ** (1 / 3))
    total = 0.0
    for s in range(n):
        for t in range(n):
            if abs(s - t) <= lags:
                total += (1 - abs(s - t) / (lags + 1)) * x[s] * u[s] * x[t] * u[t]
    return math.sqrt(n / (n - 2) * total) / float((x**2).sum())


def test_trend_against_brute_force_and_its_coverage() -> None:
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 4, 60)).astype(float)
    values = 0.3 + 0.002 * steps + rng.normal(0, 0.1, 60)
    found = trend(steps, values)
    line: Any = stats.linregress(steps, values)
    x = steps - steps.mean()
    half = stats.t.ppf(0.975, 58) * brute_force_error(x, values - line.intercept - line.slope * steps)
    assert found["mean"] == pytest.approx(100 * line.slope)
    assert (found["low"], found["high"]) == pytest.approx((100 * (line.slope - half), 100 * (line.slope + half)))
    # neighbouring steps that correlate (0.5): the interval that takes them for independent holds the truth too rarely
    held, naive = 0, 0
    for _ in range(400):
        noise = np.zeros(200)
        for i in range(1, 200):
            noise[i] = 0.5 * noise[i - 1] + rng.normal()
        times = np.arange(200.0)
        interval = trend(times, noise)
        held += interval["low"] <= 0 <= interval["high"]
        line = stats.linregress(times, noise)
        naive += abs(line.slope) <= stats.t.ppf(0.975, 198) * line.stderr
    assert naive / 400 < 0.8
    assert 0.86 < held / 400 <= 0.97


def test_a_change_without_scatter_is_certain() -> None:
    assert window_change(np.ones(3), np.full(3, 2.0)) == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_maps_are_means_over_groups_of_steps(runs: list[RunDir]) -> None:
    (found,) = dynamics(runs[:1])["runs"]
    rows = read_rows(runs[0].metrics)
    for name in ("student_entropy", "reverse_kl"):
        held = found["maps"][name]
        table = np.array([row[f"{name}_by_position"] for row in rows])  # [200, BINS]
        groups = [table[i : i + 4].mean(axis=0) for i in range(0, 200, 4)]
        np.testing.assert_allclose(held["values"], groups)
        assert held["steps"] == [*range(1, 201, 4), 201]
        np.testing.assert_allclose(held["positions"], np.linspace(0, LENGTH, BINS + 1))


def test_gaps_are_left_out(tmp_path: Path) -> None:
    """Steps without a measurement, positions that no response reached, a metric that has hardly any value."""
    overlap = [0.5 if i % 2 else None for i in range(40)]
    rows = rows_of(overlap)
    for i, row in enumerate(rows):
        row["student_entropy_by_position"] = [1.0, float(i), None, None if i else 3.0]
    rows[1]["overlap_advantage"] = -0.1
    result = dynamics([run_of(tmp_path / "run", rows, metrics_every=2)])
    (found,) = result["runs"]
    assert found["measured_steps"] == 20
    assert found["metrics"]["overlap_ratio"]["steps"] == list(range(2, 41, 2))
    assert set(found["metrics"]) == {"overlap_ratio"}
    assert set(found["signs"]) == {"overlap_ratio"}
    entropy = np.array(found["maps"]["student_entropy"]["values"], float)
    np.testing.assert_array_equal(entropy[:, 1], range(1, 40, 2))
    assert np.isnan(entropy[:, 2:]).all()
    drawn = [plot.draw() for plot in section(result).plots]
    assert all(isinstance(figure, Figure) for figure in drawn)


def signs_of(run: RunDir) -> dict[str, str]:
    return {name: sign["outcome"] for name, sign in dynamics([run])["runs"][0]["signs"].items()}


def test_signs_and_words(runs: list[RunDir]) -> None:
    result = json.loads(json.dumps(plain(dynamics(runs))))  # as a stored result is shown
    good, flat = result["runs"]
    for run, outcome in ((good, "success"), (flat, "flat")):
        assert {name: sign["outcome"] for name, sign in run["signs"].items()} == {s.metric: outcome for s in SIGNS}
        assert {sign["of"] for sign in run["signs"].values()} == {"on held-out prompts"}
    lead = section(result).lead
    assert lead[0].startswith("good: It shows " + GOOD)
    last = 0.72 + 0.19 * (1 - math.exp(-4))
    errors = 0.004 * np.array([0.72, last])
    half = stats.t.ppf(0.975, 63) * math.hypot(*errors)  # 64 problems
    bounds = f"{last - 0.72 - half:.3f} … {last - 0.72 + half:.3f}"
    assert lead[1] == (
        f"Overlap@16 rises, on held-out prompts: 0.720 ± {errors[0]:.3f} (step 0) → {last:.3f} ± {errors[1]:.3f} "
        f"(step 200), change {last - 0.72:.3f} (95 % {bounds})."
    )
    assert "Entropy gap narrows" in lead[2]
    assert "Overlap-token advantage moves towards 0" in lead[3]
    assert any(text.startswith("flat: " + FLAT) for text in lead)
    means = [float(np.mean(run["metrics"]["gradient_norm"]["values"])) for run in (flat, good)]
    assert means[0] < means[1]
    assert f"smallest first: flat {means[0]:.3f}, good {means[1]:.3f}." in lead[-1]
    # nothing is shown that is not in the result
    assert section(result).tables[0].rows[0][0] == axis_label("overlap_ratio", 16)
    alone = section({"kind": "dynamics", "runs": [good]})
    assert alone.lead[0].startswith("It shows " + GOOD)
    assert sum(plot.standalone for plot in alone.plots) == len(METRICS)
    assert len(section(result).plots) == len(METRICS) + 4


@pytest.mark.parametrize(
    ("start", "end", "noise", "expected"),
    [
        (0.70, 0.75, 0.005, "success"),
        (0.75, 0.70, 0.005, "opposite"),
        (0.70, 0.705, 0.003, "flat"),
        (0.70, 0.72, 0.2, "unclear"),
        (0.70, 0.715, 0.001, "flat"),  # it rises for certain, but by less than matters
    ],
)
def test_outcome_of_a_sign(start: float, end: float, noise: float, expected: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    overlap = np.r_[np.full(20, start), np.full(20, end)] + noise * rng.normal(size=40).clip(-2, 2)
    run = run_of(tmp_path / "run", rows_of(overlap.tolist()))
    assert signs_of(run)["overlap_ratio"] == expected


def test_one_evaluation_or_none_leaves_the_training_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=False)
    rows = [row for row in run.evaluations.read_text().splitlines() if '"step": 0' in row]
    run.evaluations.write_text("\n".join(rows) + "\n")
    result = dynamics([run])
    found = result["runs"][0]
    sign = found["signs"]["overlap_ratio"]
    assert sign["of"] == "in training"
    assert {part: sign[part] for part in ("first", "last", "change")} == {
        part: found["metrics"]["overlap_ratio"][part] for part in ("first", "last", "change")
    }
    assert "Overlap@16 rises, in training:" in section(result).lead[1]
    assert "(steps 1–10) →" in section(result).lead[1]


def test_a_gap_that_widens_is_no_success(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 40)
    wider, away = (0.3 + 0.2 * ramp).tolist(), (-0.01 - 0.02 * ramp).tolist()
    rows = rows_of((0.6 + 0.2 * ramp).tolist(), entropy_gap=wider, overlap_advantage=away)
    run = run_of(tmp_path / "run", rows)
    assert signs_of(run) == {"overlap_ratio": "success", "entropy_gap": "opposite", "overlap_advantage": "opposite"}
    lead = section(dynamics([run])).lead
    assert "1 of the 3 signs" in lead[0]
    assert "2 the other way round" in lead[0]
    assert "Entropy gap widens" in lead[2]


def test_a_late_collapse_and_alarms_are_told(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    overlap = np.r_[np.linspace(0.7, 0.9, 60), np.full(40, 0.9), np.linspace(0.9, 0.6, 20)] + rng.normal(0, 0.01, 120)
    rows = rows_of(overlap.tolist())
    rows[110]["alarm"] = "overlap with the teacher went from 0.90 to 0.75"
    result = dynamics([run_of(tmp_path / "run", rows)])
    fell = result["runs"][0]["fell_back"]
    assert fell["mean"] == pytest.approx(0.9, abs=0.01)
    assert 55 <= fell["steps"][0] < fell["steps"][1] <= 101
    lead = " ".join(section(result).lead)
    assert "The overlap fell back from 0.9" in lead
    assert "Training warned at step 111: overlap with the teacher went from 0.90 to 0.75 (1 in all)" in lead
    steady = run_of(tmp_path / "steady", rows_of(overlap[:100].tolist()))
    assert dynamics([steady])["runs"][0]["fell_back"] is None
    # an overlap that overshoots while the student still comes nearer is no collapse; with a KL that rises it is
    nearer, away = (np.geomspace(1, end, 120) * rng.uniform(0.9, 1.1, 120) for end in (0.01, 3))
    for name, kl in (("nearer", nearer), ("away", away)):
        run = run_of(tmp_path / name, rows_of(overlap.tolist(), reverse_kl=kl.tolist()))
        assert (dynamics([run])["runs"][0]["fell_back"] is None) == (name == "nearer")


def test_a_run_that_began_at_its_goal_is_not_called_a_failure(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = run_of(tmp_path / "run", rows_of((0.95 + rng.normal(0, 0.003, 60)).tolist()))
    assert "little to gain" in section(dynamics([run])).lead[0]


def test_runs_that_do_not_compare(runs: list[RunDir], tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", steps=60, samples=False, objective={"name": "topk", "k": 4})
    shown = section(dynamics([runs[0], other]))
    assert any("differ in student or objective" in text for text in shown.lead)
    assert any("lists of different lengths" in text for text in shown.lead)
    names = [axis_label("overlap_ratio"), axis_label("overlap_ratio", 4), axis_label("overlap_ratio", 16)]
    assert next(plot.alt for plot in shown.plots) == f"{names[0]} over steps"
    assert {row[0] for table in shown.tables for row in table.rows} & set(names) == set(names[1:])


def test_runs_without_the_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        dynamics([RunDir(tmp_path / "nothing")])  # pyright: ignore[reportArgumentType]
    sft = {"kind": "sft", "teacher": None, "data": {"source": "task:products", "response": "response"}}
    plain_rows = [{"loss": 1.0, "gradient_norm": 2.0}] * 20
    with pytest.raises(InputError, match=r"20 steps, none with an overlap ratio \(kind=sft\).*kind=opd"):
        dynamics([run_of(tmp_path / "sft", plain_rows, **sft)])
    with pytest.raises(InputError, match="5 measured steps; first and last steps need 6"):
        dynamics([run_of(tmp_path / "short", rows_of([0.5] * 5))])
    with pytest.raises(InputError, match="0 steps, none"):
        dynamics([run_of(tmp_path / "empty", [])])


def test_the_command_writes_into_the_run_and_the_report_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "kept as it is")
    run, json_path = make_run(tmp_path / "run", steps=20, samples=False), tmp_path / "result.json"
    for arguments in (["analyze", "dynamics", run.root, "--json", json_path], ["report", run.root]):
        monkeypatch.setattr("sys.argv", ["opd", *map(str, arguments)])
        main()
    said = section(json.loads(json_path.read_text())).lead
    assert json.loads(json_path.read_text()) == json.loads((run.analysis / "dynamics.json").read_text())
    report, printed = run.report.read_text(), capsys.readouterr().out
    assert "<h2>Dynamics</h2>" in report
    for text in said:
        assert text in printed
        assert html.escape(text) in report
    assert {path.name for path in run.analysis.iterdir()} >= {"dynamics.html", "dynamics-1.png"}
    assert 'aria-label="student entropy (nats) by output position and step"' in report
    assert 'aria-label="student entropy (nats) over steps"' not in report  # that is one of the run's own curves
