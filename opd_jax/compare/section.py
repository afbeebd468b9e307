"""What people see of a comparison: tables, sentences, curves and the frontier."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from opd_jax.compare.result import COSTS, YARDSTICK, Row
from opd_jax.compare.variants import shown
from opd_jax.plan.topology import GIB
from opd_jax.tracking.labels import axis_label, format_interval, format_value, short_label
from opd_jax.tracking.plots import PALETTE, small_multiples
from opd_jax.tracking.sections import Plot, Section, Table

MIB = 2**20
ZERO = 1e-6  # a gradient norm that is rounding
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))
_MARKS = "osD^vPX"
_STAGES = ("rollout", "score", "update", "metrics")
SHOWN = ("accuracy", "reverse_kl", "forward_kl", "overlap_ratio", "entropy_gap")
_COST = {
    "flops": ("FLOPs of all updates", 1e12, "TFLOP", "FLOPs"),
    "seconds": ("time of all updates", 1.0, "s", "time"),
}


def section(result: Row) -> Section:
    """What people see of the result of ``compare_runs``."""
    seeds, rows = result["seeds"], _ordered(result)
    title = (
        f"{len(rows)} variants after {result['steps']:,} steps, {len(seeds)} seed{'s' * (len(seeds) > 1)}, best first"
    )
    tables = [
        Table(title, *_main(result, rows)),
        Table(f"Difference to {result['variants'][0]['name']}, paired by seed, 95 %", *_differences(result, rows)),
        Table("Cost: seconds of a step (medians), FLOPs of its updates, bytes of a device", *_costs(result, rows)),
    ]
    drawn = [name for name in ("accuracy", "reverse_kl") if name in result["metrics"]]
    plots = [
        Plot(
            f"{axis_label(n, result['metrics_k'])} on held-out prompts over steps",
            functools.partial(_curves, result, n),
        )
        for n in drawn
    ]
    plots += [
        Plot(f"{axis_label(result['by'])} against {_COST[cost][0]}", functools.partial(_frontier, result, cost))
        for cost in COSTS
        if all(row["cost"][cost] is not None for row in rows)
    ]
    return Section("compare", "Comparison of variants", _in_words(result, rows), tables, plots)


def compiled_section(result: Row) -> Section:
    """What people see of the result of ``compile_variants``."""
    mesh = " × ".join(f"{name} {size}" for name, size in result["mesh"].items())
    rows = result["variants"]
    rarely = rows[0]["measured"] is not None
    columns = (
        ["variant", "rows", "PFLOP", "peak GiB"]
        + ["with metrics"] * rarely
        + ["temp GiB", *_kinds(rows), "CPU s to compile"]
    )
    cells = []
    for row in rows:
        sizes = [row[part]["total"] for part in ("update", "measured")[: 1 + rarely]]
        temp = row["update"]["temp"]
        transfers = [_transfer(row["update"]["collectives"], kind) for kind in _kinds(rows)]
        seconds = sum(row[part]["cpu_seconds"] for part in ("update", "measured")[: 1 + rarely])
        bytes_ = [*(size / GIB for size in sizes), None if temp is None else temp / GIB]
        cells.append([row["name"], row["rows"], row["flops"] / 1e15, *bytes_, *transfers, f"{seconds:.0f}"])
    title = f"The update on {result['topology']}: {result['chips']} chips; {mesh}"
    prompt, response = result["tokens"]
    often = f"One step in {result['metrics_every']} also measures (with metrics)" if rarely else "Every step measures"
    lead = [
        f"{result['student']} ← {result['teacher']}, rows of {prompt:,} + {response:,} tokens. {often}.",
        "FLOPs are those of one update of rows of that length, on all chips. Bytes are those of one chip, from the "
        "compiler: peak with all that stays there, temp the update's own.",
        "Transfers: how often, and what a chip gives or gets. What stands in a loop of known length, as over "
        "layers, counts as often as it runs; in one that depends on the texts (passes, chunks of tokens), once. Of "
        "the branches of a condition the one with most bytes counts.",
        *_not_fitting(rows, result["usable_bytes"]),
        *_left_out(result),
    ]
    return Section(
        f"compare-{result['topology']}",
        f"Variants compiled for {result['topology']}",
        lead,
        [Table(title, columns, cells)],
    )


def _not_fitting(rows: Sequence[Row], usable: int) -> list[str]:
    over = [r["name"] for r in rows if r["update"]["over"] or (r["measured"] and r["measured"]["over"])]
    return [f"More than the {usable / GIB:.2f} GiB of a chip: {', '.join(over)}."] if over else []


def _kinds(rows: Sequence[Row]) -> list[str]:
    return sorted({kind for row in rows for kind in row["update"]["collectives"] or ()})


def _transfer(collectives: Row | None, kind: str) -> str | None:
    held = (collectives or {}).get(kind)
    return f"{held['count']:,}: {format_value(held['bytes'] / 1e9)} GB" if held else None


def _ordered(result: Row) -> list[Row]:
    by_name = {row["name"]: row for row in result["variants"]}
    return [by_name[name] for name in result["order"]]


def _estimate(held: Row) -> Any:
    return held["mean"] if held["error"] is None else (held["mean"], held["error"])


def _main(result: Row, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    by, names = result["by"], [n for n in SHOWN if n in result["metrics"]]
    columns = ["variant", *_heads(result, names), f"{short_label(by)} learnt, 95 %"]
    cells = [
        [
            row["name"],
            *(_estimate(row["final"][n]) if i < 2 else row["final"][n]["mean"] for i, n in enumerate(names)),
            _interval(row["learnt"][by]),
        ]
        for row in rows
    ]
    return columns, cells


def _differences(result: Row, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    names = [n for n in SHOWN if n in result["metrics"]]
    cells = [[r["name"], *(_interval(r["difference"][n]) for n in names)] for r in rows if r["difference"]]
    return ["variant", *_heads(result, names)], cells


def _costs(result: Row, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    columns = ["variant", *_STAGES, "step", "tokens/s", "GFLOP", "metrics GFLOP", "peak MiB", "temp MiB", "frontier"]
    cells = []
    for row in rows:
        update, of_metrics = (row["memory"] or {}).get("update"), row["cost"]["metrics_flops"]
        cells.append([
            row["name"],
            *(row["times"].get(stage) for stage in (*_STAGES, "step", "tokens_per_second")),
            row["cost"]["flops"] / result["steps"] / 1e9,
            None if of_metrics is None else of_metrics / 1e9,
            update and update["total"] / MIB,
            update and update["temp"] / MIB,
            ", ".join(_COST[cost][3] for cost in COSTS if row["efficient"][cost]) or None,
        ])  # fmt: skip
    return columns, cells


def _heads(result: Row, names: Sequence[str]) -> list[str]:
    return [axis_label(n, result["metrics_k"]) if n == "overlap_ratio" else short_label(n) for n in names]


def _interval(held: Row) -> str:
    """Its middle is the mean; of one seed the mean alone."""
    return format_value(held["mean"]) if held["low"] is None else format_interval(held["low"], held["high"])


def _in_words(result: Row, rows: Sequence[Row]) -> list[str]:
    return [*_set_up(result), *_learning(result, rows), *_left_out(result)]


def _set_up(result: Row) -> list[str]:
    k, seeds, before = result["metrics_k"], len(result["seeds"]), result["before"]
    mesh = " × ".join(f"{name} {size}" for name, size in result["mesh"].items())
    start = [f"{short_label(n)} {format_value(before[n]['mean'])}" for n in ("accuracy", "reverse_kl") if n in before]
    known = result["of_teacher"].get("accuracy")
    start += [f"the teacher's accuracy {format_value(known['mean'])}"] if known else []
    chance = (
        f"± is a standard error over seeds; intervals are Student's, of {seeds} seeds; a value that all seeds share "
        "has none. What is said to be certain is so for all variants at once (Bonferroni)."
    )
    alike = all(run["rollouts"] for row in result["variants"] for run in row["runs"])
    return [
        f"{result['student']} ← {result['teacher']} on {result['devices']} ({mesh}), {result['rollouts']} rollouts a "
        f"step. Before: {', '.join(start)}.",
        f"Held out: {result['problems']} prompts × {result['samples']}, fresh rollouts, the same random numbers for "
        f"all variants of a seed; overlap in lists of {k} for all. "
        + (chance if seeds > 1 else "One seed says nothing of chance: give --seeds 3."),
        "All variants of a seed made the same rollouts at step 1, bit by bit. "
        * alike
        + "Frontier: no other variant is at least as good and as cheap, by means over seeds; times that differ by less "
        "than those of one variant do between seeds count as equal."
        + " Every step measures: seconds and bytes are with metrics, GFLOP without."
        * (result["metrics_every"] == 1),
    ]


def _learning(result: Row, rows: Sequence[Row]) -> list[str]:
    by, lead, first = result["by"], [], result["variants"][0]["name"]
    still = [r["name"] for r in rows if all(x["gradient_norm"] and x["gradient_norm"]["max"] < ZERO for x in r["runs"])]
    if still:
        lead.append(f"Does not learn: {', '.join(still)}. The gradient is zero at every step (norm below {ZERO:.0e}).")
    unsure = [
        row["name"]
        for row in rows
        if row["name"] not in still and not any(_clear(row["jointly"]["learnt"], way) for way in (1, -1))
    ] * (len(result["seeds"]) > 1)
    if unsure:
        lead.append(f"Not certain to have learnt ({short_label(by)} before and after): {', '.join(unsure)}.")
    for word, way in (("better", 1), ("worse", -1)):
        differences = {row["name"]: row["jointly"]["difference"] for row in rows}
        sure = [name for name, held in differences.items() if held and _clear(held, way * YARDSTICK[by])]
        if sure:
            lead.append(f"Certainly {word} than {first} in {short_label(by)}: {', '.join(sure)}.")
    return lead


def _left_out(result: Row) -> list[str]:
    dropped = result["dropped"]
    told = [f"{shown(d['settings'])} ({d['why']})" for d in dropped]
    return [f"Left out: {'; '.join(told)}."] if told else []


def _clear(held: Row, way: int) -> bool:
    return held["low"] is not None and (held["low"] > 0 if way > 0 else held["high"] < 0)


def _styles(result: Row) -> dict[str, Row]:
    """Of each variant a colour; beyond as many as there are, other dashes and marks, too."""
    n = len(PALETTE)
    return {
        row["name"]: {
            "color": PALETTE[i % n],
            "linestyle": _DASHES[i // n % len(_DASHES)],
            "marker": _MARKS[i % len(_MARKS)],
        }
        for i, row in enumerate(result["variants"])
    }


def _curves(result: Row, name: str) -> Figure:
    """Mean over seeds and its 95 % band, the variants listed as they end."""
    styles, variants = _styles(result), {row["name"]: row for row in result["variants"]}
    order = sorted(variants, key=lambda v: -variants[v]["final"][name]["mean"])
    level = result["of_teacher"].get(name)

    def draw(ax: Axes, _: str) -> None:
        for variant, style in styles.items():
            rows = variants[variant]["curves"][name]
            steps, mean = ([row[key] for row in rows] for key in ("step", "mean"))
            ax.plot(steps, mean, linewidth=1.7, markersize=3.5, **style)
            low, high = (np.array([row[key] for row in rows], float) for key in ("low", "high"))  # None: nan, no band
            bounds = (0, 1) if name in ("accuracy", "overlap_ratio") else (0, np.inf)
            ax.fill_between(
                steps, np.clip(low, *bounds), np.clip(high, *bounds), color=style["color"], alpha=0.12, linewidth=0
            )
        if level:
            ax.axhline(level["mean"], color="#555555", linestyle="--", linewidth=1.1)
        handles = [
            Line2D([], [], linewidth=1.7, markersize=3.5, **styles[v], label=textwrap.fill(v, 24)) for v in order
        ]
        if level:
            handles.insert(0, Line2D([], [], color="#555555", linestyle="--", linewidth=1.1, label="teacher"))
        if name == "reverse_kl" and min(row["mean"] for v in variants.values() for row in v["curves"][name]) > 0:
            ax.set_yscale("log")
        _legend(ax, handles)
        ax.set_xlabel("step")
        ax.set_ylabel(textwrap.fill(axis_label(name, result["metrics_k"]), 28))
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))

    return small_multiples([name], draw, 1, _PANEL)


def _frontier(result: Row, cost: str) -> Figure:
    """A filled mark where no other variant is as good and as cheap, by the means; those are joined."""
    styles, by = _styles(result), result["by"]
    label, unit, name, _ = _COST[cost]

    def draw(ax: Axes, _: str) -> None:
        handles, best = [], []
        for row in _ordered(result):
            style = styles[row["name"]]
            x, y = row["cost"][cost] / unit, row["final"][by]
            kind = {"color": style["color"], "marker": style["marker"], "markersize": 6, "markeredgewidth": 1.5}
            kind |= {} if row["efficient"][cost] else {"markerfacecolor": "white"}
            if y["low"] is not None:
                ax.plot([x, x], [y["low"], y["high"]], color=style["color"], linewidth=1.1, alpha=0.6)
            ax.plot([x], [y["mean"]], linestyle="none", zorder=4, **kind)
            handles.append(Line2D([], [], linestyle="none", label=textwrap.fill(row["name"], 24), **kind))
            best += [(x, y["mean"])] * row["efficient"][cost]
        ax.plot(*zip(*sorted(best), strict=True), color="#999999", linewidth=1.0, linestyle=":", zorder=1)
        _legend(ax, handles, "filled: frontier, by the means")
        ax.set_xlabel(f"{label} ({name})")
        ax.set_ylabel(textwrap.fill(axis_label(by), 28))
        ax.xaxis.set_major_locator(MaxNLocator(5))

    return small_multiples([by], draw, 1, _PANEL)


_PANEL = (5.6, 2.9)  # inches: room for the names beside the axes


def _legend(ax: Axes, handles: Sequence[Line2D], title: str | None = None) -> None:
    """Beside the axes, where no line can run through it."""
    ax.legend(
        handles=handles, title=title, loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=2.2, borderaxespad=0.2
    )
