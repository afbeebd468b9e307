"""FLOPs against counts made by hand, and against the compiler's; peaks by the names that jax gives to chips."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.models.decoder import DecoderConfig, forward, init_params
from opd_jax.models.flops import causal_pairs, forward_flops, peak_flops, weight_count

SMALL = DecoderConfig(
    "qwen2", 10, width=8, hidden=12, layers=2, heads=4, kv_heads=2, head_dim=2, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, qkv_bias=True,
)  # fmt: skip


def test_weights_by_hand() -> None:
    attention = 8 * 8 + 2 * (8 * 4) + 8 * 8  # queries, keys and values, output
    assert weight_count(SMALL) == {"layers": 2 * (attention + 3 * 8 * 12), "vocabulary": 2 * 10 * 8}
    tied = dataclasses.replace(SMALL, tie_embeddings=True)
    assert weight_count(tied)["vocabulary"] == 10 * 8


def test_pairs_by_hand() -> None:
    assert causal_pairs(SMALL, np.array([1, 3, 5])) == 1 + 6 + 15
    windowed = dataclasses.replace(SMALL, windows=(None, 2))  # 1, 2, 2, 2, 2 keys in the second layer
    assert causal_pairs(windowed, np.array([5])) == (15 + 9) / 2
    brute = [[sum(min(i + 1, w) for i in range(n)) for n in (1, 2, 9)] for w in (99, 4)]
    assert causal_pairs(dataclasses.replace(SMALL, windows=(None, 4)), np.array([1, 2, 9])) == np.sum(brute) / 2


def test_forward_by_hand() -> None:
    layers = weight_count(SMALL)["layers"]
    # a token, then the products of 4 heads of size 2 with 7 keys, and of their probabilities with 7 values, in 2 layers
    assert forward_flops(SMALL, 3, 7) == 2 * layers * 3 + 2 * 2 * (4 * 2) * 7 * 2


def test_forward_against_the_compiler() -> None:
    """XLA counts the products of one unscanned layer; attention is all T² there, and norms and softmax come on top."""
    c = dataclasses.replace(SMALL, width=64, hidden=256, heads=8, kv_heads=8, head_dim=8, layers=1)
    T, params = 32, jax.eval_shape(lambda: init_params(c, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, T), jnp.int32)
    lowered = jax.jit(lambda p, x: forward(p, c, x, x, x)).lower(params, tokens)
    cost: Any = lowered.compile().cost_analysis()
    assert forward_flops(c, T, T * T) == pytest.approx(cost["flops"], rel=0.1)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", None),  # another peak than the SXM card's
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("TPU v5x", None),
        ("cpu", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_flops(kind) == peak
