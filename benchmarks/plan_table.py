"""Settings of the paper's pairs that fit, on pods that are not there: the table of docs/plan.md.

    uv pip install -e ".[aot]"
    python benchmarks/plan_table.py --json benchmarks/results/plan_table.json

An entry that the JSON holds already is kept; remove it there to have it compiled again. ``--only v5e-16`` picks some.
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

from opd_jax.config import load_config
from opd_jax.plan import plan_run
from opd_jax.plan.topology import GIB
from opd_jax.tracking.console import console

A, B, C = "qwen3_4b_to_1.7b", "r1_7b_to_1.5b", "r1_14b_to_7b"
FSDP = "mesh.fsdp=-1"
SETTINGS = [  # configuration, topology, overrides
    (A, "v5e-16", f"{FSDP} mesh.tensor=2 micro_batch=8 rollout.slots=192 evaluation.batch=32"),
    (B, "v5e-16", f"{FSDP} mesh.tensor=2 micro_batch=8 evaluation.data=null"),
    (C, "v5p-32", f"{FSDP} micro_batch=16"),
    (A, "v6e-16", f"{FSDP} micro_batch=16"),
    (B, "v6e-16", f"{FSDP} micro_batch=16"),
    (A, "v5e-64", f"{FSDP} micro_batch=64"),
    (B, "v5e-64", f"{FSDP} mesh.tensor=2 micro_batch=32"),
    (A, "v5p-16", f"{FSDP} micro_batch=16"),
    (B, "v5p-16", f"{FSDP} micro_batch=16"),
    (C, "v5p-32", f"{FSDP} micro_batch=16 rollout.max_response=15360"),
    (A, "v6e-16", f"{FSDP} micro_batch=16 rollout.max_response=15360 rollout.slots=128"),
]
COLUMNS = ("pair", "topology", "settings", "peak GiB", "spare GiB", "in", "slowest compilation s", "est. s/step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/plan_table.json"))
    parser.add_argument("--only", default="", help="entries whose configuration or topology holds this text")
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
    keys = [(f"{n} {t} {o}", (n, t, o)) for n, t, o in SETTINGS]
    console.table("settings that fit", COLUMNS, [_row(*which, record[key]) for key, which in keys if key in record])


def _row(name: str, topology: str, overrides: str, result: dict[str, Any]) -> list[Any]:
    slowest = max(line["seconds"] for line in result["programs"])
    peak, spare = (result[k] / GIB for k in ("peak_bytes", "spare_bytes"))
    estimate = result["estimate"]["seconds_per_step"]
    return [name, topology, overrides, peak, spare, result["peak_program"], slowest, estimate]


if __name__ == "__main__":
    main()
