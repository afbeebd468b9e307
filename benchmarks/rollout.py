"""What the sampling engine makes of a machine: against transformers, against a static batch, against its memory.

    python benchmarks/rollout.py [--json benchmarks/results/rollout.json] [--only generate static context]
    python benchmarks/rollout.py --device gpu

Random weights in the shapes named; all ratios come from one run, sides alternating, medians of ``--repeat``; compile
times apart. ``generate`` needs torch and transformers: 1 and 2 torch threads are tried once, the better one is timed.
The static batch keeps its rows until the last has ended.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.sampling import scheduler
from opd_jax.sampling.decode import SEGMENT, Engine, bucket, make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Occupancy, Request, generate
from opd_jax.tracking.run_dir import cpu_model
from opd_jax.types import Params

LLAMA = DecoderConfig(
    "llama", 32_000, width=256, hidden=688, layers=4, heads=4, kv_heads=4, head_dim=64, norm_eps=1e-6, rope_theta=1e4,
    max_positions=4096,
)  # fmt: skip
SMOLLM2 = DecoderConfig(
    "llama", 49_152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, head_dim=64, norm_eps=1e-5,
    rope_theta=1e5, max_positions=8192, tie_embeddings=True,
)  # fmt: skip
QWEN3 = DecoderConfig(
    "qwen3", 151_936, width=2048, hidden=6144, layers=28, heads=16, kv_heads=8, head_dim=128, norm_eps=1e-6,
    rope_theta=1e6, max_positions=40_960, qk_norm=True, tie_embeddings=True,
)  # fmt: skip
Row = dict[str, Any]
console = Console(width=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"generate": against_transformers, "static": against_static_batch, "context": by_context}
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: Row = {"hardware": hardware(), "jax": jax.__version__, "copy GB/s": bandwidth()}
    console.print(f"{result['hardware']}; jax {jax.__version__}; copies {result['copy GB/s']:.1f} GB/s")
    if options.device == "gpu":
        result["gpu"] = on_gpu(options.repeat, result["copy GB/s"])
    else:
        for name in options.only:
            result[name] = sections[name](options.repeat, result["copy GB/s"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def against_transformers(repeat: int, copy: float) -> list[Row]:
    """The same fp32 weights, prompts of 32 tokens, exactly ``length`` new ones, plain sampling."""
    rows = []
    for name, config, batch, length in (("Llama 19.5 M", LLAMA, 8, 64), ("SmolLM2-135M", SMOLLM2, 16, 128)):
        params = init_params(config, jax.random.key(0))
        ours, first = sampler(config, params, prompts(config, batch, 32), length, jnp.float32)
        theirs = opponent(config, params, batch, length)
        tried = {n: alternate({"": functools.partial(theirs, n)}, 1)[""] for n in (1, 2)}
        threads = min(tried, key=tried.__getitem__)
        seconds = alternate({"ours": ours, "theirs": functools.partial(theirs, threads)}, repeat)
        best = seconds["theirs"]
        tokens, step = batch * length, seconds["ours"] / length
        bound = step_bytes(config, params, batch, 32 + length / 2, 4) / copy / 1e9
        rows.append(
            {"model": name, "batch": batch, "new tokens": length, "ratio": best / seconds["ours"]}
            | {"torch threads": threads, "ours tok/s": tokens / seconds["ours"], "transformers tok/s": tokens / best}
            | {"share of bandwidth bound": bound / step, "compile s": first - seconds["ours"]}
        )
        show("against transformers.generate, fp32", rows[-1:])
    return rows


def against_static_batch(repeat: int, copy: float) -> list[Row]:
    """Heavy-tailed lengths: end-of-sequence ids with 1.1 % of the mass give a median of 64 and a cut at 512."""
    config, slots, limit = LLAMA, 16, 512
    params = init_params(config, jax.random.key(0))
    # random weights are nearly uniform over the vocabulary, so a share of its ids is a share of the mass
    stops = tuple(range(round(config.vocab_size * (1 - 0.5 ** (1 / 64)))))
    engine, asked = engine_of(config, jnp.float32, stops), prompts(config, 10 * slots, 32)
    weights, occupancy, lengths = engine.cast(params), Occupancy(), []

    def continuous() -> None:
        nonlocal occupancy
        occupancy = Occupancy()
        made = generate(engine, weights, asked, Law(), 0, 0, slots=slots, max_response=limit, occupancy=occupancy)
        lengths[:] = [len(r.tokens) for _, r in made]

    def static() -> None:
        with unittest.mock.patch.object(scheduler._Host, "_rows", return_value=None):  # no slot is given up
            for i in range(0, len(asked), slots):
                run(engine, weights, asked[i : i + slots], slots, limit)

    continuous()
    static()
    seconds = alternate({"continuous": continuous, "static": static}, min(repeat, 3))
    row = {
        "prompts": len(asked),
        "slots": slots,
        "median length": float(np.median(lengths)),
        "longest": max(lengths),
        "ratio": seconds["static"] / seconds["continuous"],
        "tok/s": sum(lengths) / seconds["continuous"],
        "occupancy while waiting": occupancy.busy_waiting / occupancy.all_waiting,
        "occupancy in all": occupancy.busy / occupancy.all,
    }
    show("continuous batching against static batches", [row])
    return [row]


def by_context(repeat: int, copy: float) -> list[Row]:
    """Time of a step by context length, beside the bytes of bf16 weights and filled cache (the CPU's cache is fp32)."""
    config, batch, rows = LLAMA, 8, []
    params, engine = init_params(config, jax.random.key(0)), engine_of(config, jnp.bfloat16)
    weights = engine.cast(params)
    for context in (64, 512, 2048):

        def segment(context: int = context) -> float:
            state: Any = engine.empty(batch, bucket(context + SEGMENT))
            state = state.replace(column=jnp.int32(context), live=jnp.ones(batch, bool))
            jax.block_until_ready(state)
            start = time.perf_counter()
            jax.block_until_ready(engine.segment(weights, state, Law(), 10**6, SEGMENT, batch + 1))
            return (time.perf_counter() - start) / SEGMENT

        segment()
        step = float(np.median([segment() for _ in range(3 * repeat)]))
        read = step_bytes(config, params, batch, context + SEGMENT / 2, 2)
        bound = read / copy / 1e9
        row = {"context": context, "ms a step": 1e3 * step, "MB read": read / 1e6, "share of bound": bound / step}
        rows.append(row)
    for row in rows:
        row["time growth"] = row["ms a step"] / rows[0]["ms a step"]
        row["bytes growth"] = row["MB read"] / rows[0]["MB read"]
    show("Llama 19.5 M, batch 8, bf16: cost of a token by context", rows)
    return rows


def on_gpu(repeat: int, copy: float) -> list[Row]:
    """Qwen3-1.7B shapes, bf16, batch 64, 1,024 new tokens."""
    config, batch, length = QWEN3, 64, 1024
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), init_params(config, jax.random.key(0)))
    ours, first = sampler(config, params, prompts(config, batch, 32), length, jnp.bfloat16)
    seconds = alternate({"ours": ours}, repeat)["ours"]
    bound = length * step_bytes(config, params, batch, 32 + length / 2, 2) / copy / 1e9
    row = {"tok/s": batch * length / seconds, "share of bandwidth bound": bound / seconds, "compile s": first - seconds}
    show("Qwen3-1.7B shapes, bf16, batch 64", [row])
    return [row]


