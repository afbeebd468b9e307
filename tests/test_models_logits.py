"""The decoder against transformers: golden values first (no torch), then the live oracle."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.cache import Cache
from opd_jax.models.decoder import (
    DecoderConfig,
    decode_ends,
    decode_layer,
    decode_step,
    forward,
    head,
    prefill,
    unembed,
)
from opd_jax.models.hf import load_model, save_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Request, generate
from opd_jax.types import Params

NAMES = list(small_models.CONFIGS)
TOLERANCE = 1e-4


@functools.partial(jax.jit, static_argnums=(1, 5))
def logits_of(params: Params, c: DecoderConfig, tokens: Any, positions: Any, segments: Any, layout: Any = None) -> Any:
    return unembed(forward(params, c, tokens, positions, segments, layout=layout), head(params))


@functools.partial(jax.jit, static_argnums=(1, 5))
def greedy(params: Params, c: DecoderConfig, tokens: Any, positions: Any, segments: Any, n: int) -> Any:
    """``n`` greedy tokens a row and the logits they were chosen from, through the cache."""
    layers = [decode_layer(params["layers"], i, c, jnp.float32) for i in range(c.layers)]
    weights = decode_ends(params, c, jnp.float32) | {"layers": layers}
    rows, width = tokens.shape
    cache = Cache.empty(c.layers, rows, width + n, c.kv_heads, c.head_dim, jnp.float32)
    hidden, cache = prefill(weights, c, tokens, positions, segments, cache)

    def step(carry: Any, i: Any) -> Any:
        hidden, cache = carry
        logits = unembed(hidden, head(weights))
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        carry = decode_step(weights, c, token, positions[:, -1] + 1 + i, width + i, cache)
        return carry, (token, logits)

    _, (chosen, logits) = jax.lax.scan(step, (hidden, cache), jnp.arange(n))
    return chosen.T, logits.transpose(1, 0, 2)


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = small_models.write(request.param, tmp_path_factory.mktemp(request.param))
    params, config = load_model(path)
    with np.load(small_models.GOLDEN / f"{request.param}.npz") as f:
        return params, config, dict(f)


def assert_golden(rows: list[np.ndarray], golden: dict[str, np.ndarray]) -> None:
    for i, row in enumerate(rows):
        got = row[small_models.golden_positions(len(row))]
        np.testing.assert_allclose(got, golden[f"logits_{i}"], rtol=0, atol=TOLERANCE)


def test_padded_rows_match_golden(model: Any) -> None:
    params, config, golden = model
    assert_golden(small_models.unpadded(np.asarray(logits_of(params, config, *small_models.left_padded()))), golden)


def test_packed_rows_match_golden(model: Any) -> None:
    params, config, golden = model
    assert_golden(small_models.unpacked(np.asarray(logits_of(params, config, *small_models.packed()))), golden)


def test_greedy_through_the_cache(model: Any) -> None:
    """64 tokens equal transformers' generate; the logits of every step equal the full forward's."""
    params, config, golden = model
    tokens, positions, segments = small_models.left_padded()
    n = small_models.NEW_TOKENS
    chosen, logits = greedy(params, config, tokens, positions, segments, n)
    np.testing.assert_array_equal(chosen, golden["greedy"])
    whole = np.concatenate([tokens, golden["greedy"]], axis=1)
    after = positions[:, -1:] + 1 + np.arange(n, dtype=np.int32)
    full = logits_of(
        params,
        config,
        whole,
        np.concatenate([positions, after], axis=1),
        np.concatenate([segments, np.ones_like(after)], axis=1),
    )
    np.testing.assert_allclose(logits, full[:, tokens.shape[1] - 1 : -1], rtol=0, atol=TOLERANCE)


@pytest.mark.exhaustive
def test_greedy_through_the_engine(model: Any) -> None:
    """Three prompts on two slots: the third enters where one has ended, or the cache has moved."""
    params, config, golden = model
    tokens, _, segments = small_models.left_padded()
    asked = [Request(t[s > 0].tolist(), i, 0) for i, (t, s) in enumerate(zip(tokens, segments, strict=True))]
    engine = make_engine(config, stop_ids=(), vocab_size=config.vocab_size, support=0, dtype=jnp.float32, layout=None)
    made = generate(engine, engine.cast(params), asked, Law(0.0), 0, 0, slots=2, max_response=small_models.NEW_TOKENS)
    for i, response in made:
        np.testing.assert_array_equal(response.tokens, golden["greedy"][i])


def test_sharded_logits_match_golden(tmp_path: Path) -> None:
    """Over fsdp 4 × tensor 2; one family stands for all. A fourth row makes the batch divide."""
    layout = Layout(make_mesh(fsdp=4, tensor=2))
    params, config = load_model(small_models.write("qwen3", tmp_path / "qwen3"), layout)
    batch = [np.concatenate([x, x[:1]]) for x in small_models.left_padded()]
    logits = np.asarray(logits_of(params, config, *batch, layout))
    with np.load(small_models.GOLDEN / "qwen3.npz") as golden:
        assert_golden(small_models.unpadded(logits[:3]), dict(golden))


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_live_oracle(name: str, tmp_path: Path) -> None:
    """transformers' own config class and ``save_pretrained`` (version 5 spelling) → logits everywhere, both ways."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from transformers import AutoConfig, AutoModelForCausalLM

    c = AutoConfig.from_pretrained(small_models.write(name, tmp_path / "written"))
    oracle = AutoModelForCausalLM.from_config(c, attn_implementation="eager").eval()
    state = {k: torch.tensor(v) for k, v in small_models.tensors(name).items()}
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    oracle.tie_weights()
    oracle.save_pretrained(tmp_path / "saved")
    params, config = load_model(tmp_path / "saved")

    def reference(m: Any, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
        t = [torch.tensor(x, dtype=torch.long) for x in (tokens, positions, segments)]
        with torch.no_grad():
            return m(t[0], position_ids=t[1], attention_mask=t[2]).logits.numpy()

    batch = small_models.left_padded()
    expected = reference(oracle, *batch)
    got = np.asarray(logits_of(params, config, *batch))
    real = batch[2] > 0
    np.testing.assert_allclose(got[real], expected[real], rtol=0, atol=TOLERANCE)

    save_model(tmp_path / "exported", params, config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    np.testing.assert_array_equal(reference(again, *batch)[real], expected[real])
