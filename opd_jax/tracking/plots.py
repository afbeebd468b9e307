"""Curves of a run as matplotlib figures: no pyplot, hence no global state and no display."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from opd_jax.tracking.labels import axis_label, in_order

Row = Mapping[str, Any]

# Okabe and Ito's palette: told apart with any kind of colour vision. Yellow is left out, being faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_TEACHER = "#555555"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.formatter.limits": (-3, 5),
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "opd_jax",
}
_PANEL = (3.7, 2.5)  # inches: three abreast fill a README's width
_SMOOTH_FROM = 80  # rows from which a running mean is drawn over the curve
_EXACT = {"learning_rate"}  # set, not measured: a mean would blur its corners
_SUFFIX = "_by_position"


def curves(
    runs: Mapping[str, Sequence[Row]],
    names: Sequence[str],
    evaluations: Mapping[str, Sequence[Row]] | None = None,
    k: int | None = None,
    columns: int = 3,
) -> Figure:
    """Small multiples: one panel a metric, training step on the x axis, one colour a run.

    ``runs``: label → rows of metrics.jsonl; ``evaluations``: label → rows of evaluations.jsonl, drawn as points with
    standard errors (student) and a dashed level (teacher). ``k`` names the overlap ratio overlap@k.
    Runs of 80 rows and more are drawn faint under their running mean.
    """
    evaluations = evaluations or {}
    labels = list(dict.fromkeys([*runs, *evaluations]))

    def draw(ax: Axes, name: str) -> None:
        for label, colour in zip(labels, _colours(len(labels)), strict=True):
            curve = _draw_training(ax, runs.get(label, ()), name, colour, label)
            _draw_evaluations(ax, evaluations.get(label, ()), name, colour, label if len(labels) > 1 else None, curve)
        ax.set_xlabel("step")
        ax.set_ylabel(_axis_text(name, k))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return small_multiples(names, draw, columns)


def position_curves(
    rows: Sequence[Row],
    names: Sequence[str],
    k: int | None = None,
    max_response: int | None = None,
    average: int = 5,
    columns: int = 3,
) -> Figure:
    """A metric by output position at the first and at the last steps, each the mean of up to ``average`` rows.

    ``names``: metrics whose ``<name>_by_position`` rows hold one value a bin of equal width; ``max_response`` (tokens)
    turns bins into positions. A bin that no response reached is left out.
    """

    def draw(ax: Axes, name: str) -> None:
        held = [row for row in rows if row.get(name + _SUFFIX)]
        n = max(1, min(average, len(held) // 2))
        groups = [("first", held[:n], "#9DB8CC"), ("last", held[-n:], PALETTE[0])] if len(held) > 1 else []
        for when, group, colour in groups or [("", held, PALETTE[0])]:
            means = bin_means([row[name + _SUFFIX] for row in group])
            width = (max_response or len(means)) / len(means)
            x = (np.arange(len(means)) + 0.5) * width
            steps = sorted({group[0]["step"], group[-1]["step"]})
            text = f"{when} steps, {steps[0]}–{steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
            ax.plot(x, means, color=colour, marker="o", markersize=3, linewidth=1.8, label=text)
        ax.set_xlim(left=0)
        ax.set_xlabel("output position (tokens)" if max_response else "output position (bin)")
        ax.set_ylabel(_axis_text(name, k))

    return small_multiples(names, draw, columns)


def heat_map(
    steps: Sequence[float],
    positions: Sequence[float],
    values: Sequence[Sequence[float | None]],
    label: str,
    limits: tuple[float, float],
    title: str = "",
) -> Figure:
    """A metric by training step (across) and output position (upwards); grey where there is no value.

    ``steps`` and ``positions``: bounds of the cells; ``values``: a list of the values at all positions for each step.
    ``limits``: values at the ends of the scale of colours, beyond which colours do not change.
    """
    table = np.array([[_number(v) for v in column] for column in values]).T
    # From 50 colours on matplotlib draws the bar as an image, which the pages' policy refuses.
    colours = mpl.colormaps["viridis"].resampled(40)

    def draw(ax: Axes, _: str) -> None:
        ax.set_facecolor("#d9d9d9")
        ax.grid(visible=False)
        # Edges in the colour of their faces: renderers of SVG leave hairlines between cells.
        mesh = ax.pcolormesh(
            steps, positions, table, vmin=limits[0], vmax=limits[1], cmap=colours, edgecolors="face", linewidth=0.3
        )
        low, high = np.nanmin(table) < limits[0], np.nanmax(table) > limits[1]
        ends: Any = "both" if low and high else "min" if low else "max" if high else "neither"
        bar: Any = ax.figure.colorbar(mesh, ax=ax, extend=ends)
        bar.set_label(textwrap.fill(label, 28))
        bar.solids.set_edgecolor("face")
        ax.set_xlabel("step")
        ax.set_ylabel("output position (tokens)")
        ax.set_title(title, fontsize=10, loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return small_multiples([label], draw, 1)


def bin_means(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Mean of each bin over curves by position; NaN where none has a value."""
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        table[i, : len(row)] = [_number(v) for v in row]
    count = np.isfinite(table).sum(0)
    return np.where(count > 0, np.nansum(table, 0) / np.maximum(count, 1), np.nan)


