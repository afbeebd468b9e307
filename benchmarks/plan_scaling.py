"""Scratch memory of each program from 16 to 256 chips at a fixed load per chip: it should not grow with the pod.

    uv pip install -e ".[aot]"
    python benchmarks/plan_scaling.py --json benchmarks/results/plan_scaling.json --plot docs/plan-scaling.png

Four layers of Qwen3-1.7B learn from four of Qwen3-4B on v5e: fsdp 16, the other chips along data; 16 rollouts and one
row a pass for each chip, 256 + 1,792 tokens. The layers are scanned, so more of them add compile time and nothing to
temp but the weights that are gathered and kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import matplotlib

from opd_jax.config_files import parse_config
from opd_jax.mesh import make_mesh
from opd_jax.models.published import decoder_of
from opd_jax.plan.compiling import compile_line
from opd_jax.plan.programs import Programs
from opd_jax.plan.topology import find_topology
from opd_jax.tracking.console import console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CHIPS = (16, 64, 256)
LAYERS = 4
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--fsdp", type=int, default=16)
    parser.add_argument("--only", default="", help="programs whose name holds this")
    options = parser.parse_args()
    rows = [row for chips in CHIPS for row in measured(chips, options.fsdp, options.only)]
    names = list(dict.fromkeys(row["program"] for row in rows))
    table = [[name, *(row["temp MiB"] for row in rows if row["program"] == name)] for name in names]
    console.table("temp a chip, MiB", ("program", *map(str, CHIPS)), table)
    if options.json:
        versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(versions | {"rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, names, options.plot)


def measured(chips: int, fsdp: int, only: str) -> list[dict[str, Any]]:
    topology = find_topology(f"v5e-{chips}")
    config = parse_config(
        {
            "run_dir": "unused", "steps": 1, "student": {"path": "Qwen/Qwen3-1.7B"},
            "teacher": {"path": "Qwen/Qwen3-4B"}, "objective": {"name": "topk", "k": 16},
            "data": {"source": "unused", "max_prompt": 256}, "mesh": {"data": -1 if fsdp > 0 else 1, "fsdp": fsdp},
            "rollout": {"prompts": 4 * chips, "samples": 4, "max_response": 1792},
            "micro_batch": chips,
        }
    )  # fmt: skip
    student, teacher = (
        dataclasses.replace(decoder_of(path), layers=LAYERS) for path in ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")
    )
    mesh = make_mesh(**config.mesh.model_dump(), devices=topology.devices)
    rows = []
    for program in (p for p in Programs(config, mesh, student, teacher).all() if only in p.name):
        line = compile_line(program, topology.usable)
        temp = None if line.temp is None else line.temp / MIB
        console.print(f"{chips} chips, {line.name}: temp {temp} MiB, compiled in {line.seconds:.0f} s")
        rows.append(
            {"chips": chips, "program": line.name, "temp MiB": temp, "total MiB": line.total / MIB, "s": line.seconds}
        )
    return rows


def plot(rows: list[dict[str, Any]], names: list[str], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    shown = [name for name in names if any(row["temp MiB"] for row in rows if row["program"] == name)]
    for name, marker in zip(shown, "osv^DxP*", strict=False):
        values = [row["temp MiB"] for row in rows if row["program"] == name]
        axes.plot(CHIPS, values, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(CHIPS, [str(n) for n in CHIPS])
    axes.set_yscale("log")
    axes.set_ylim(1, 10_000)
    axes.set_xlabel("chips (v5e)")
    axes.set_ylabel("temp a chip (MiB)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
