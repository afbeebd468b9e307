"""What value and gradient of each loss take on a TPU v5e, from its compiler. No TPU is needed.

    uv pip install -e ".[aot]"
    python benchmarks/loss_memory.py --json benchmarks/results/loss_memory.json

One device, 8,192 tokens, |V| = 151,936, widths 2,048 (student) and 4,096 (teacher), bfloat16 hidden states and heads.
Columns: HBM that the program takes for itself (temp), the outputs (the float32 head gradient alone is 1,187 MiB; naive,
autodiff of dense ``jax.numpy``, returns a bfloat16 one), the arguments, and the products at 2 FLOP a multiply-add,
counted in the traced program with the trips of its loops.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params

from opd_jax.losses import Objective, distillation_gradient, reference_loss
from opd_jax.mesh import Layout, make_mesh
from opd_jax.tracking.console import Console

BATCH, STEPS, VOCAB, WIDTH, TEACHER_WIDTH, K = 4, 2048, 151_936, 2048, 4096, 16
MIB = 2**20
OBJECTIVES = {
    "full": Objective(),
    "top-16": Objective(name="topk", k=K),
    "top-16, given ids": Objective(name="topk", k=K),
    "sampled": Objective(name="sampled"),
}
# Largest temp MiB and TFLOP that the losses are designed for.
TARGETS = {"full": (700, 26), "top-16": (600, 26), "top-16, given ids": (100, 0.1)}
COLUMNS = ("loss", "temp MiB", "outputs MiB", "arguments MiB", "TFLOP")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    rows = measure(console)
    libtpu = importlib.metadata.version("libtpu")
    title = f"value and gradient, {BATCH * STEPS:,} tokens, |V| {VOCAB:,}, jax {jax.__version__}, libtpu {libtpu}"
    console.table(title, COLUMNS, [[row[c] for c in COLUMNS] for row in rows])
    for name, (temp, tflop) in TARGETS.items():
        row = next(row for row in rows if row["loss"] == name)
        met = row["temp MiB"] <= temp and row["TFLOP"] <= tflop
        console.print(f"{'met' if met else 'MISSED'}: {name}, ≤ {temp} MiB of temp and ≤ {tflop} TFLOP")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        record = {"jax": jax.__version__, "libtpu": libtpu, "rows": rows}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def measure(console: Console) -> list[dict[str, Any]]:
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    v5e = Layout(make_mesh(devices=[topology.devices[0]]))
    rows = [measured("naive full", naive, arguments(v5e))]
    with console.progress(total=2 * len(OBJECTIVES) + 3, title="compiling", unit="program") as progress:

        def add(name: str, objective: Objective, *, metrics: bool = False, head: Any = jnp.bfloat16, **sizes: int):
            given_ids = "given ids" in name
            f = fused(objective, v5e, metrics)
            rows.append(measured(name, f, arguments(v5e, head, given_ids, **sizes)))
            progress.update(len(rows), {})

        for name, objective in OBJECTIVES.items():
            add(name, objective)
        for name, objective in OBJECTIVES.items():
            add(f"{name}, with metrics", objective, metrics=True)
        add("full, float32 student head", OBJECTIVES["full"], head=jnp.float32)
        add("full, teacher head of 152,064 rows", OBJECTIVES["full"], teacher_rows=152_064)
    return rows


def arguments(
    layout: Layout, head: Any = jnp.bfloat16, given_ids: bool = False, teacher_rows: int = VOCAB
) -> list[jax.ShapeDtypeStruct]:
    tokens = BATCH, STEPS
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((*tokens, WIDTH), jnp.bfloat16),
        ((VOCAB, WIDTH), head),
        ((*tokens, TEACHER_WIDTH), jnp.bfloat16),
        ((teacher_rows, TEACHER_WIDTH), jnp.bfloat16),
        (tokens, jnp.int32),
        (tokens, jnp.bool_),
    ]
    if given_ids:
        shapes.append(((*tokens, K), jnp.int32))
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding()) for shape, dtype in shapes]


def fused(objective: Objective, layout: Layout, metrics: bool) -> Callable[..., Any]:
    def f(h: Any, w: Any, g: Any, u: Any, tokens: Any, mask: Any, topk_ids: Any = None) -> Any:
        optional = {"layout": layout, "topk_ids": topk_ids, "metrics": metrics}
        return distillation_gradient(h, w, g, u, tokens, mask, objective, **optional)

    return f


def naive(h: Any, w: Any, *fixed: Any) -> Any:
    return jax.value_and_grad(lambda h, w: reference_loss(h, w, *fixed, objective=Objective())[0], (0, 1))(h, w)


def measured(name: str, f: Callable[..., Any], args: list[jax.ShapeDtypeStruct]) -> dict[str, Any]:
    traced = jax.jit(f).trace(*args)
    memory: Any = traced.lower().compile().memory_analysis()
    return {
        "loss": name,
        "temp MiB": round(memory.temp_size_in_bytes / MIB, 1),
        "outputs MiB": round(memory.output_size_in_bytes / MIB, 1),
        "arguments MiB": round(memory.argument_size_in_bytes / MIB, 1),
        "TFLOP": round(product_flop(traced.jaxpr.jaxpr) / 1e12, 4),
    }


def product_flop(jaxpr: Any) -> float:
    """FLOP of the matrix products; ``cost_analysis`` would count the body of a loop once."""
    total = 0.0
    for eqn in jaxpr.eqns:
        inner = [product_flop(j) for j in jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            total += (
                2.0
                * math.prod(eqn.outvars[0].aval.shape)
                * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            )
        elif inner:
            total += trips(eqn) * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


def trips(eqn: Any) -> float:
    """How often the body runs; of the loop over chunks, whose bound is traced, when no token is masked."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name != "while":
        return 1
    body = eqn.params["body_jaxpr"].jaxpr.eqns
    [taken] = [e.params["slice_sizes"] for e in body if e.primitive.name == "dynamic_slice"]
    return BATCH * STEPS / taken[0]


if __name__ == "__main__":
    main()
