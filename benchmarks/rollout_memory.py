"""What a segment of decoding takes on a TPU v5e, from its compiler. No TPU is needed.

    uv pip install -e ".[aot]"
    python benchmarks/rollout_memory.py --json benchmarks/results/rollout_memory.json

Qwen3-1.7B shapes in bfloat16 on v5e:2x2, tensor = 4, 48 slots × 8,192 cache columns. The cache is donated: what it
takes is counted under arguments, its output aliases it (aliased), and temp would show a second copy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from opd_jax.mesh import ROLLOUT, Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, init_params, layer_specs, parameter_specs
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.tracking.console import Console

QWEN3 = DecoderConfig(
    "qwen3", 151_936, width=2048, hidden=6144, layers=28, heads=16, kv_heads=8, head_dim=128, norm_eps=1e-6,
    rope_theta=1e6, max_positions=40_960, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
SLOTS, COLUMNS, MIB = 48, 8192, 2**20
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "reduce-scatter", "collective-permute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console, libtpu = Console(), importlib.metadata.version("libtpu")
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    layout = Layout(make_mesh(1, 1, 4, devices=topology.devices), ROLLOUT)
    start = time.perf_counter()
    memory: Any = compiled(layout).memory_analysis()
    cache = 2 * SLOTS * COLUMNS * QWEN3.layers * QWEN3.kv_heads * QWEN3.head_dim * 2 // 4
    row = {
        "arguments MiB": memory.argument_size_in_bytes / MIB,
        "of them cache MiB": cache / MIB,
        "aliased MiB": memory.alias_size_in_bytes / MIB,
        "temp MiB": memory.temp_size_in_bytes / MIB,
        "compile s": time.perf_counter() - start,
    }
    console.table(f"per chip, jax {jax.__version__}, libtpu {libtpu}", list(row), [list(row.values())])
    donated = row["aliased MiB"] >= row["of them cache MiB"] and row["temp MiB"] < row["of them cache MiB"] / 2
    console.print("the cache is updated in place" if donated else "MISSED: a second copy of the cache")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"jax": jax.__version__, "libtpu": libtpu} | row, indent=2) + "\n")


def compiled(layout: Layout) -> Any:
    engine = make_engine(QWEN3, stop_ids=(151_645,), vocab_size=151_669, support=16, dtype=jnp.bfloat16, layout=layout)

    def shaped(x: Any, axes: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout.sharding(axes))

    weights = jax.eval_shape(engine.cast, jax.eval_shape(lambda: init_params(QWEN3, jax.random.key(0))))
    specs, layer = parameter_specs(QWEN3), layer_specs(QWEN3)
    weights = {
        name: [{k: shaped(x, layer[k].axes) for k, x in part.items()} for part in value]
        if name == "layers"
        else shaped(value, specs[name].axes)
        for name, value in weights.items()
    }
    slots = jax.eval_shape(lambda: engine.empty(SLOTS, COLUMNS))
    axes = {0: (), 4: ("batch", "kv_heads", None, None)}
    slots = jax.tree.map(lambda x: shaped(x, axes.get(x.ndim, ("batch",))), slots)
    return engine.segment.lower(weights, slots, Law(), 7168, 32, 49).compile()


if __name__ == "__main__":
    main()
