"""The numbers, the figure and the texts of docs/first-run.md from the finished runs of the SmolLM2 job.

    python benchmarks/first_run.py full=RUN,RUN,RUN top-16=RUN,RUN,RUN --out docs/first-run

Each group is one objective, each RUN one seed. Prints a Markdown table (mean over seeds ± standard error, and the
paired change from before to after with its 95 % interval, Student's t), sample texts, and writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from opd_jax.tracking.labels import axis_label
from opd_jax.tracking.run_dir import existing_run, read_rows

Rows = list[list[dict[str, Any]]]
NAMES = ("reverse_kl", "overlap_ratio", "entropy_gap", "forward_kl_teacher_rollouts", "response_length", "eos_rate")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # Student's t by degrees of freedom
COLOURS = ("#0072b2", "#d55e00", "#009e73")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN,RUN")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    groups = {name: paths.split(",") for name, _, paths in (g.partition("=") for g in options.groups)}
    evaluations = {name: [student_rows(path) for path in paths] for name, paths in groups.items()}
    result: dict[str, dict[str, Any]] = {
        name: {n: summary(runs, n) for n in NAMES} for name, runs in evaluations.items()
    }
    for name, paths in groups.items():
        result[name]["seconds_per_run"] = [seconds(path) for path in paths]
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(result))
    print(texts(groups))
    teacher = next(row for row in all_rows(next(iter(groups.values()))[0]) if row["who"] == "teacher")
    training = {name: [read_rows(existing_run(path).metrics) for path in paths] for name, paths in groups.items()}
    figure(evaluations, training, teacher).savefig(options.out.with_suffix(".png"), dpi=150)


def all_rows(path: str) -> list[dict[str, Any]]:
    return read_rows(existing_run(path).evaluations)


def student_rows(path: str) -> list[dict[str, Any]]:
    return [row for row in all_rows(path) if row["who"] == "student"]


def seconds(path: str) -> float:
    """Time of all steps: rollout, scoring and update, compilation included."""
    return sum(v for row in read_rows(existing_run(path).metrics) for k, v in row.items() if k.startswith("time/"))


def summary(runs: list[list[dict[str, Any]]], name: str) -> dict[str, Any]:
    first, last = (np.asarray([run[i][name] for run in runs]) for i in (0, -1))
    change = last - first
    n = len(runs)
    error = change.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    half = T_975[n - 1] * error if n > 1 else math.nan
    return {
        "seeds": n,
        "before": first.tolist(),
        "after": last.tolist(),
        "within_run_se": [run[-1].get(name + "_se") for run in runs],
        "change": change.mean(),
        "change_se": error,
        "change_interval": [change.mean() - half, change.mean() + half],
        "relative_change": float((change / first).mean()) if first.all() else None,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = ["| objective | metric | before | after | change | 95 % interval |", "|---|---|---|---|---|---|"]
    for group, metrics in result.items():
        for name in NAMES:
            s = metrics[name]
            before, after = np.mean(s["before"]), np.mean(s["after"])
            error = np.std(s["after"], ddof=1) / math.sqrt(s["seeds"]) if s["seeds"] > 1 else math.nan
            relative = f" ({s['relative_change']:+.0%})" if s["relative_change"] is not None else ""
            low, high = s["change_interval"]
            lines.append(
                f"| {group} | {axis_label(name, 16)} | {before:.3f} | {after:.3f} ± {error:.3f} "
                f"| {s['change']:+.3f}{relative} | {low:+.3f} … {high:+.3f} |"
            )
    return "\n".join(lines)


def texts(groups: dict[str, list[str]]) -> str:
    """What the first seed of each group writes before and after, and the teacher, on the first logged problems."""
    by_problem: dict[str, dict[str, str]] = {}
    for group, paths in groups.items():
        rows = read_rows(existing_run(paths[0]).samples)
        last = max(row["step"] for row in rows)
        for row in rows:
            label = {0: "before", last: f"after, {group}"}.get(row["step"]) if row["who"] == "student" else "teacher"
            if label:
                by_problem.setdefault(row["problem"], {}).setdefault(label, row["response"])
    lines = []
    for problem, responses in by_problem.items():
        lines += [f"**{problem}**", ""]
        lines += [f"- *{label}:* {' '.join(text.split())}" for label, text in responses.items()]
        lines.append("")
    return "\n".join(lines)


def figure(evaluations: dict[str, Rows], training: dict[str, Rows], teacher: dict[str, Any]) -> Figure:
    """Thin lines: training rollouts, one a seed. Points: held-out prompts, mean and standard error over seeds."""
    fig = Figure(figsize=(10, 5.2), layout="constrained")
    axes = fig.subplots(2, 3).ravel()
    for ax, name in zip(axes, NAMES, strict=True):
        for i, (group, runs) in enumerate(evaluations.items()):
            for rows in training[group]:
                curve = [(row["step"], row[name]) for row in rows if name in row]
                ax.plot(*zip(*curve, strict=True), color=COLOURS[i], alpha=0.3, linewidth=1) if curve else None
            steps = np.asarray([row["step"] for row in runs[0]]) + 0.4 * i
            values = np.asarray([[row[name] for row in run] for run in runs])
            error = values.std(axis=0, ddof=1) / math.sqrt(len(runs)) if len(runs) > 1 else None
            style = {"color": COLOURS[i], "marker": "o", "markersize": 5, "linestyle": ""}
            ax.errorbar(steps, values.mean(axis=0), error, capsize=3, label=f"{group}, held out", **style)
        if name in teacher:
            ax.axhline(teacher[name], color="#555555", linestyle="--", linewidth=1.2, label="teacher")
        ax.set_ylim(0, 1.08 * ax.get_ylim()[1])
        ax.set_title(axis_label(name, 16), fontsize=10, loc="left")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[3:]:
        ax.set_xlabel("training step")
    axes[0].legend(frameon=False)
    axes[-1].legend(frameon=False)
    return fig


if __name__ == "__main__":
    main()
