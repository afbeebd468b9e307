"""``opd compare-results``: evaluations of two or more models on the same problems, paired by problem."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from opd_jax.errors import InputError
from opd_jax.evaluation.scores import Score, recovery_score, summarise
from opd_jax.evaluation.summary import as_row, markdown_table
from opd_jax.tracking import plots
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.tracking.writers import plain

Row = dict[str, Any]


class Result(NamedTuple):
    """What ``opd eval`` wrote of one model."""

    name: str
    benchmarks: dict[str, Row]

    def accuracies(self, benchmark: str) -> np.ndarray:
        """Share of right answers to each problem."""
        row = self.benchmarks[benchmark]
        return np.array([p["correct"] for p in row["per_problem"]], np.float64) / row["samples"]


def compare(paths: Sequence[Path], teacher: Path | None = None, out: Path | None = None) -> Row:
    """Accuracy of each result on the benchmarks that all have, its difference to the first with a paired bootstrap over
    problems, and, with a teacher, the gap recovery rate (the first result is the student before).

    Args:
        out: a directory for comparison.json, comparison.md and comparison.png.

    Raises:
        InputError: fewer than two results, a file that is none, no common benchmark, or one with other problems.
    """
    if len(paths) + (teacher is not None) < 2:
        raise InputError("compare-results: one result. Give two or more result.json, or one and --teacher.")
    results = [_load(path) for path in paths]
    reference = _load(teacher) if teacher else None
    everything = results if reference is None else [*results, reference]
    names = _names(everything)
    compared = {name: _compare(name, results, reference, names) for name in _common(everything)}
    result: Row = {"results": names, "teacher": names[-1] if reference else None, "benchmarks": compared}
    for name, rows in compared.items():
        console.table(f"{name}, {rows[0]['problems']:,} problems", _heads(reference), _cells(rows, reference))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        lines = [
            "# Comparison",
            "",
            "Differences are to the first, paired by problem; errors and 95 % intervals are over problems.",
        ]
        for name, rows in compared.items():
            title = f"## {name}, {rows[0]['problems']:,} problems"
            lines += ["", title, "", *markdown_table(_heads(reference), _cells(rows, reference))]
        write_atomically(epath.Path(out / "comparison.md"), "\n".join(lines) + "\n")
        text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_atomically(epath.Path(out / "comparison.json"), text)
        plots.save(plots.scores(_plotted(compared), columns=len(compared)), out / "comparison.png")
    return result


def _compare(benchmark: str, results: Sequence[Result], teacher: Result | None, names: Sequence[str]) -> list[Row]:
    first = results[0].accuracies(benchmark)
    rows = []
    for i, result in enumerate(results if teacher is None else [*results, teacher]):
        mine = result.accuracies(benchmark)
        row = {"name": names[i], "problems": len(mine), "samples": result.benchmarks[benchmark]["samples"]}
        row["accuracy"] = as_row(summarise(mine))
        row["difference"] = as_row(summarise(mine - first)) if i else None
        row["gap_recovery"] = None
        if teacher and 0 < i < len(results):
            row["gap_recovery"] = as_row(recovery_score(first, mine, teacher.accuracies(benchmark)))
        rows.append(row)
    return rows


def _heads(teacher: Result | None) -> list[str]:
    return ["result", "accuracy", "95 %", "difference", "95 %"] + (["gap recovery", "95 %"] if teacher else [])


def _cells(rows: Sequence[Row], teacher: Result | None) -> list[list[Any]]:
    parts = ["accuracy", "difference"] + (["gap_recovery"] if teacher else [])
    return [[row["name"], *(cell for part in parts for cell in _score_cells(row[part]))] for row in rows]


def _score_cells(score: Row | None) -> list[Any]:
    if score is None:
        return [None, None]
    known = np.isfinite([score["low"], score["high"]]).all()
    return [(score["mean"], score["error"]), f"{score['low']:.3f} … {score['high']:.3f}" if known else None]


def _plotted(compared: Mapping[str, Sequence[Row]]) -> dict[tuple[str, str], dict[str, Score]]:
    """Accuracies of all benchmarks, then differences: intervals of accuracies that overlap may differ for certain."""
    panels = {}
    for part, label in (("accuracy", "accuracy"), ("difference", "difference to {}, paired")):
        for benchmark, rows in compared.items():
            scores = {row["name"]: row[part] or dict.fromkeys(("mean", "error", "low", "high"), 0.0) for row in rows}
            panels[benchmark, label.format(rows[0]["name"])] = {
                name: Score(**score, problems=rows[0]["problems"]) for name, score in scores.items()
            }
    return panels


def _load(path: Path) -> Result:
    file = path / "result.json" if path.is_dir() else path
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        result = Result(Path(stored["settings"]["model"]).name, stored["benchmarks"])
        for name, row in result.benchmarks.items():
            if len(result.accuracies(name)) != row["problems"] or not row["sha256"]:
                raise ValueError(f"{name}: {row['problems']} problems")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{file}: not a result.json of `opd eval` ({e!r}). Give one, or its directory.") from e
    return result


def _names(results: Sequence[Result]) -> list[str]:
    """Models' names, numbered where one stands twice."""
    plain_names = [r.name for r in results]
    return [
        f"{name} ({plain_names[:i].count(name) + 1})" if plain_names.count(name) > 1 else name
        for i, name in enumerate(plain_names)
    ]


def _common(results: Sequence[Result]) -> list[str]:
    common = [name for name in results[0].benchmarks if all(name in r.benchmarks for r in results)]
    if not common:
        there = "; ".join(f"{r.name}: {', '.join(r.benchmarks)}" for r in results)
        raise InputError(f"compare-results: no benchmark that all results have ({there}).")
    for name in common:
        if len({r.benchmarks[name]["sha256"] for r in results}) > 1:
            counts = ", ".join(f"{r.name}: {r.benchmarks[name]['problems']:,}" for r in results)
            raise InputError(
                f"compare-results: {name} was not the same problems everywhere ({counts}; their sha256 differ). "
                "Evaluate again on one file."
            )
    return common
