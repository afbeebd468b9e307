"""Rotary position embedding with the frequency scalings found in released configurations."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling: ``linear`` by the factor; ``llama3`` by bands; ``yarn`` by a ramp and an attention factor."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(max(factor, 1)) + 1
    truncate: bool = True  # yarn: round the ramp's ends to whole dimensions


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> tuple[np.ndarray, float]:
    """Frequencies [H/2] in radians per position, and the factor that multiplies cos and sin (1 but for yarn)."""
    freq = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return freq, 1.0
    if scaling.kind == "linear":
        return freq / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(freq, scaling), 1.0
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
    return _yarn(freq, head_dim, theta, scaling), factor


def _llama3(freq: np.ndarray, s: RopeScaling) -> np.ndarray:
    wavelength = 2 * np.pi / freq
    smooth = (s.original_max_positions / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)  # 0 for long wavelengths (divided by factor), 1 for short ones (kept)
    return (1 - smooth) * freq / s.factor + smooth * freq


def _yarn(freq: np.ndarray, head_dim: int, theta: float, s: RopeScaling) -> np.ndarray:
    def dimension(rotations: float) -> float:
        return head_dim * math.log(s.original_max_positions / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(s.beta_fast), dimension(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)  # 0: keep, 1: interpolate
    return freq / s.factor * ramp + freq * (1 - ramp)


def rotations(
    positions_BT: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Float[Array, "B T h"], Float[Array, "B T h"]]:
    """cos and sin of position × frequency, [B, T, H/2], float32."""
    freq, factor = inverse_frequencies(head_dim, theta, scaling)
    angle = positions_BT[..., None].astype(jnp.float32) * jnp.asarray(freq, jnp.float32)
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T h"], sin: Float[Array, "B T h"]
) -> Float[Array, "B T N H"]:
    """Rotates pairs (i, i + H/2), the layout of Hugging Face checkpoints."""
    a, b = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
