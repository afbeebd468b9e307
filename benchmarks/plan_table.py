"""Settings of the paper's pairs that fit, on pods that are not there: the table of docs/plan.md.

    uv pip install -e ".[aot]"
    python benchmarks/plan_table.py --json benchmarks/results/plan_table.json --page docs/plan.md

An entry that the JSON holds already is kept; remove it there to have it compiled again. ``--only v5e-16`` picks some.
Each takes 5 to 9 minutes of one core.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from opd_jax.config_files import load_config
from opd_jax.plan import plan_run
from opd_jax.plan.topology import GIB
from opd_jax.tracking.console import console
from opd_jax.tracking.labels import format_value

A, B, C = "qwen3_4b_to_1.7b", "r1_7b_to_1.5b", "r1_14b_to_7b"
TRAINING = "mesh.fsdp=-1 evaluation.data=null"  # without the evaluation: half of the compilations
SETTINGS = [  # configuration, topology, overrides
    (A, "v5e-16", "mesh.fsdp=-1 mesh.tensor=2 micro_batch=8 rollout.slots=192 evaluation.batch=32"),
    (C, "v5p-32", "mesh.fsdp=-1 micro_batch=16"),
    (B, "v5e-16", f"{TRAINING} micro_batch=16"),
    (A, "v6e-16", f"{TRAINING} micro_batch=16"),
    (B, "v6e-16", f"{TRAINING} micro_batch=16"),
    (A, "v5e-64", f"{TRAINING} micro_batch=64"),
    (B, "v5e-64", f"{TRAINING} micro_batch=64"),
    (A, "v5p-16", f"{TRAINING} micro_batch=16"),
    (B, "v5p-16", f"{TRAINING} micro_batch=16"),
    (C, "v5p-32", f"{TRAINING} micro_batch=16 rollout.max_response=15360"),
    (A, "v6e-16", f"{TRAINING} micro_batch=16 rollout.max_response=15360 rollout.slots=192"),
    # one of each shape in configs/paper, evaluation included
    ("paper/3.1_mismatched", "v5e-64", ""),
    ("paper/3.2_r1_larger", "v5e-64", ""),
    ("paper/4.1_success", "v5e-64", ""),
    ("paper/5.1_sft", "v5e-64", ""),
    ("paper/6.1_horizon", "v5e-64", ""),
]
COLUMNS = (
    "run",
    "topology",
    "settings",
    "verdict",
    "peak, GiB",
    "spare, GiB",
    "peak is",
    "slowest compilation",
    "s/step",
)
BEGIN, END = "<!-- table: benchmarks/plan_table.py -->", "<!-- end of the table -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/plan_table.json"))
    parser.add_argument("--only", default="", help="entries whose configuration or topology holds this text")
    parser.add_argument("--page", type=Path, help="Markdown file that holds the table between its two marks")
    options = parser.parse_args()
    record = json.loads(options.json.read_text()) if options.json.exists() else {}
    for name, topology, overrides in SETTINGS:
        key = f"{name} {topology} {overrides}"
        if key in record or options.only not in key:
            continue
        config = load_config(Path("configs") / f"{name}.yaml", overrides.split())
        versions = {"jax": jax.__version__, "libtpu": importlib.metadata.version("libtpu")}
        record[key] = versions | plan_run(config, topology, caches=(), search=False)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    rows = [_row(*which, record[" ".join(which)]) for which in SETTINGS if " ".join(which) in record]
    console.table("settings of the paper's pairs", COLUMNS, rows)
    if options.page:
        lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
        table = "\n".join(f"| {' | '.join(format_value(cell) for cell in line)} |" for line in lines)
        before, rest = options.page.read_text().split(BEGIN)
        options.page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def _row(name: str, topology: str, overrides: str, result: dict[str, Any]) -> list[Any]:
    slowest = max(result["programs"], key=lambda line: line["cpu_seconds"])
    return [
        name,
        topology,
        f"`{overrides}`" if overrides else "as it stands",
        "fits" if result["fits"] else f"over by {-result['spare_bytes']:,} B",
        result["peak_bytes"] / GIB,
        result["spare_bytes"] / GIB,
        result["peak_program"],
        f"{slowest['name']}, {slowest['cpu_seconds']:.0f} s",
        result["estimate"]["seconds_per_step"],
    ]


if __name__ == "__main__":
    main()