def position_names(rows: Sequence[Row]) -> list[str]:
    """Metrics that the rows hold by output position."""
    return in_order(key.removesuffix(_SUFFIX) for row in rows for key, v in row.items() if key.endswith(_SUFFIX) and v)


def scores(panels: Mapping[tuple[str, str], Mapping[str, Any]], columns: int = 3) -> Figure:
    """A point with its interval for each name; one panel for each (title, label of the axis), one colour a name.

    ``panels``: panel → name → an object with ``mean``, ``low`` and ``high``.
    """
    names = list(dict.fromkeys(name for held in panels.values() for name in held))

    def draw(ax: Axes, panel: str) -> None:
        (title, label), held = found[panel]
        for y, (name, colour) in enumerate(zip(names, _colours(len(names)), strict=True)):
            if name in held:
                score = held[name]
                ax.plot([score.low, score.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round")
                ax.plot([score.mean], [y], color=colour, marker="o", markersize=7)
        ax.set_yticks(range(len(names)), [textwrap.fill(name, 24) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", visible=False)
        ax.set_title(title, fontsize=10, loc="left")
        ax.set_xlabel(textwrap.fill(label, 32))

    found = {str(i): panel for i, panel in enumerate(panels.items())}
    return small_multiples(list(found), draw, columns)


def save(figure: Figure, path: epath.PathLike) -> None:
    """Writes a PNG (200 dpi) or an SVG, by the ending of ``path``."""
    path = epath.Path(path)
    if path.suffix == ".svg":
        path.write_text(svg(figure))
        return
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(buffer, format="png", dpi=200)
    path.write_bytes(buffer.getvalue())


def svg(figure: Figure) -> str:
    """The figure as an <svg> element to put into HTML: no prologue, no metadata, text drawn as paths."""
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def small_multiples(
    names: Sequence[str], draw: Callable[[Axes, str], None], columns: int, panel: tuple[float, float] = _PANEL
) -> Figure:
    """One panel (inches) a name, drawn by ``draw(axes, name)``, in the style of every figure; legends where several are
    told."""
    columns = max(1, min(columns, len(names)))
    lines = max(1, math.ceil(len(names) / columns))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(panel[0] * columns, panel[1] * lines), layout="constrained")
        for i, name in enumerate(names):
            ax = figure.add_subplot(lines, columns, i + 1)
            draw(ax, name)
            ax.margins(x=0.03, y=0.12)
            if len(ax.get_legend_handles_labels()[0]) > 1:
                ax.legend(loc="best", handlelength=1.6)
        return figure


def _draw_training(ax: Axes, rows: Sequence[Row], name: str, colour: str, label: str) -> bool:
    points = [(row["step"], _number(row.get(name))) for row in rows if name in row]
    if not points:
        return False
    steps, values = np.array(points, dtype=float).T
    if len(points) < _SMOOTH_FROM or name in _EXACT:
        ax.plot(steps, values, color=colour, linewidth=1.8, label=label)
    else:
        ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        ax.plot(steps, _running_mean(values, len(points) // 20), color=colour, linewidth=1.9, label=label)
    return True


def _draw_evaluations(ax: Axes, rows: Sequence[Row], name: str, colour: str, run: str | None, curve: bool) -> None:
    """``run``: its label where there are several; ``curve``: it has a training curve, so points need no line."""
    held = [row for row in rows if row.get(name) is not None]
    student = [row for row in held if row.get("who") != "teacher"]
    if student:
        errors = [row.get(f"{name}_se") or 0.0 for row in student]
        ax.errorbar(
            [row["step"] for row in student],
            [row[name] for row in student],
            yerr=errors if any(errors) else None,
            color=colour,
            marker="o",
            markersize=5,
            markerfacecolor="white",
            markeredgewidth=1.5,
            linestyle="none" if curve else "-",
            linewidth=1.3,
            capsize=2.5,
            zorder=4,
            label="held out" if run is None else None if curve else run,
        )
    for row in (row for row in held if row.get("who") == "teacher"):
        style: dict[str, Any] = {"color": _TEACHER, "label": "teacher"} if run is None else {"color": colour}
        ax.axhline(row[name], linestyle="--", linewidth=1.2, **style)


def _running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Centred, over 2·half + 1 rows, fewer at the ends; gaps are skipped."""
    held = np.isfinite(values)
    base = values[held][0] if held.any() else 0.0  # sums of differences: a constant stays one, without rounding
    total = np.concatenate([[0.0], np.cumsum(np.where(held, values - base, 0.0))])
    count = np.concatenate([[0], np.cumsum(held)])
    i = np.arange(len(values))
    low, high = np.maximum(i - half, 0), np.minimum(i + half + 1, len(values))
    n = count[high] - count[low]
    return np.where(n > 0, base + (total[high] - total[low]) / np.maximum(n, 1), np.nan)


def _axis_text(name: str, k: int | None) -> str:
    return textwrap.fill(axis_label(name, k), 28)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _colours(n: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(n)]
