"""Rollouts on an NVIDIA GPU against the same program on the CPU: ``JAX_PLATFORMS=cuda,cpu pytest -m gpu``.

How fast they are, ``benchmarks/rollout.py --device gpu`` tells.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.mesh import ROLLOUT, Layout, make_mesh
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Request, Response, generate

VOCAB, LENGTH, STOPS = 4_099, 96, (7, 11)
CONFIG = DecoderConfig(
    "qwen3", VOCAB, width=256, hidden=512, layers=4, heads=8, kv_heads=4, head_dim=64, norm_eps=1e-6, rope_theta=1e6,
    max_positions=512, qk_norm=True, tie_embeddings=True,
)  # fmt: skip


def on(device: Any, dtype: Any, law: Law, slots: int) -> dict[int, Response]:
    rng = np.random.default_rng(0)
    asked = [Request(rng.integers(0, VOCAB, rng.integers(4, 60)).tolist(), i, 0) for i in range(48)]
    layout = Layout(make_mesh(1, devices=[device]), ROLLOUT)
    with jax.default_matmul_precision("highest"):
        engine = make_engine(CONFIG, stop_ids=STOPS, vocab_size=VOCAB - 3, support=8, dtype=dtype, layout=layout)
        weights = engine.cast(jax.device_put(init_params(CONFIG, jax.random.key(0)), layout.sharding()))
        return dict(generate(engine, weights, asked, law, 0, 1, slots=slots, max_response=LENGTH))


@pytest.mark.gpu
@pytest.mark.parametrize("law", [Law(), Law(0.0), Law(0.8, 0.9, 50)], ids=["plain", "greedy", "truncated"])
def test_a_gpu_samples_what_a_cpu_samples(law: Law) -> None:
    """In float32: the same tokens, but for rows that part where a uniform lies at an edge, and log-probabilities."""
    gpu = gpu_or_skip()
    got, want = on(gpu, jnp.float32, law, 16), on(jax.devices("cpu")[0], jnp.float32, law, 48)
    assert got.keys() == want.keys()
    parted = 0
    for i, response in got.items():
        other = want[i]
        n = min(len(response.tokens), len(other.tokens))
        same = np.cumprod(response.tokens[:n] == other.tokens[:n]).astype(bool)
        parted += not same.all()
        np.testing.assert_allclose(response.logp[:n][same], other.logp[:n][same], rtol=0, atol=1e-3)
    tokens = sum(len(r.tokens) for r in want.values())
    assert parted <= max(1, tokens // 1000)


@pytest.mark.gpu
def test_bfloat16_rollouts_follow_their_law() -> None:
    """The mean of −log p of what was sampled is the mean entropy; responses end where they should."""
    out = on(gpu_or_skip(), jnp.bfloat16, Law(), 16)
    mean = np.mean(np.concatenate([r.logp for r in out.values()]))
    entropy = np.mean(np.concatenate([r.entropy for r in out.values()]))
    assert abs(mean + entropy) < 0.05
    assert all(len(r.tokens) == LENGTH or r.tokens[-1] in STOPS for r in out.values())


def gpu_or_skip() -> Any:
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU, or JAX_PLATFORMS does not begin with cuda")
    return jax.devices()[0]
