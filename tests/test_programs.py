"""What the compiled programs of a run hold and move: read from their HLO on eight devices."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_runs

from opd_jax.mesh import make_mesh
from opd_jax.models.decoder import DecoderConfig, abstract_params, parameter_shardings
from opd_jax.sampling.packing import sequence_shapes
from opd_jax.training.graphs import Graphs, make_graphs
from opd_jax.training.state import TrainState

VOCAB = 1208  # no other dimension of any array is this, or half of it
LAYERS = 3
ROWS, PROMPT, RESPONSE, K = 16, 8, 24, 4
STUDENT = DecoderConfig(
    "qwen3", VOCAB, width=64, hidden=96, layers=LAYERS, heads=8, kv_heads=8, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, qk_norm=True,
)  # fmt: skip


@functools.cache
def graphs_on(sizes: tuple[int, int, int], objective: str) -> Graphs:
    config = tiny_runs.run_config(
        Path("unused"),
        Path("unused"),
        objective={"name": objective, "k": K},
        rollout={"prompts": ROWS, "samples": 1, "max_response": RESPONSE},
        micro_batch=8,
        remat="full",
    )
    return make_graphs(config, make_mesh(*sizes), STUDENT, STUDENT, stops=(1,), vocab_size=VOCAB - 3)


def update_program(sizes: tuple[int, int, int], objective: str) -> str:
    graphs = graphs_on(sizes, objective)
    layout = graphs.layout

    def placed(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = jax.tree.map(placed, abstract_params(STUDENT), parameter_shardings(STUDENT, layout))
    state = jax.eval_shape(lambda p: TrainState(jnp.int32(0), jnp.int32(0), p, graphs.optimizer.init(p)), params)
    state = jax.tree.map(placed, state, graphs.shardings)
    rows = layout.sharding(("batch",))
    sequences = jax.tree.map(lambda x: placed(x, rows), sequence_shapes(ROWS, PROMPT, RESPONSE, K))
    hidden = jax.ShapeDtypeStruct((ROWS, PROMPT + RESPONSE, STUDENT.width), jnp.float32, sharding=rows)
    return graphs.update.lower(state, sequences, hidden, frozen=params["head"]).compile().as_text()


def shapes(text: str) -> set[tuple[int, ...]]:
    return {tuple(map(int, found.split(","))) for found in re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)}


def gathered(program: str) -> set[tuple[int, ...]]:
    """Shapes of the results of all-gathers."""
    return set().union(
        *(shapes(line.split(" all-gather")[0]) for line in program.splitlines() if " all-gather" in line)
    )


@pytest.mark.parametrize(
    "objective", ["full", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("topk", "sampled"))]
)
def test_no_logits_of_all_tokens_over_the_whole_vocabulary(objective: str) -> None:
    """With the head sharded over its vocabulary, nothing but weights (and what updates them) is as wide as that."""
    program = update_program((2, 2, 2), objective)
    wide = {s for s in shapes(program) if VOCAB in s}
    assert all(set(s) - {1} <= {VOCAB, STUDENT.width, STUDENT.width // 2} for s in wide), wide
    tokens = 8 // 4 * (PROMPT + RESPONSE)  # of one pass on one device
    logits = {s for s in shapes(program) if VOCAB // 2 in s and STUDENT.width not in s and STUDENT.width // 2 not in s}
    assert max(map(math.prod, logits), default=0) <= tokens * VOCAB // 2


def test_parameters_are_gathered_layer_by_layer() -> None:
    program = update_program((1, 8, 1), "full")
    whole = gathered(program)
    assert (STUDENT.hidden, STUDENT.width) in whole  # one layer's MLP
    stacked = {s for s in whole if s[0] == LAYERS and math.prod(s) > STUDENT.hidden * STUDENT.width}
    assert not stacked