def prompts(config: DecoderConfig, n: int, length: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [Request(rng.integers(0, config.vocab_size, length).tolist(), i, 0) for i in range(n)]


def engine_of(config: DecoderConfig, dtype: Any, stops: tuple[int, ...] = ()) -> Engine:
    return make_engine(config, stop_ids=stops, vocab_size=config.vocab_size, support=0, dtype=dtype, layout=None)


def sampler(
    config: DecoderConfig, params: Params, asked: list[Request], length: int, dtype: Any
) -> tuple[Callable[[], None], float]:
    """A function that samples, and the seconds of its first call."""
    engine = engine_of(config, dtype)
    weights = engine.cast(params)
    start = time.perf_counter()
    run(engine, weights, asked, len(asked), length)
    return lambda: run(engine, weights, asked, len(asked), length), time.perf_counter() - start


def run(engine: Engine, weights: Params, asked: list[Request], slots: int, limit: int) -> None:
    for _ in generate(engine, weights, asked, Law(), 0, 0, slots=slots, max_response=limit):
        pass


def opponent(config: DecoderConfig, params: Params, batch: int, length: int) -> Callable[[int], None]:
    import torch
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as path:
        save_model(Path(path) / "model", params, config)
        model: Any = AutoModelForCausalLM.from_pretrained(Path(path) / "model", dtype=torch.float32)
    ids = torch.tensor([r.tokens for r in prompts(config, batch, 32)])

    def sample(threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
                min_new_tokens=length, max_new_tokens=length,
            )  # fmt: skip
        assert out.shape == (batch, 32 + length)

    sample(1)
    return sample


def alternate(sides: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeat):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def step_bytes(config: DecoderConfig, params: Params, batch: int, context: float, size: int) -> float:
    """What a decoding step must read: every weight but the embedding rows not looked up, and the filled cache."""
    weights = sum(x.size for x in jax.tree.leaves(params))
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.width
    return size * (weights + 2 * batch * context * config.layers * config.kv_heads * config.head_dim)


def bandwidth() -> float:
    """GB/s of a large array read and written in place on the default device."""
    x = jnp.ones(64 << 20 if jax.default_backend() == "cpu" else 1 << 30, jnp.float32)
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        x = step(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * x.nbytes / float(np.median(seconds[1:])) / 1e9


def hardware() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} cores, {cpu_model()}" if device.platform == "cpu" else device.device_kind


def show(title: str, rows: list[Row]) -> None:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = (v if isinstance(v, str) else f"{v:,}" if isinstance(v, int) else f"{v:,.2f}" for v in row.values())
        table.add_row(*cells)
    console.print(table)


if __name__ == "__main__":
    main()
