"""Padding with one sequence a row and with packed rows, and what it saves in a training step on a CPU.

    python benchmarks/packing.py --json benchmarks/results/packing.json

Tokens: the paper's batch, 64 prompts × 4 responses, rows of 1,024 + 7,168 tokens; response lengths log-normal, cut at
7,168 (R1-Distill and its kin: σ ≈ 1), prompts of 60 to 400 tokens; means of 20 batches. ``padded`` are the tokens that
are computed and are none of a sequence; packed rows run in passes of an eighth of the batch, as by default.
Time: scoring and update of a small Llama by a teacher of the same size, float32, top-16 objective, all lengths divided
by 16; passes of as many rows on both sides; medians after a first call, which compiles.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from opd_jax.config import Objective, Optimizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.objectives.opd import opd_loss
from opd_jax.sampling.packing import pack, place
from opd_jax.teacher import make_score
from opd_jax.tracking.console import Console
from opd_jax.tracking.run_dir import describe_environment
from opd_jax.training.optimizer import make_optimizer
from opd_jax.training.state import create_state
from opd_jax.training.step import make_update
from opd_jax.types import Prompts, Rollouts, Scores

PROMPT, RESPONSE, SEQUENCES, BATCHES = 1024, 7168, 256, 20
MEDIANS, SHARDS = (600, 1500, 4000), (1, 16)
NETWORK = DecoderConfig(
    "llama", 4096, width=128, hidden=384, layers=4, heads=4, kv_heads=4, head_dim=32, norm_eps=1e-6, rope_theta=1e4,
    max_positions=2048, tie_embeddings=True,
)  # fmt: skip
ROUNDS, ROWS, SMALLER = 3, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    console = Console()
    tokens = [padding(median, shards) for median in MEDIANS for shards in SHARDS]
    for name, table in {"tokens": tokens, "time": (times := [step_times(median) for median in MEDIANS[:1]])}.items():
        console.table(name, list(table[0]), [list(row.values()) for row in table])
    wanted = all(row["fewer padded tokens"] >= 3 for row in tokens if row["median response"] == MEDIANS[0])
    console.print("at least 3 times fewer padded tokens" if wanted else "MISSED: 3 times fewer padded tokens")
    if options.json:
        environment = describe_environment()
        result = {"tokens": tokens, "time": times} | {n: environment[n] for n in ("python", "packages", "cpu")}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n")


def lengths(rng: np.random.Generator, sequences: int, median: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and of responses; a prompt's four samples stand side by side."""
    prompts = np.repeat(rng.integers(60, 400, sequences // 4), 4)
    return prompts, np.clip(rng.lognormal(np.log(median), 1.0, sequences), 1, RESPONSE).astype(int)


def padding(median: int, shards: int) -> dict[str, Any]:
    """Padded tokens of a batch, in rows of one sequence and packed, on that many batch shards of one process."""
    rng, width, rows = np.random.default_rng(0), PROMPT + RESPONSE, []
    per_pass = SEQUENCES // 8 // shards  # of one shard
    for _ in range(BATCHES):
        prompts, responses = lengths(rng, SEQUENCES, median)
        used = prompts + responses - 1
        start = time.perf_counter()
        row, _ = place(used, width, SEQUENCES, [0] * shards)
        seconds = time.perf_counter() - start
        most = np.max(row % (SEQUENCES // shards)) + 1
        computed = -(-most // per_pass) * per_pass * shards
        rows.append(
            (responses.mean(), SEQUENCES * width - used.sum(), computed * width - used.sum(), computed, seconds)
        )
    mean, before, after, computed, seconds = np.mean(rows, axis=0)
    return {
        "median response": median,
        "mean response": float(mean),
        "batch shards": shards,
        "rows": SEQUENCES,
        "rows packed": float(computed),
        "padded tokens": int(before),
        "padded tokens, packed": int(after),
        "fewer padded tokens": float(before / after),
        "padding share": float(before / (SEQUENCES * width)),
        "padding share, packed": float(after / (computed * width)),
        "packing s": float(seconds),
    }


def step_times(median: int) -> dict[str, Any]:
    """Seconds of scoring and update, in rows of one sequence and packed."""
    rollouts = make_rollouts(median)
    micro_batch = ROWS // 8
    params = init_params(NETWORK, jax.random.key(0))
    teacher = init_params(NETWORK, jax.random.key(1))
    optimizer, _ = make_optimizer(Optimizer(lr=1e-5), 100)
    score = make_score(NETWORK, micro_batch=micro_batch)
    loss = functools.partial(_loss, config=NETWORK, objective=Objective(name="topk"), metrics=False)
    update = make_update(loss, optimizer, micro_batch=micro_batch)
    state, seconds, losses = create_state(params, optimizer), {}, {}
    for name, separate in {"separate": True, "packed": False}.items():
        rows, taken = pack(rollouts, separate=separate), []
        state = create_state(params, optimizer)
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            scores = score(teacher, rows)
            state, metrics = update(state, rows, scores.hidden, frozen=scores.head)
            losses.setdefault(name, float(metrics["loss"][0]))
            taken.append(time.perf_counter() - start)
        seconds[name] = statistics.median(taken[1:])
    return {
        "median response": median // SMALLER,
        "sequences": ROWS,
        "tokens a row": (PROMPT + RESPONSE) // SMALLER,
        "s a step, one a row": seconds["separate"],
        "s a step, packed": seconds["packed"],
        "times faster": seconds["separate"] / seconds["packed"],
        "relative difference of the losses": abs(losses["packed"] / losses["separate"] - 1),
    }


def _loss(params: Any, rows: Any, hidden: Any, head: Any, **settings: Any) -> Any:
    return opd_loss(params, rows, Scores(hidden, head), **settings)


def make_rollouts(median: int) -> Rollouts:
    """Random tokens with lengths as above, all divided by 16."""
    rng = np.random.default_rng(1)
    prompt_lengths, response_lengths = (np.maximum(n // SMALLER, 1) for n in lengths(rng, ROWS, median))
    P, R = PROMPT // SMALLER, RESPONSE // SMALLER
    texts: Any = [rng.integers(0, NETWORK.vocab_size, (ROWS, n), np.int32) for n in (P, R)]
    top: Any = np.argsort(rng.random((ROWS, R, 64)), axis=-1)[..., :16].astype(np.int32)
    nothing, no_top = np.zeros((ROWS, R), np.float32), np.zeros(top.shape, np.float32)
    ids: Any = (prompt_lengths, *np.zeros((2, ROWS), np.uint32))
    behaviour: Any = (response_lengths, response_lengths < R, nothing, nothing, top, no_top)
    return Rollouts(Prompts(texts[0], *ids), texts[1], *behaviour)


if __name__ == "__main__":
    main()
