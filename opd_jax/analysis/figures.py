"""Figures of the analyses of a student and its teachers: one panel each, which pages put side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opd_jax.tracking.plots import PALETTE, small_multiples

Series = Mapping[str, Sequence[Mapping[str, Any]]]


def histogram(counts: Mapping[str, Sequence[float]], edges: Sequence[float], label: str, title: str) -> Figure:
    """Shares of each class by value, one outline a class."""

    def draw(ax: Axes, _: str) -> None:
        for (kind, of_kind), colour in zip(counts.items(), PALETTE, strict=False):
            share = np.asarray(of_kind, float) / max(sum(of_kind), 1)
            ax.stairs(share, edges, color=colour, fill=True, alpha=0.25)
            ax.stairs(share, edges, color=colour, linewidth=1.6, label=f"{kind} ({sum(of_kind):,})")
        _name(ax, label, "share of the class", title)

    return small_multiples([title], draw, 1)


def by_depth(series: Series, label: str, title: str = "") -> Figure:
    """Means with standard errors over ranges of output positions, one colour a series.

    ``series``: rows with ``start``, ``end``, ``mean``, ``error``.
    """

    def draw(ax: Axes, _: str) -> None:
        for (name, rows), colour in zip(series.items(), PALETTE, strict=False):
            held = [r for r in rows if r["mean"] is not None and np.isfinite(r["mean"])]
            x = [(r["start"] + r["end"]) / 2 for r in held]
            y = np.array([r["mean"] for r in held], float)
            error = np.nan_to_num(np.array([r["error"] for r in held], float))
            ax.fill_between(x, y - error, y + error, color=colour, alpha=0.2, linewidth=0)
            ax.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.8, label=name)
        ax.set_xlim(left=0)
        _name(ax, "output position (tokens)", label, title)

    return small_multiples([label], draw, 1)


def at_depths(series: Series, label: str, zero: bool = False) -> Figure:
    """Values with 95 % intervals at single depths, one colour a series.

    ``series``: rows with ``depth``, ``value``, ``low``, ``high``. ``zero``: draws the line of no difference.
    """
    depths = [row["depth"] for rows in series.values() for row in rows]
    aside = 0.008 * (max(depths) - min(depths))  # or intervals would hide each other

    def draw(ax: Axes, _: str) -> None:
        for i, ((name, rows), colour) in enumerate(zip(series.items(), PALETTE, strict=False)):
            x, y, low, high = (np.array([r[n] for r in rows], float) for n in ("depth", "value", "low", "high"))
            x += (2 * i - len(series) + 1) * aside
            spread = np.nan_to_num(np.stack([y - low, high - y]))
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.8, "capsize": 2.5}
            ax.errorbar(x, y, yerr=spread, color=colour, label=name, **style)
        if zero:
            ax.axhline(0, color="#888888", linewidth=0.8)
        _name(ax, "depth of the cut (tokens)", label)

    return small_multiples([label], draw, 1)


def _name(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(textwrap.fill(x, 40))
    ax.set_ylabel(textwrap.fill(y, 28))
    ax.set_title(title, fontsize=10, loc="left")
