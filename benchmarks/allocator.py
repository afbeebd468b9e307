"""What the C library's allocator costs a training step on a CPU: glibc's against jemalloc.

    apt install libjemalloc2
    python benchmarks/allocator.py

XLA asks for the buffers of a step anew each time. glibc returns such sizes to the kernel, which clears every page
again; jemalloc, told so, keeps them. SFT steps on 32 short texts of a model of SmolLM2-135M's layers, in processes of
their own, in turn: median seconds of an update without the first two, CPU seconds in the kernel, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from opd_jax.tracking.console import console

Row = dict[str, Any]
RESULT = Path(__file__).parent / "results" / "allocator.json"
JEMALLOC = "/usr/lib/x86_64-linux-gnu/libjemalloc.so.2"
KEEP = "thp:always,dirty_decay_ms:120000,muzzy_decay_ms:120000,narenas:2"
STEPS, WARM = 6, 2


def child(root: Path) -> None:
    """Trains, and prints one JSON row."""
    import jax
    from etils import epath

    from opd_jax.config_files import parse_config
    from opd_jax.data.tasks import write_task_tokenizer
    from opd_jax.models.decoder import DecoderConfig, init_params
    from opd_jax.models.hf import save_model
    from opd_jax.tracking.run_dir import read_rows
    from opd_jax.training.loop import train

    network = DecoderConfig(
        "llama", write_task_tokenizer(root / "tokenizer", "products-13x4"), width=576, hidden=1536, layers=30, heads=9,
        kv_heads=3, head_dim=64, norm_eps=1e-5, rope_theta=1e4, max_positions=256, tie_embeddings=True,
    )  # fmt: skip
    save_model(root / "model", init_params(network, jax.random.key(0)), network, tokenizer_from=root / "tokenizer")
    config = {
        "kind": "sft",
        "steps": STEPS,
        "run_dir": str(root / "run"),
        "student": {"path": str(root / "model")},
        "data": {"source": "task:products-13x4", "chat": False, "max_prompt": 10, "response": "response"},
        "rollout": {"prompts": 32, "samples": 1, "max_response": 22},
        "checkpoint": {"every": 1000},
        "dtype": "float32",
        "remat": "none",
        "pack": False,
    }
    train(parse_config(config), report=False)
    seconds = [row["time/update"] for row in read_rows(epath.Path(root / "run" / "metrics.jsonl"))][WARM:]
    used = resource.getrusage(resource.RUSAGE_SELF)
    row = {"seconds": statistics.median(seconds), "user": used.ru_utime, "kernel": used.ru_stime}
    print(json.dumps(row | {"peak GiB": used.ru_maxrss / 2**20}))


def measure(environment: dict[str, str]) -> Row:
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, __file__, "--child", root]
        done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jemalloc", type=Path, default=Path(JEMALLOC))
    parser.add_argument("--runs", type=int, default=3, help="of each")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.child)
    if not options.jemalloc.exists():
        parser.error(f"--jemalloc {options.jemalloc}: no such file; apt install libjemalloc2, or say where it lies")
    allocators = {"glibc": {}, "jemalloc": {"LD_PRELOAD": str(options.jemalloc), "MALLOC_CONF": KEEP}}
    found: dict[str, list[Row]] = {name: [] for name in allocators}
    for _ in range(options.runs):
        for name, environment in allocators.items():
            found[name].append(measure(environment))
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    ratio = {key: medians["glibc"][key] / medians["jemalloc"][key] for key in medians["glibc"]}
    rows = [[name, *row.values()] for name, row in (*medians.items(), ("ratio", ratio))]
    console.table("SFT step of a 106 M-weight model", ["allocator", *ratio], rows)
    RESULT.write_text(json.dumps({"runs": found, "medians": medians, "ratio": ratio}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
