"""What the runs of a comparison come to: one yardstick for all, paired over seeds, and what each variant costs."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from opd_jax.compare.runs import Run
from opd_jax.compare.variants import Dropped
from opd_jax.evaluation.scores import student_t
from opd_jax.tracking.run_dir import Row, read_rows

# Of the evaluations on held-out prompts, and which way is better.
YARDSTICK = {
    "accuracy": +1,
    "reverse_kl": -1,
    "forward_kl": -1,
    "forward_kl_teacher_rollouts": -1,
    "overlap_ratio": +1,
    "entropy_gap": -1,
}
COSTS = ("flops", "seconds")  # of all updates of a run, without metrics
NOT_OF_A_STEP = ("evaluation", "checkpoint", "export")


def paired(values: Sequence[float], first: Sequence[float], looks: int = 1) -> Row:
    """Mean of the differences of each seed with its interval, as ``student_t``."""
    return student_t(np.subtract(values, first).tolist(), looks)


def efficient(points: Mapping[str, tuple[float, float]], spread: Mapping[str, float]) -> list[str]:
    """Of {name: (cost, score)} those that no other beats: none is at least as cheap and as good, and better in one.

    Costs that differ by no more than the larger ``spread`` of the two count as equal.
    """

    def beats(a: str, b: str) -> bool:
        (c, s), (cost, score), tie = points[a], points[b], max(spread[a], spread[b])
        return c <= cost + tie and s >= score and (c < cost - tie or s > score)

    return [name for name in points if not any(beats(other, name) for other in points)]


def compare_runs(
    runs: Sequence[Run], dropped: Sequence[Dropped], memory: Sequence[Row] | None, devices: str, mesh: Mapping[str, int]
) -> Row:
    """The result of a comparison whose runs are done; ``memory``: of each variant, as ``compiled_updates`` gives it."""
    variants = list(dict.fromkeys(run.variant.name for run in runs))
    held = {name: [_of_run(run) for run in runs if run.variant.name == name] for name in variants}
    names = [n for n in YARDSTICK if all(n in row for found in held.values() for r in found for row in r["student"])]
    config, first = runs[0].config, held[variants[0]]
    by = "accuracy" if "accuracy" in names else "reverse_kl"
    rows: list[Row] = [
        _of_variant(name, next(r for r in runs if r.variant.name == name), held[name], first, names)
        for name in variants
    ]
    best = {cost: _frontier(rows, held, cost, by) for cost in COSTS}
    for i, row in enumerate(rows):
        row["jointly"] = _jointly(held[row["name"]], first, by, len(rows))
        row["memory"] = memory[i] if memory else None
        row["efficient"] = {cost: row["name"] in best[cost] for cost in COSTS}

    def rank(row: Row) -> tuple[float, ...]:
        return tuple(-YARDSTICK[n] * row["final"][n]["mean"] for n in dict.fromkeys([by, "reverse_kl"]))

    teacher = [run["teacher"] for run in first if run["teacher"]]
    return {
        "kind": "compare",
        "student": config.student.path,
        "teacher": config.teacher and config.teacher.path,
        "steps": config.steps,
        "rollouts": config.sampled_prompts * config.rollout.samples,
        "metrics_every": config.metrics_every,
        "problems": first[0]["student"][0].get("problems"),
        "samples": first[0]["student"][0].get("samples"),
        "metrics_k": config.overlap_k,
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "devices": devices,
        "mesh": dict(mesh),
        "by": by,
        "metrics": names,
        "order": [row["name"] for row in sorted(rows, key=rank)],
        "before": {n: student_t(_first(first, n)) for n in names},
        "of_teacher": {"accuracy": student_t([r["accuracy"] for r in teacher])} if "accuracy" in names else {},
        "variants": rows,
        "dropped": [dataclasses.asdict(d) for d in dropped],
    }


def step_times(rows: Sequence[Row]) -> Row:
    """Median seconds of each stage of a step, ``metrics`` (what an update with metrics takes more) and their sum.

    Without the first step with metrics and the first without, which compile; None where nothing is left.
    """
    has = [row.get("overlap_ratio") is not None for row in rows]
    measured, unmeasured = ([row for row, x in zip(rows, has, strict=True) if x == kind][1:] for kind in (True, False))
    plain = unmeasured or measured
    names = {key.removeprefix("time/") for row in plain for key in row if key.startswith("time/")}
    found: Row = {name: _median(plain, f"time/{name}") for name in sorted(names.difference(NOT_OF_A_STEP))}
    found["step"] = sum(found.values()) if found else None
    both = _median(measured, "time/update") if measured and unmeasured else None
    found["metrics"] = None if both is None else both - found["update"]
    return found | {"tokens_per_second": _median(plain, "tokens_per_second")}


def _of_run(run: Run) -> Row:
    evaluations, rows = read_rows(run.place.evaluations), read_rows(run.place.metrics)
    norms = [row["gradient_norm"] for row in rows if row.get("gradient_norm") is not None]
    times = step_times(rows)
    of_metrics = [row["metrics_flops"] for row in rows if "metrics_flops" in row]
    return {
        "seed": run.seed,
        "path": str(run.place.root),
        "student": [row for row in evaluations if row["who"] == "student"],
        "teacher": next((row for row in evaluations if row["who"] == "teacher"), None),
        "rollouts": rows[0].get("rollouts"),
        "gradient_norm": {"mean": statistics.fmean(norms), "max": max(norms)} if norms else None,
        "times": times,
        "flops": sum(row["update_flops"] for row in rows) - sum(of_metrics),
        "metrics_flops": statistics.fmean(of_metrics) if of_metrics else None,
        "seconds": None if times.get("update") is None else times["update"] * len(rows),
    }


def _frontier(rows: Sequence[Row], held: Mapping[str, list[Row]], cost: str, by: str) -> list[str]:
    """FLOPs are counted; seconds are measured, so that their range over seeds makes no difference."""
    points = {r["name"]: (r["cost"][cost], YARDSTICK[by] * r["final"][by]["mean"]) for r in rows}
    if any(x is None for x, _ in points.values()):
        return []
    spread = {
        name: float(np.ptp([s["seconds"] for s in held[name] if s["seconds"] is not None])) if cost == "seconds" else 0
        for name in points
    }
    return efficient(points, spread)


def _last(found: list[Row], metric: str) -> list[float]:
    return [of_seed["student"][-1][metric] for of_seed in found]


def _first(found: list[Row], metric: str) -> list[float]:
    return [of_seed["student"][0][metric] for of_seed in found]


def _jointly(held: list[Row], first: list[Row], by: str, variants: int) -> Row:
    """What is learnt and the difference to the first variant, with intervals that hold for all variants at once."""
    last = _last(held, by)
    return {
        "learnt": paired(last, _first(held, by), variants),
        "difference": None if held is first else paired(last, _last(first, by), variants - 1),
    }


def _of_variant(name: str, run: Run, held: list[Row], first: list[Row], names: Sequence[str]) -> Row:
    steps = [row["step"] for row in held[0]["student"]]
    curves = {
        metric: [
            {"step": step} | student_t([of_seed["student"][i][metric] for of_seed in held])
            for i, step in enumerate(steps)
        ]
        for metric in names
    }
    timed = dict.fromkeys(key for of_seed in held for key in of_seed["times"])
    return {
        "name": name,
        "settings": run.variant.settings,
        "runs": [{key: of_seed[key] for key in ("seed", "path", "rollouts", "gradient_norm")} for of_seed in held],
        "final": {metric: student_t(_last(held, metric)) for metric in names},
        "by_seed": {metric: _last(held, metric) for metric in names},
        "learnt": {metric: paired(_last(held, metric), _first(held, metric)) for metric in names},
        "difference": None if held is first else {m: paired(_last(held, m), _last(first, m)) for m in names},
        "curves": curves,
        "times": {key: _mean([s["times"].get(key) for s in held]) for key in timed},
        "cost": {
            "flops": statistics.fmean(s["flops"] for s in held),
            "seconds": _mean([s["seconds"] for s in held]),
            "metrics_flops": _mean([s["metrics_flops"] for s in held]),
        },
    }  # fmt: skip


def _median(rows: Sequence[Row], name: str) -> float | None:
    held = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(held) if held else None


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None
