"""FLOPs of a decoder counted from its shapes (a multiply-add is 2), and what chips can do at most."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int

from opd_jax.models.decoder import DecoderConfig, Spec, layer_specs, parameter_specs

# Dense bfloat16, 1/s, one device. cloud.google.com/tpu/docs (system architecture); nvidia.com data sheets.
PEAKS = {
    "v4": 275e12,
    "v5e": 197e12,
    "v5p": 459e12,
    "v6e": 918e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
}
# What jax calls them. A v4 or v5p device is a whole chip (both cores); the PCIe and NVL cards of the H100 have other
# peaks than the SXM one, so they are not matched by its name.
_TPU_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p"} | {
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}
_GPU_KINDS = {"NVIDIA A100": "A100", "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H200": "H200"}


def peak_flops(device_kind: str) -> float | None:
    """Published bfloat16 peak (1/s) of a device by its ``device_kind``; None where none is known, as on a CPU."""
    gpu = next((name for start, name in _GPU_KINDS.items() if device_kind.startswith(start)), None)
    name = _TPU_KINDS.get(device_kind, gpu)
    return None if name is None or device_kind == "NVIDIA H200 NVL" else PEAKS[name]


def weight_count(c: DecoderConfig) -> dict[str, int]:
    """Weights of matrices: of the layers, and of embedding and head (``vocabulary``)."""
    layers = sum(math.prod(s.shape) for name, s in layer_specs(c).items() if len(s.shape) > 1 and "bias" not in name)
    outside = [s for s in parameter_specs(c).values() if isinstance(s, Spec) and len(s.shape) > 1]
    return {"layers": c.layers * layers, "vocabulary": sum(math.prod(s.shape) for s in outside)}


def forward_flops(c: DecoderConfig, tokens: float, pairs: float) -> float:
    """FLOPs of the layers on ``tokens`` tokens whose queries meet ``pairs`` keys in all; the head is not among them."""
    return 2 * weight_count(c)["layers"] * tokens + 4 * c.layers * c.heads * c.head_dim * pairs


def causal_pairs(c: DecoderConfig, lengths: Int[np.ndarray, "B"]) -> float:
    """Pairs of a query and a key that it sees in sequences of ``lengths`` tokens, in the mean over layers.

    Without a window n (n + 1) / 2; of queries beyond a window of w tokens each sees w.
    """
    n = np.asarray(lengths, np.float64)

    def of_layer(window: int | None) -> float:
        seen = np.minimum(n, window or n)
        return float(np.sum(seen * (seen + 1) / 2 + (n - seen) * seen))

    return float(np.mean([of_layer(w) for w in c.windows])) if c.windows else of_layer(None)
