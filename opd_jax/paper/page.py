"""What the suite found, as a page in Markdown with figures: the table of claims, every check, the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from opd_jax.paper.claims import CLAIMS, Check, Claim, interval, verdict
from opd_jax.tracking.plots import PALETTE, save, small_multiples

Row = dict[str, Any]
Found = dict[tuple[str, str], list[Row]]  # (domain, experiment) → rows, one a seed
Judged = list[tuple[Claim, str, list[Check]]]  # with the domain that the checks were made on

CURVES = {
    "accuracy": "accuracy",
    "overlap_ratio": "overlap ratio",
    "entropy_gap": "entropy gap (nats)",
    "gradient_norm": "gradient norm",
}
FIGURES = ("3.1", "3.2", "3.3", "4.2", "5.1", "5.2", "6.1", "6.3", "remedy")  # 4.1 has the runs of 3.2


def by_experiment(rows: Sequence[Row]) -> Found:
    found: Found = {}
    for row in rows:
        found.setdefault((row["domain"], row["experiment"]), []).append(row)
    return found


def judged(rows: Sequence[Row]) -> Judged:
    """Claims with the domain they were examined on, and their checks."""
    found = by_experiment(rows)
    return [
        (claim, domain, claim.checks(of))
        for claim in CLAIMS
        for (domain, experiment), of in found.items()
        if experiment == claim.experiment
    ]


def table_rows(judged: Judged) -> list[list[Any]]:
    """Claim, section, domain, verdict, checks that hold, seeds."""
    return [
        [
            claim.number,
            claim.experiment,
            claim.text,
            domain,
            verdict(checks),
            f"{sum(check.verdict == 'holds' for check in checks)} of {len(checks)}",
            len(checks[0].values),
        ]
        for claim, domain, checks in judged
    ]


HEADS = ("claim", "section", "what it says", "domain", "verdict", "checks that hold", "seeds")


def write_page(rows: Sequence[Row], judged: Judged, page: Path, figures: Path, command: str) -> None:
    """Writes ``page`` and the PNGs it shows, which lie in ``figures``."""
    found = by_experiment(rows)
    hours = sum(row["cpu_seconds"] for row in rows) / 3600
    lines = [
        "# The paper in miniature",
        "",
        f"Written by `{command}` from the results in `{figures.name}/`; nothing here is typed by hand. "
        "What the experiments are and what a verdict means: docs/miniature.md of opd_jax.",
        "",
        _markdown(HEADS, table_rows(judged)),
        "",
        f"Training of all runs, those that experiments share counted each time: {hours:.1f} CPU hours.",
    ]
    for claim, domain, checks in judged:
        lines += [
            "",
            f"## Claim {claim.number} (§{claim.experiment}) on {domain}: {verdict(checks)}",
            "",
            claim.text,
            "",
        ]
        lines += [_markdown(("effect", "mean", "95 %", "expected", "verdict"), [_cells(check) for check in checks])]
        if claim.experiment in FIGURES:
            name = f"{domain}-{claim.experiment}.png"
            save(curves(found[domain, claim.experiment]), figures / name)
            lines += ["", f"![{claim.text}]({figures.name}/{name})"]
        elif claim.experiment == "6.2":
            lines += ["", *_aurocs(found[domain, claim.experiment])]
    page.write_text("\n".join(lines) + "\n")


def curves(rows: Sequence[Row]) -> Figure:
    """Mean and 95 % interval over seeds of each run: held-out accuracy, overlap and entropy gap, and gradient norm."""
    names = list(rows[0]["runs"])
    colours = dict(zip(names, PALETTE * 2, strict=False))
    lines: dict[str, Line2D] = {}

    def draw(ax: Axes, metric: str) -> None:
        for i, name in enumerate(names):
            runs = [row["runs"][name] for row in rows]
            where = "evaluations" if metric in runs[0]["evaluations"] else "steps"
            table = np.array([run[where][metric] for run in runs], float)
            last = runs[0]["step"][-1]
            x = np.array(runs[0]["step"]) if where == "evaluations" else np.linspace(0, last, table.shape[1])
            middle, low, high = (np.array(column) for column in zip(*map(interval, table.T), strict=True))
            style = "-" if i < len(PALETTE) else "--"
            (lines[name],) = ax.plot(x, middle, style, color=colours[name], linewidth=1.6)
            if len(rows) > 1:
                ax.fill_between(x, low, high, color=colours[name], alpha=0.15, linewidth=0)
        ax.set_xlabel("step")
        ax.set_ylabel(CURVES[metric])

    figure = small_multiples(list(CURVES), draw, 2)
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _aurocs(rows: Sequence[Row]) -> list[str]:
    heads = ("teacher", "AUROC of the mean reward", "95 % over seeds", "coherence", "95 % over seeds")

    def cells(name: str) -> list[Any]:
        auroc = [row["reward"][name]["auroc"]["value"] for row in rows]
        return [name, *_told(auroc), *_told([row["coherence"][name] for row in rows])]

    return [_markdown(heads, [cells(name) for name in rows[0]["reward"]])]


def _told(values: Sequence[float]) -> list[str]:
    mean, low, high = interval(values)
    return [f"{mean:.3f}", f"{low:.3f} … {high:.3f}"]


def _cells(check: Check) -> list[Any]:
    return [check.text, f"{check.mean:+.3f}", f"{check.low:+.3f} … {check.high:+.3f}", check.expected, check.verdict]


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heads), line(["---"] * len(heads)), *map(line, rows)])
