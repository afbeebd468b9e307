"""Small random models of every family, defined without torch: both the oracle and the decoder read the same weights."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from opd_jax.models.families import config_from_hf
from opd_jax.models.hf import checkpoint_tensors

VOCAB = 101
LENGTHS = (40, 23, 9)  # of the three prompts
NEW_TOKENS = 64
GOLDEN = Path(__file__).parent / "golden"


def _config(model_type: str, **fields: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": "float32",
    } | fields


# Scalings take effect within the tested lengths because the original context is short.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3_rope": _config(
        "llama",
        num_attention_heads=6,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama_linear": _config(
        "llama",
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        rope_scaling={"type": "linear", "factor": 4.0},
    ),
    "qwen2_tied": _config("qwen2", tie_word_embeddings=True, use_sliding_window=False, sliding_window=8),
    "qwen2_yarn": _config(
        "qwen2",
        num_key_value_heads=1,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "qwen3": _config("qwen3", vocab_size=104, head_dim=20, attention_bias=False),  # sizes that divide over a mesh
    "qwen3_windows": _config(
        "qwen3",
        head_dim=16,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
    ),
    "mistral_window": _config("mistral", sliding_window=8, head_dim=16),
}


def tensors(name: str) -> dict[str, np.ndarray]:
    """The weights of a model, each a function of its own name; wide enough that attention and norms matter."""
    out = {}
    for t in checkpoint_tensors(config_from_hf(CONFIGS[name], name)):
        rng = np.random.default_rng(zlib.crc32(f"{name}/{t.name}".encode()))
        noise = rng.standard_normal(t.flat_shape).astype(np.float32)
        gain = 4.0 if t.key == "head" else 1.5
        std = 0.5 if t.key == "embed" else 0.3 if len(t.flat_shape) == 1 else gain * t.flat_shape[-1] ** -0.5
        out[t.name] = noise * np.float32(std) + np.float32(t.key.endswith("norm"))
    return out


def write(name: str, path: Path) -> Path:
    """A Hugging Face directory of the model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIGS[name]))
    safetensors.numpy.save_file(tensors(name), path / "model.safetensors", metadata={"format": "pt"})
    return path


def prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def left_padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The prompts as right-aligned rows: tokens, positions, segments (0: padding)."""
    width = max(LENGTHS)
    tokens, positions, segments = (np.zeros((len(LENGTHS), width), np.int32) for _ in range(3))
    for i, p in enumerate(prompts()):
        tokens[i, width - len(p) :] = p
        positions[i, width - len(p) :] = np.arange(len(p))
        segments[i, width - len(p) :] = 1
    return tokens, positions, segments


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same prompts in the same shape, the two short ones in one row, padding at the end and a row of padding."""
    tokens, positions, segments = (np.zeros((len(LENGTHS), max(LENGTHS)), np.int32) for _ in range(3))
    long, middle, short = prompts()
    tokens[0], positions[0], segments[0] = long, np.arange(len(long)), 1
    start = 0
    for segment, p in ((1, middle), (2, short)):
        at = slice(start, start + len(p))
        tokens[1, at], positions[1, at], segments[1, at] = p, np.arange(len(p)), segment
        start += len(p)
    return tokens, positions, segments


def unpadded(rows: np.ndarray) -> list[np.ndarray]:
    """Undoes ``left_padded``."""
    return [row[len(row) - n :] for row, n in zip(rows, LENGTHS, strict=True)]


def unpacked(rows: np.ndarray) -> list[np.ndarray]:
    """Undoes ``packed``."""
    _, middle, short = LENGTHS
    return [rows[0], rows[1, :middle], rows[1, middle : middle + short]]


def golden_positions(length: int) -> np.ndarray:
    """Where reference logits are kept: the first, one inside and one past a window, the last."""
    return np.unique([0, 5, length // 2, length - 1])
