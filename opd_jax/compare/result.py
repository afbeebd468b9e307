"""What the runs of a comparison come to: one yardstick for all, paired over seeds, and what each variant costs."""

from __future__ import annotations

import dataclasses
import math
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
COSTS = ("flops", "seconds")  # of all updates of a run
NOT_OF_A_STEP = ("evaluation", "checkpoint", "export")


def paired(values: Sequence[float], first: Sequence[float]) -> Row:
    """Mean of the differences of each seed with its interval, as ``student_t``."""
    return student_t(np.subtract(values, first).tolist())


def efficient(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Of {name: (cost, score)} those that no other beats: none is at least as cheap and as good, and better in one."""
    return [
        name
        for name, (cost, score) in points.items()
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points.values())
    ]


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
    best = {
        cost: efficient({r["name"]: (r["cost"][cost], YARDSTICK[by] * r["final"][by]["mean"]) for r in rows})
        for cost in COSTS
    }
    for i, row in enumerate(rows):
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
        "rollouts": config.rollout.prompts * config.rollout.samples,
        "problems": first[0]["student"][0].get("problems"),
        "samples": first[0]["student"][0].get("samples"),
        "metrics_k": config.overlap_k,
        "seeds": list(dict.fromkeys(run.seed for run in runs)),
        "devices": devices,
        "mesh": dict(mesh),
        "by": by,
        "metrics": names,
        "order": [row["name"] for row in sorted(rows, key=rank)],
        "before": {n: student_t([run["student"][0][n] for run in first]) for n in names},
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
    return {
        "seed": run.seed,
        "path": str(run.place.root),
        "student": [row for row in evaluations if row["who"] == "student"],
        "teacher": next((row for row in evaluations if row["who"] == "teacher"), None),
        "rollouts": rows[0].get("rollouts"),
        "gradient_norm": {"mean": statistics.fmean(norms), "max": max(norms)} if norms else None,
        "times": times,
        "response_tokens": sum(row["response_length"] for row in rows)
        * run.config.rollout.prompts
        * run.config.rollout.samples,
        "flops": sum(row["update_flops"] for row in rows),
        "seconds": None if times.get("update") is None else times["update"] * len(rows),
    }


def _of_variant(name: str, run: Run, held: list[Row], first: list[Row], names: Sequence[str]) -> Row:
    def last(found: list[Row], metric: str) -> list[float]:
        return [of_seed["student"][-1][metric] for of_seed in found]

    steps = [row["step"] for row in held[0]["student"]]
    curves = {
        metric: [
            {"step": step} | student_t([of_seed["student"][i][metric] for of_seed in held])
            for i, step in enumerate(steps)
        ]
        for metric in names
    }
    timed = dict.fromkeys(key for of_seed in held for key in of_seed["times"])
    seconds = [of_seed["seconds"] for of_seed in held if of_seed["seconds"] is not None]
    return {
        "name": name,
        "settings": run.variant.settings,
        "runs": [{key: of_seed[key] for key in ("seed", "path", "rollouts", "gradient_norm")} for of_seed in held],
        "final": {metric: student_t(last(held, metric)) for metric in names},
        "by_seed": {metric: last(held, metric) for metric in names},
        "learnt": {
            metric: paired(last(held, metric), [of_seed["student"][0][metric] for of_seed in held]) for metric in names
        },
        "difference": None if held is first else {m: paired(last(held, m), last(first, m)) for m in names},
        "curves": curves,
        "times": {key: _mean([s["times"].get(key) for s in held]) for key in timed},
        "cost": {
            "flops": statistics.fmean(s["flops"] for s in held),
            "seconds": statistics.fmean(seconds) if seconds else math.inf,
            "response_tokens": statistics.fmean(s["response_tokens"] for s in held),
        },
    }  # fmt: skip


def _median(rows: Sequence[Row], name: str) -> float | None:
    held = [row[name] for row in rows if row.get(name) is not None]
    return statistics.median(held) if held else None


def _mean(values: Sequence[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return statistics.fmean(held) if held else None
