"""Figures of the page: curves of every experiment's runs, and what the paper draws of some beside them. Everywhere the
mean over seeds with its 95 % interval, the seeds themselves as dots where there is room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from opd_jax.paper.claims import interval, list_size
from opd_jax.tracking.plots import PALETTE, small_multiples

Row = dict[str, Any]

CURVES = {
    "accuracy": "accuracy",
    "overlap_ratio": "overlap ratio",
    "entropy_gap": "entropy gap (nats)",
    "gradient_norm": "gradient norm",
}
_ENTROPY = {"student_entropy": "student entropy (nats)"}
MORE_CURVES = {
    "4.1": {"overlap_advantage": "overlap-token advantage (nats)", "overlap_mass_student": "overlap mass, student"},
    "5.2": _ENTROPY,
    "5.2+": _ENTROPY,
}


def curves(rows: Sequence[Row], metrics: Mapping[str, str]) -> Figure:
    """Of each run: metrics of held-out prompts, or of steps, by name and label."""
    names = list(rows[0]["runs"])
    colours = dict(zip(names, PALETTE * 2, strict=False))
    lines: dict[str, Line2D] = {}

    def draw(ax: Axes, metric: str) -> None:
        for i, name in enumerate(names):
            runs = [row["runs"][name] for row in rows]
            where = next((part for part in ("evaluations", "steps") if metric in runs[0][part]), None)
            if where is None:  # of a run without teacher
                continue
            table = np.array([run[where][metric] for run in runs], float)
            last = runs[0]["step"][-1]
            points = table.shape[1]
            x = np.array(runs[0]["step"]) if where == "evaluations" else (np.arange(points) + 0.5) * last / points
            lines[name] = _band(ax, x, table, colours[name], style="-" if i < len(PALETTE) else "--")
        ax.set_xlabel("step")
        ax.set_ylabel(metrics[metric])

    figure = small_multiples(list(metrics), draw, 2)
    figure.legend(list(lines.values()), names, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _band(
    ax: Axes, x: Sequence[float] | np.ndarray, table: np.ndarray, colour: str, label: str = "", style: str = "-"
) -> Line2D:
    """The mean of a table [seeds, points] as a line, its interval as a band."""
    middle, low, high = (np.array(column) for column in zip(*map(interval, table.T), strict=True))
    (line,) = ax.plot(x, middle, style, color=colour, linewidth=1.6, label=label or "_")
    if len(table) > 1:
        ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    return line


def _dots(ax: Axes, x: Sequence[float] | np.ndarray, table: np.ndarray, colour: str) -> None:
    for values in table:
        ax.plot(x, values, ".", color=colour, alpha=0.35, markersize=5, label="_")


def _columns(ax: Axes, names: Sequence[str], table: np.ndarray) -> None:
    """A table [seeds, names]: dots, mean and interval, in a column a name."""
    _dots(ax, np.arange(len(names)), table, PALETTE[0])
    for i, values in enumerate(table.T):
        middle, low, high = interval(values.tolist())
        ax.errorbar(i + 0.15, middle, [[middle - low], [high - middle]], fmt="o", color=PALETTE[1], markersize=5)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.5, len(names) - 0.5)


def _panels(panels: Mapping[str, Callable[[Axes], None]]) -> Figure:
    def draw(ax: Axes, label: str) -> None:
        panels[label](ax)
        ax.set_ylabel(label)

    return small_multiples(list(panels), draw, 2)


def _final(rows: Sequence[Row], names: Sequence[str]) -> np.ndarray:
    """Final accuracies, [seeds, runs]."""
    return np.array([[row["runs"][name]["evaluations"]["accuracy"][-1] for name in names] for row in rows])


def _entropies(rows: Sequence[Row], run: str, ax: Axes) -> None:
    """By position, in the first and the last steps (the paper's §6.1)."""
    for i, told in enumerate(("first steps", "last steps")):
        table = np.array([row["runs"][run]["student_entropy_by_position"][i] for row in rows])
        _band(ax, np.linspace(0, 100, table.shape[1]), table, PALETTE[i], told)
    ax.set_xlabel("position in the response (%)")


def horizon(rows: Sequence[Row]) -> Figure:
    lengths = sorted(rows[0]["runs"], key=int)

    def accuracy(ax: Axes) -> None:
        table, x = _final(rows, lengths), [int(n) for n in lengths]
        _dots(ax, x, table, PALETTE[0])
        _band(ax, x, table, PALETTE[0])
        ax.set_xlabel("longest response (tokens)")

    def continuation(ax: Axes) -> None:
        cuts = [[at["difference"]["value"] for at in row["depth"]["depths"]] for row in rows]
        x = [at["depth"] for at in rows[0]["depth"]["depths"]]
        _dots(ax, x, np.array(cuts), PALETTE[0])
        _band(ax, x, np.array(cuts), PALETTE[0])
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set_xlabel("cut after (tokens)")

    return _panels(
        {
            "final accuracy": accuracy,
            "gain of the teacher's\ncontinuation (accuracy)": continuation,
            "student entropy (nats),\nlongest responses": lambda ax: _entropies(rows, lengths[-1], ax),
        }
    )


def collapsed(rows: Sequence[Row]) -> Figure:
    return _panels({"student entropy (nats)": lambda ax: _entropies(rows, "collapsed", ax)})


def rewards(rows: Sequence[Row]) -> Figure:
    names = list(rows[0]["reward"])

    def auroc(ax: Axes) -> None:
        _columns(ax, names, np.array([[row["reward"][name]["auroc"]["value"] for name in names] for row in rows]))
        ax.axhline(0.5, color="0.6", linewidth=0.8)

    def ratio(ax: Axes) -> None:
        _columns(ax, names, np.array([[row["ratio"][name] for name in names] for row in rows]))
        ax.axhline(1, color="0.6", linewidth=0.8)

    return _panels(
        {"AUROC of the mean reward": auroc, "coherence of token gradients\n/ that of orthogonal ones": ratio}
    )


def sizes(rows: Sequence[Row]) -> Figure:
    """Final accuracy by the length of the list (the paper's §6.3)."""

    def draw(ax: Axes) -> None:
        for kind, colour in (("Eq. 5", PALETTE[0]), ("published", PALETTE[1])):
            names = [name for name in rows[0]["runs"] if name.startswith(kind)]
            names.sort(key=list_size)
            table = _final(rows, names)
            _dots(ax, [list_size(n) for n in names], table, colour)
            _band(ax, [list_size(n) for n in names], table, colour, kind)
        ends = np.array(ax.get_xlim())
        for kind, colour in (("sampled", PALETTE[2]), ("full", PALETTE[3])):
            _band(ax, ends, np.repeat(_final(rows, [kind]), 2, axis=1), colour, kind, "--")
        ax.set_xscale("log", base=2)
        ks = sorted({list_size(name) for name in rows[0]["runs"] if "k = " in name})
        ax.set_xlim(ks[0] / 1.1, ks[-1] * 1.1)
        ax.set_xticks(ks, [str(k) for k in ks])
        ax.set_xlabel("k")

    return _panels({"final accuracy": draw})


# What the paper draws of an experiment beside curves over steps.
FURTHER: Mapping[str, Callable[[Sequence[Row]], Figure]] = {
    "6.1": horizon,
    "6.1+": collapsed,
    "6.2": rewards,
    "6.3": sizes,
}
