"""Shapes of published models by hub id, so that a run can be planned before anything is downloaded.

From the ``config.json`` of each repository; fields that have no bearing on the decoder are left out.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.families import config_from_hf
from opd_jax.models.hf import load_config

_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _qwen3(sizes: tuple[int, ...], tied: bool = True, max_positions: int = 40_960) -> dict[str, Any]:
    return dict(zip(_FIELDS, sizes, strict=True)) | {
        "model_type": "qwen3", "head_dim": 128, "vocab_size": 151_936, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6,
        "max_position_embeddings": max_positions, "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen2(
    sizes: tuple[int, ...], vocab: int, max_positions: int, tied: bool = False, theta: float = 1e4, eps: float = 1e-6
) -> dict[str, Any]:
    return dict(zip(_FIELDS, sizes, strict=True)) | {
        "model_type": "qwen2", "vocab_size": vocab, "rope_theta": theta, "rms_norm_eps": eps,
        "max_position_embeddings": max_positions, "tie_word_embeddings": tied, "use_sliding_window": False,
    }  # fmt: skip


_QWEN2_1_5B = (1536, 8960, 28, 12, 2)
_QWEN2_7B = (3584, 18_944, 28, 28, 4)
_QWEN3_1_7B, _QWEN3_4B = (2048, 6144, 28, 16, 8), (2560, 9728, 36, 32, 8)
_R1_1_5B = _qwen2(_QWEN2_1_5B, 151_936, 131_072)
_R1_7B = _qwen2(_QWEN2_7B, 152_064, 131_072)

PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _qwen3((1024, 3072, 28, 16, 8)),
    "Qwen/Qwen3-1.7B": _qwen3(_QWEN3_1_7B),
    "Qwen/Qwen3-1.7B-Base": _qwen3(_QWEN3_1_7B, max_positions=32_768),
    "Qwen/Qwen3-4B": _qwen3(_QWEN3_4B),
    "Qwen/Qwen3-4B-Base": _qwen3(_QWEN3_4B, max_positions=32_768),
    "Qwen/Qwen3-8B": _qwen3((4096, 12_288, 36, 32, 8), tied=False),
    "Qwen/Qwen3-14B": _qwen3((5120, 17_408, 40, 40, 8), tied=False),
    "Qwen/Qwen2.5-Math-1.5B": _qwen2(_QWEN2_1_5B, 151_936, 4096, tied=True),
    "Qwen/Qwen2.5-Math-7B": _qwen2(_QWEN2_7B, 152_064, 4096),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": _R1_1_5B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _R1_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": _qwen2(
        (5120, 13_824, 48, 40, 8), 152_064, 131_072, theta=1e6, eps=1e-5
    ),
    "hbx/JustRL-DeepSeek-1.5B": _R1_1_5B,
    "Skywork/Skywork-OR1-Math-7B": _R1_7B,
    "Skywork/Skywork-OR1-7B": _R1_7B,
}


def decoder_of(path: str) -> DecoderConfig:
    """The decoder of a Hugging Face directory (its config.json is enough), or of a published model by its hub id.

    Raises:
        InputError: neither of the two.
    """
    if path in PUBLISHED and not Path(path).is_dir():
        return config_from_hf(PUBLISHED[path], path)
    if Path(path).is_dir() or "://" in path:
        return load_config(path)
    near = difflib.get_close_matches(path, PUBLISHED, n=1, cutoff=0.5)
    raise InputError(
        f"{path}: no such directory, and no published model whose shape is known"
        + (f"; did you mean {near[0]}?" if near else ".")
        + f" Give a directory with a config.json, or one of {', '.join(PUBLISHED)}."
    )
