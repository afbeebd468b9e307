"""The full reverse KL at the size of an 8B model, on an NVIDIA GPU: ``JAX_PLATFORMS=cuda pytest -m gpu -s``."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.losses import Objective, distillation_gradient, reference_loss

BATCH, STEPS, VOCAB, WIDTH = 8, 1024, 128_256, 4096
CHECKED = 32  # tokens of each sequence that are compared


@pytest.mark.gpu
def test_full_reverse_kl_on_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no NVIDIA GPU, or JAX_PLATFORMS is not cuda")
    arrays = inputs()
    everywhere = jnp.ones((BATCH, STEPS), bool)
    compiled = jax.jit(loss_and_gradient).lower(*arrays, everywhere).compile()
    memory: Any = compiled.memory_analysis()
    beyond = (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9
    times = [seconds(compiled, *arrays, everywhere) for _ in range(12)][2:]
    print(f"\n{jax.devices()[0].device_kind}: {1e3 * statistics.median(times):.1f} ms, {beyond:.2f} GB beyond inputs")
    assert beyond <= 6

    # The mask is an argument: the program that was timed is the one that is compared, on the tokens a dense loss fits.
    loss, (dh, dw) = compiled(*arrays, everywhere & (jnp.arange(STEPS) < CHECKED))
    want, (want_dh, want_dw) = jax.jit(dense)(*arrays)
    np.testing.assert_allclose(loss, want, rtol=1e-3)
    assert distance(dh[:, :CHECKED], want_dh) <= 1e-2
    assert distance(dw, want_dw) <= 1e-2
    assert not dh[:, CHECKED:].any()


def inputs() -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, teacher = (jax.random.normal(k, (BATCH, STEPS, WIDTH), jnp.bfloat16) for k in keys[:2])
    heads = [jax.random.normal(k, (VOCAB, WIDTH), jnp.bfloat16) * (2 / WIDTH**0.5) for k in keys[2:4]]
    return hidden, heads[0], teacher, heads[1], jax.random.randint(keys[4], (BATCH, STEPS), 0, VOCAB)


def loss_and_gradient(*arrays: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    (loss, _), _, gradient = distillation_gradient(*arrays, objective=Objective(), metrics=False)
    return loss, gradient


def dense(h: jax.Array, w: jax.Array, g: jax.Array, u: jax.Array, tokens: jax.Array) -> Any:
    h, g, tokens = h[:, :CHECKED], g[:, :CHECKED], tokens[:, :CHECKED]

    def loss(h: jax.Array, w: jax.Array) -> jax.Array:
        return reference_loss(h, w, g, u, tokens, jnp.ones(tokens.shape), Objective())[0]

    # Cast to float32, so that the gradients come in it; the products are those of the bfloat16 numbers, exactly.
    return jax.value_and_grad(loss, (0, 1))(h.astype(jnp.float32), w.astype(jnp.float32))


def distance(got: jax.Array, want: jax.Array) -> float:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def seconds(f: Any, *arrays: jax.Array) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f(*arrays))
    return time.perf_counter() - start
