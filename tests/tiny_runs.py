"""A student and a teacher of another family, width and padded vocabulary, and runs of them that take seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.config import Config
from opd_jax.config_files import parse_config
from opd_jax.data.pipeline import Example
from opd_jax.data.tasks import write_task_tokenizer
from opd_jax.models.decoder import DecoderConfig, init_params
from opd_jax.models.hf import save_model
from opd_jax.types import Params, Prompts, Rollouts, Sequences

TASK = "products-5x2"
VOCAB = 21  # of the task's tokenizer; both heads are wider
# every axis divides over 8
STUDENT = DecoderConfig(
    "llama", 24, width=32, hidden=64, layers=2, heads=8, kv_heads=8, head_dim=4, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, tie_embeddings=True,
)  # fmt: skip
TEACHER = DecoderConfig(
    "qwen3", 32, width=48, hidden=96, layers=1, heads=8, kv_heads=8, head_dim=8, norm_eps=1e-6, rope_theta=1e4,
    max_positions=64, qk_norm=True,
)  # fmt: skip


def params_of(network: DecoderConfig, seed: int, spread: float = 2.0) -> Params:
    """Random weights with a spread that gives a few nats between student and teacher."""
    return jax.tree.map(lambda w: spread * w, init_params(network, jax.random.key(seed)))


def write_models(path: Path, spread: float = 2.0) -> Path:
    """``path/student`` and ``path/teacher``: Hugging Face directories with the task's tokenizer."""
    assert write_task_tokenizer(path / "tokenizer", TASK) == VOCAB
    for name, network, seed in (("student", STUDENT, 0), ("teacher", TEACHER, 1)):
        save_model(path / name, params_of(network, seed, spread), network, tokenizer_from=path / "tokenizer")
    return path


def run_config(models: Path, run_dir: Path, kind: str = "opd", **settings: Any) -> Config:
    """Eight rows a step; prompts of 6 tokens, responses of at most 10."""
    data = {"source": f"task:{TASK}", "chat": False, "max_prompt": 8, "limit": 64}
    tree: dict[str, Any] = {
        "kind": kind,
        "run_dir": str(run_dir),
        "steps": 8,
        "student": {"path": str(models / "student")},
        "objective": {"name": "full", "k": 4},
        "data": data,
        "rollout": {"prompts": 4, "samples": 2, "max_response": 10},
        "optimizer": {"lr": 3e-3, "warmup": 2, "schedule": "cosine"},
        "dtype": "float32",
        "remat": "none",
    }
    if kind == "opd":
        tree["teacher"] = {"path": str(models / "teacher")}
    elif kind == "sft":
        tree["data"] = data | {"response": "response"}
    else:
        tree |= {"reward": {}, "objective": {"name": "sampled", "correction": "ppo"}}
    return parse_config(tree | settings)


def make_rollouts(rows: int = 8, prompt: int = 6, response: int = 9, k: int = 4) -> Rollouts:
    """Ragged random rollouts as a sampler returns them; one response of one token, one cut at the limit."""
    rng = np.random.default_rng(0)
    prompt_lengths = rng.integers(1, prompt + 1, rows)
    lengths = rng.integers(1, response + 1, rows)
    lengths[:2] = 1, response
    inside = np.arange(response) < lengths[:, None]
    right = np.arange(prompt) >= prompt - prompt_lengths[:, None]
    top = np.argsort(rng.random((rows, response, VOCAB)), axis=-1)[..., :k]
    float_zeros = jnp.zeros((rows, response))
    return Rollouts(
        prompts=Prompts(
            tokens=jnp.asarray(rng.integers(0, VOCAB, (rows, prompt)) * right, jnp.int32),
            lengths=jnp.asarray(prompt_lengths, jnp.int32),
            ids=jnp.arange(rows, dtype=jnp.uint32),
            samples=jnp.zeros(rows, jnp.uint32),
        ),
        tokens=jnp.asarray(rng.integers(0, VOCAB, (rows, response)) * inside, jnp.int32),
        lengths=jnp.asarray(lengths, jnp.int32),
        stopped=jnp.asarray(lengths < response),
        logp=float_zeros,
        entropy=float_zeros,
        topk_ids=jnp.asarray(top * inside[..., None], jnp.int32),
        topk_logp=jnp.zeros((rows, response, k)),
    )


def make_examples(rows: int = 8, longest: int = 6) -> list[Example]:
    """Ragged supervised pairs."""
    rng = np.random.default_rng(1)
    return [Example(*(rng.integers(0, VOCAB, rng.integers(1, longest)).tolist() for _ in "pr")) for _ in range(rows)]


def by_response(rows: Sequences, values: Any) -> np.ndarray:
    """[M, T, …] values of rows at the response tokens of each sequence, [B, R, …]; 0 past its end."""
    mask, values = np.asarray(rows.mask), np.asarray(values)
    out = np.zeros((len(mask), rows.max_response, *values.shape[2:]), values.dtype)
    out[np.asarray(rows.segments)[mask] - 1, np.asarray(rows.depth)[mask]] = values[mask]
    return out


def response_mask(rollouts: Rollouts) -> np.ndarray:
    """[B, R] bool: the tokens of each response."""
    return np.arange(rollouts.tokens.shape[1]) < np.asarray(rollouts.lengths)[:, None]


def distance(a: Any, b: Any) -> float:
    """‖a − b‖ / ‖b‖ over all arrays of two trees."""
    wide = [[np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (a, b)]
    difference = sum(np.sum((x - y) ** 2) for x, y in zip(*wide, strict=True))
    return float(np.sqrt(difference / sum(np.sum(y**2) for y in wide[1])))
