"""The tables of a plan for people, and the same for machines."""

from __future__ import annotations

import dataclasses
from typing import Any

from opd_jax.config import Config
from opd_jax.plan.compiling import Line
from opd_jax.plan.cost import ASSUMPTIONS, Cost
from opd_jax.plan.programs import Programs
from opd_jax.plan.search import Found, slots_that_fit
from opd_jax.plan.topology import GIB, Topology
from opd_jax.tracking.console import console
from opd_jax.tracking.labels import format_duration


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run takes on each chip, what it costs, and the nearest setting that fits where it does not."""

    topology: Topology
    config: Config
    programs: Programs
    lines: list[Line]
    costs: list[Cost]
    tokens: float  # response tokens of a step
    found: Found | None

    @property
    def fits(self) -> bool:
        return all(line.fits for line in self.lines if line.needed)

    @property
    def peak(self) -> Line:
        return max((line for line in self.lines if line.needed), key=lambda line: line.total)

    def slots_that_fit(self, line: Line) -> int | None:
        """Slots with which a segment for longer responses would fit."""
        if "cache" not in line.parts or line.needed:
            return None
        slots = slots_that_fit(line, self.programs.slots, self.topology.usable)
        return slots // self.programs.shapes.shards * self.programs.shapes.shards

    def estimates(self) -> list[dict[str, Any]]:
        """Time and bound of every stage; without published rates of the chip only the counts."""
        chip = self.topology.chip
        rows = []
        for cost in self.costs:
            row: dict[str, Any] = {
                "stage": cost.name, "flops": cost.flops, "memory_bytes": cost.memory, "link_bytes": cost.links,
            }  # fmt: skip
            if chip:
                row["seconds"], row["bound_by"] = cost.estimate(chip)
            rows.append(row)
        return rows


def show(plan: Plan) -> None:
    """Prints the tables."""
    topology, usable = plan.topology, plan.topology.usable
    mesh = " × ".join(f"{name} {size}" for name, size in plan.programs.layout.mesh.shape.items())
    title = f"{topology.name}: {len(topology.devices)} chips, {gib(usable)} usable of each; {mesh}"
    _memory(title, plan.lines, plan)
    for line in plan.lines:
        slots = plan.slots_that_fit(line)
        if slots is not None and not line.fits:
            console.print(f"{line.name}: {slots} slots at once would fit" if slots else f"{line.name}: no slots fit")
    _verdict(plan)
    if plan.found:
        _memory("with these settings", plan.found.lines, plan)
    _estimate(plan)


def _memory(title: str, lines: list[Line], plan: Plan) -> None:
    columns = ("program, GiB a chip", "arguments", "temp", "output", "donated", "stays", "total", "of it most", "", "s")
    rows = []
    for line in lines:
        name, share = line.largest
        sizes = (line.arguments, line.temp, line.outputs, line.aliased, line.resident, line.total)
        verdict = "fits" if line.fits else f"over by {line.over:,} B"
        cells = [None if n is None else n / GIB for n in sizes]
        rows.append([line.name, *cells, f"{name} {share:.0%}", verdict, f"{line.seconds:.0f}"])
    console.table(title, columns, rows)


def _verdict(plan: Plan) -> None:
    peak, usable = plan.peak, plan.topology.usable
    if plan.fits:
        console.print(
            f"fits: {peak.name} takes the most, {gib(peak.total)}; {gib(usable - peak.total)} to spare", "green"
        )
        return
    lacking = ", ".join(line.name for line in plan.lines if line.needed and not line.fits)
    console.print(f"does not fit: {lacking}; {peak.name} is over by {gib(peak.over)}", "red")
    if plan.found:
        console.print(f"fits with: {' '.join(plan.found.overrides)}", "green")
    else:
        console.print("no smaller pass, fuller remat, sharding or number of slots was found to fit; take more chips")


def _estimate(plan: Plan) -> None:
    rows = plan.estimates()
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    columns = ("stage, a chip and step", "TFLOP", "memory GB", "links GB", "s", "bound by")
    cells = [
        [
            r["stage"],
            r["flops"] / 1e12,
            r["memory_bytes"] / 1e9,
            r["link_bytes"] / 1e9,
            r.get("seconds"),
            r.get("bound_by"),
        ]
        for r in rows
    ]
    which = " with these settings" if plan.found else ""
    console.table(f"ESTIMATE of a step{which} (formulas, not measured)", columns, cells)
    if seconds:
        rate = plan.tokens / seconds
        console.print(f"about {format_duration(seconds)} a step, {rate:,.0f} response tokens/s, if:")
    else:
        console.print("no published rates for these chips, so no times; the counts assume:")
    for text in ASSUMPTIONS:
        console.print(f"  {text}")


def gib(n: float) -> str:
    return f"{n / GIB:.2f} GiB"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything as plain values; bytes are those of one chip."""
    estimates = plan.estimates()
    seconds = sum(row.get("seconds", 0.0) for row in estimates) or None
    return {
        "topology": plan.topology.name,
        "chips": len(plan.topology.devices),
        "mesh": dict(plan.programs.layout.mesh.shape),
        "usable_bytes": plan.topology.usable,
        "fits": plan.fits,
        "peak_bytes": plan.peak.total,
        "peak_program": plan.peak.name,
        "spare_bytes": plan.topology.usable - plan.peak.total,
        "programs": [_line(plan, line) for line in plan.lines],
        "nearest": None
        if plan.found is None
        else {
            "overrides": plan.found.overrides,
            "peak_bytes": max(line.total for line in plan.found.lines if line.needed),
            "programs": [_line(plan, line) for line in plan.found.lines],
        },
        "estimate": {
            "of": "nearest" if plan.found else "configuration",
            "assumptions": list(ASSUMPTIONS),
            "stages": estimates,
            "seconds_per_step": seconds,
            "tokens_per_second": plan.tokens / seconds if seconds else None,
        },
    }


def _line(plan: Plan, line: Line) -> dict[str, Any]:
    name, share = line.largest
    return dataclasses.asdict(line) | {
        "fits": line.fits, "largest": name, "largest_share": share, "slots_that_fit": plan.slots_that_fit(line),
    }  # fmt: skip
