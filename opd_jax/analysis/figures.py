"""Figures of the analyses of a student and its teachers."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_jax.tracking.plots import PALETTE, small_multiples

Row = Mapping[str, Any]


def histograms(
    panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, edges: Sequence[Sequence[float]]
) -> Figure:
    """Shares of each class by value: one panel a name, with its own ``edges``; one outline a class.

    ``panels``: name → class → counts.
    """
    bounds = dict(zip(panels, edges, strict=True))

    def draw(ax: Axes, name: str) -> None:
        for (kind, counts), colour in zip(panels[name].items(), PALETTE, strict=False):
            share = np.asarray(counts, float) / max(sum(counts), 1)
            text = f"{kind} ({sum(counts):,})"
            ax.stairs(share, bounds[name], color=colour, fill=True, alpha=0.25)
            ax.stairs(share, bounds[name], color=colour, linewidth=1.6, label=text)
        ax.set_title(name, fontsize=10, loc="left")
        ax.set_xlabel(textwrap.fill(label, 32))
        ax.set_ylabel("share of the class")

    return small_multiples(list(panels), draw, 3)


def by_depth(
    panels: Mapping[str, Mapping[str, Sequence[Row]]], labels: Mapping[str, str] | str, columns: int = 3
) -> Figure:
    """Means with standard errors over ranges of output positions: one panel a name, one colour a series.

    ``panels``: name → series → rows with ``start``, ``end``, ``mean``, ``error``; ``labels``: of the vertical axes.
    """

    def draw(ax: Axes, name: str) -> None:
        for (series, rows), colour in zip(panels[name].items(), PALETTE, strict=False):
            held = [r for r in rows if r["mean"] is not None and np.isfinite(r["mean"])]
            x = [(r["start"] + r["end"]) / 2 for r in held]
            y = np.array([r["mean"] for r in held], float)
            error = np.nan_to_num(np.array([r["error"] for r in held], float))
            ax.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.8, label=series)
        if isinstance(labels, str):
            ax.set_title(name, fontsize=10, loc="left")
        ax.set_xlim(left=0)
        ax.set_xlabel("output position (tokens)")
        ax.set_ylabel(textwrap.fill(labels if isinstance(labels, str) else labels[name], 28))

    return small_multiples(list(panels), draw, columns)


def at_depths(panels: Mapping[str, Mapping[str, Sequence[Row]]], columns: int = 2) -> Figure:
    """Means with 95 % intervals at single depths: one panel a name (its vertical axis), one colour a series.

    ``panels``: name → series → rows with ``depth``, ``value``, ``low``, ``high``.
    """

    depths = [row["depth"] for held in panels.values() for rows in held.values() for row in rows]
    aside = 0.008 * (max(depths) - min(depths))  # or intervals would hide each other

    def draw(ax: Axes, name: str) -> None:
        for i, ((series, rows), colour) in enumerate(zip(panels[name].items(), PALETTE, strict=False)):
            x, y, low, high = (np.array([r[n] for r in rows], float) for n in ("depth", "value", "low", "high"))
            spread = np.nan_to_num(np.stack([y - low, high - y]))
            ax.errorbar(
                x + (2 * i - len(panels[name]) + 1) * aside,
                y,
                yerr=spread,
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.8,
                capsize=2.5,
                label=series,
            )
        if "−" in name:
            ax.axhline(0, color="#888888", linewidth=0.8)
        ax.set_xlabel("depth of the cut (tokens)")
        ax.set_ylabel(textwrap.fill(name, 28))

    return small_multiples(list(panels), draw, columns)
