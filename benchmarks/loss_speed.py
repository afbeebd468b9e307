"""Wall time of value and gradient of each loss: against dense ``jax.numpy`` and against TRL's chunked divergence.

    pip install "trl==1.16.*" torch      # in another environment than the project's; without it TRL's row is left out
    python benchmarks/loss_speed.py --json benchmarks/results/loss_speed.json
    python benchmarks/loss_speed.py --device gpu

Reverse KL, 2,048 tokens, student and teacher of width 256, float32 unless a row says otherwise; seconds are medians of
rounds in which every loss runs once, after a first call, which compiles. TRL's is what ``DistillationTrainer`` calls at
``beta=1``; its fastest setting at the smaller vocabulary is the one that is timed at the larger.
On a GPU: 8,192 tokens, |V| = 128,256, width 4,096, bfloat16, without TRL.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from opd_jax.losses import Objective, distillation_gradient, reference_loss
from opd_jax.tracking.console import Console

K = 16
FULL, TOP, SAMPLED = Objective(), Objective(name="topk", k=K), Objective(name="sampled")


@dataclasses.dataclass(frozen=True)
class Size:
    tokens: int
    vocab: int
    width: int
    dtype: Any
    rounds: int


SIZES = {
    "cpu": (Size(2048, 32_000, 256, np.float32, 3), Size(2048, 151_936, 256, np.float32, 3)),
    "gpu": (Size(8192, 128_256, 4096, ml_dtypes.bfloat16, 10),),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cuda" if options.device == "gpu" else "cpu")
    console = Console()
    peers = trl_losses(console) if options.device == "cpu" else {}
    record: dict[str, Any] = {"device": str(jax.devices()[0].device_kind), "cores": os.cpu_count(), "tables": []}
    for size in SIZES[options.device]:
        rows = measure(size, peers, console)
        peers = {row["loss"]: peers[row["loss"]] for row in rows if row.get("TRL / this") == 1}
        title = f"value and gradient, {size.tokens:,} tokens, |V| {size.vocab:,}, width {size.width:,}"
        columns = list(rows[0])
        console.table(title, columns, [list(row.values()) for row in rows])
        record["tables"].append({"tokens": size.tokens, "vocab": size.vocab, "width": size.width, "rows": rows})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def measure(size: Size, peers: dict[str, Any], console: Console) -> list[dict[str, Any]]:
    arrays, ids = inputs(size)
    calls: dict[str, Callable[[], Any]] = {
        "naive full": program(jax.value_and_grad(naive, (0, 1)), arrays),
        "full": program(fused(FULL), arrays),
        "full, with metrics": program(fused(FULL, metrics=True), arrays),
        "top-16": program(fused(TOP), arrays),
        "top-16, given ids": program(fused(TOP), [*arrays, ids]),
        "sampled": program(fused(SAMPLED), arrays),
    }
    if size.dtype == np.float32:
        calls["full, bfloat16"] = program(fused(FULL), [*(x.astype(jnp.bfloat16) for x in arrays[:4]), *arrays[4:]])
    calls |= {name: prepare(arrays) for name, prepare in peers.items()}
    first = {name: timed(call) for name, call in calls.items()}
    losses = [loss for name, (_, loss) in first.items() if name in ("naive full", "full", *peers)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-2 if size.dtype != np.float32 or len(peers) > 1 else 1e-4)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with console.progress(total=size.rounds, title=f"|V| {size.vocab:,}", unit="round") as progress:
        for i in range(size.rounds):
            for name, call in calls.items():
                times[name].append(timed(call)[0])
            progress.update(i + 1, {})
    median = {name: statistics.median(t) for name, t in times.items()}
    peer = min((median[name] for name in peers), default=None)
    return [
        {
            "loss": name,
            "seconds": t,
            "least": min(times[name]),
            "naive / this": median["naive full"] / t,
            "TRL / this": peer / t if peer else None,
            "first call": first[name][0],
        }
        for name, t in median.items()
    ]


def inputs(size: Size) -> tuple[list[jax.Array], jax.Array]:
    """Hidden states and heads whose logits have a spread of about 2, and the student's most probable ids."""
    r = np.random.default_rng(0)
    shape = 8, size.tokens // 8
    hidden, teacher = (r.normal(size=(*shape, size.width)).astype(size.dtype) for _ in range(2))
    scale = 2 / size.width**0.5
    heads = [(scale * r.standard_normal((size.vocab, size.width), np.float32)).astype(size.dtype) for _ in range(2)]
    tokens = r.integers(0, size.vocab, shape).astype(np.int32)
    arrays = [jnp.asarray(x) for x in (hidden, heads[0], teacher, heads[1], tokens, np.ones(shape, bool))]
    top = jax.jit(lambda h, w: jax.lax.map(lambda row: jax.lax.top_k(row @ w.T, K)[1], h))
    return arrays, jax.block_until_ready(top(arrays[0], arrays[1]))


def naive(h: Any, w: Any, *fixed: Any) -> jax.Array:
    return reference_loss(h, w, *fixed, objective=FULL)[0]


def fused(objective: Objective, metrics: bool = False) -> Callable[..., Any]:
    def f(h: Any, w: Any, g: Any, u: Any, tokens: Any, mask: Any, topk_ids: Any = None) -> Any:
        result = distillation_gradient(h, w, g, u, tokens, mask, objective, metrics=metrics, topk_ids=topk_ids)
        return result[0][0], result[1:]

    return f


def program(f: Callable[..., Any], arrays: list[jax.Array]) -> Callable[[], Any]:
    jitted = jax.jit(f)
    return lambda: jax.block_until_ready(jitted(*arrays))


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and the loss sum that it returns."""
    gc.collect()
    start = time.perf_counter()
    loss = call()[0]
    return time.perf_counter() - start, float(loss)


def trl_losses(console: Console) -> dict[str, Any]:
    """TRL's loss and gradient as functions of the arrays, by setting; empty where TRL is not installed."""
    try:
        import torch
        from trl.trainer.distillation_trainer import _chunked_divergence_loss
    except ImportError as error:
        console.print(f'TRL is left out ({error}). To compare: pip install "trl==1.16.*" torch')
        return {}

    def prepare(arrays: list[jax.Array], threads: int, dtype: str) -> Callable[[], Any]:
        h, w, g, u = (torch.from_numpy(np.array(x)).to(getattr(torch, dtype)) for x in arrays[:4])
        mask = torch.ones(arrays[5].shape)

        def call() -> Any:
            torch.set_num_threads(threads)
            for x in (h, w):
                x.requires_grad_()
                x.grad = None
            loss = _chunked_divergence_loss(h, g, w, u, mask, beta=1.0, num_items_in_batch=1)[0]
            loss.backward()
            return loss.detach(), h.grad, w.grad

        return call

    return {
        f"TRL {dtype}, {threads} threads": functools.partial(prepare, threads=threads, dtype=dtype)
        for threads, dtype in ((1, "float32"), (2, "float32"), (2, "bfloat16"))
    }


if __name__ == "__main__":
    main()
