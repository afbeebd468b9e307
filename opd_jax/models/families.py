"""Hugging Face ``config.json`` ↔ DecoderConfig for the families that one decoder covers.

Both spellings are read: transformers 4 (``rope_theta``, ``rope_scaling``, ``torch_dtype``) and 5 (``rope_parameters``,
``dtype``). The older one is written, since both versions read it. What the decoder does not compute is refused by name.
Absent fields take the value that transformers gives them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig
from opd_jax.models.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """What ``model_type`` implies, and the values that transformers gives to absent fields."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    window: int | None = None


FAMILIES = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM", kv_heads=8, window=4096),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, kv_heads=32, window=4096),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, kv_heads=32, head_dim=128, window=4096),
}
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


def config_from_hf(d: dict[str, Any], where: str) -> DecoderConfig:
    """The decoder of a parsed ``config.json``; ``where`` is the file that error messages name.

    Raises:
        InputError: an architecture, field or value that the decoder does not compute, or a missing or ill-typed field.
    """
    name = d.get("model_type")
    if name not in FAMILIES:
        raise _unsupported("model_type", name, where, f"one of {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    _refuse(d, family, where)
    heads, width = _integer(d, "num_attention_heads", where), _integer(d, "hidden_size", where)
    kv_heads = _integer(d, "num_key_value_heads", where, family.kv_heads or heads, null=heads)
    head_dim = _integer(d, "head_dim", where, family.head_dim or width // heads, null=width // heads)
    if heads % kv_heads:
        raise _unsupported("num_key_value_heads", kv_heads, where, f"a divisor of num_attention_heads = {heads}")
    if head_dim % 2:
        raise _unsupported("head_dim", head_dim, where, "an even size (rotary embedding turns pairs)")
    layers = _integer(d, "num_hidden_layers", where)
    max_positions = _integer(d, "max_position_embeddings", where)
    theta, scaling = _rope(d, max_positions, where)
    return DecoderConfig(
        family=name,
        vocab_size=_integer(d, "vocab_size", where),
        width=width,
        hidden=_integer(d, "intermediate_size", where),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=_number(d, "rms_norm_eps", where, 1e-6),
        rope_theta=theta,
        max_positions=max_positions,
        rope_scaling=scaling,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tie_embeddings=bool(d.get("tie_word_embeddings", False)),
        windows=_windows(d, name, family, layers, where),
    )


def config_to_hf(
    c: DecoderConfig,
    *,
    eos_token_id: int | list[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A ``config.json`` that transformers 4 and 5 read.

    Raises:
        InputError: no Hugging Face configuration of this family describes the decoder.
    """
    d: dict[str, Any] = {
        "architectures": [FAMILIES[c.family].architecture],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.hidden,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_positions,
        "rope_theta": c.rope_theta,
        "rope_scaling": _scaling_to_hf(c.rope_scaling),
        "tie_word_embeddings": c.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": dtype,
    }
    if c.family == "llama":
        d |= {"attention_bias": False, "mlp_bias": False}
    if c.family == "qwen3":
        d |= {"attention_bias": False}
    d |= _windows_to_hf(c)
    if config_from_hf(d, "config.json") != c:
        raise InputError(f"no Hugging Face configuration of model_type {c.family} describes this decoder: {c}")
    return d


def _unsupported(field: str, value: Any, where: str, expected: str) -> InputError:
    return InputError(f"{where}: {field} = {value!r} is not supported; expected {expected}.")


def _refuse(d: dict[str, Any], family: Family, where: str) -> None:
    architectures = d.get("architectures") or [family.architecture]
    if family.architecture not in architectures:
        raise _unsupported("architectures", architectures, where, family.architecture)
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "quantization_config": (),
        "num_experts": (),
        "num_local_experts": (),
    }
    for field, values in accepted.items():
        if d.get(field) is not None and d[field] not in values:
            raise _unsupported(field, d[field], where, repr(values[0]) if values else "no such field (dense weights)")


def _rope(d: dict[str, Any], max_positions: int, where: str) -> tuple[float, RopeScaling | None]:
    field = "rope_scaling" if d.get("rope_scaling") else "rope_parameters"
    r = d.get(field) or {}
    if not isinstance(r, dict) or any(isinstance(v, dict) for v in r.values()):
        raise _unsupported(field, r, where, "one flat mapping for all layers")
    theta = _number({"rope_theta": d.get("rope_theta")} | r, "rope_theta", where, 10_000.0)
    kind = r.get("rope_type", r.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise _unsupported(f"{field}.rope_type", kind, where, f"one of {', '.join(ROPE_KINDS)}")
    if r.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise _unsupported(f"{field}.partial_rotary_factor", r["partial_rotary_factor"], where, "1.0")
    if r.get("mrope_section") is not None:
        raise _unsupported(f"{field}.mrope_section", r["mrope_section"], where, "text models only (no such field)")
    if kind == "default":
        return theta, None
    where = f"{where}: {field}"
    if kind == "linear":
        return theta, RopeScaling("linear", _number(r, "factor", where))
    original = d.get("original_max_position_embeddings")
    original = _integer(r, "original_max_position_embeddings", where, max_positions) if original is None else original
    if kind == "llama3":
        low, high = _number(r, "low_freq_factor", where), _number(r, "high_freq_factor", where)
        if low >= high:
            raise _unsupported("high_freq_factor", high, where, f"more than low_freq_factor = {low}")
        return theta, RopeScaling("llama3", _number(r, "factor", where), original, low, high)
    return theta, _yarn(r, original, max_positions, where)


def _yarn(r: dict[str, Any], original: int, max_positions: int, where: str) -> RopeScaling:
    factor = _number(r, "factor", where, max_positions / original)
    attention_factor = r.get("attention_factor")
    if attention_factor is None and r.get("mscale") and r.get("mscale_all_dim"):
        log_factor = 0.1 * math.log(max(factor, 1.0))
        attention_factor = (r["mscale"] * log_factor + 1.0) / (r["mscale_all_dim"] * log_factor + 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=float(r.get("beta_fast") or 32),
        beta_slow=float(r.get("beta_slow") or 1),
        attention_factor=attention_factor,
        truncate=bool(r.get("truncate", True)),
    )


def _scaling_to_hf(s: RopeScaling | None) -> dict[str, Any] | None:
    if s is None:
        return None
    d: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        d["original_max_position_embeddings"] = s.original_max_positions
    if s.kind == "llama3":
        d |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        d |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
        d |= {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
    return d


def _windows(d: dict[str, Any], name: str, family: Family, layers: int, where: str) -> tuple[int | None, ...] | None:
    types = d.get("layer_types")
    kinds = ("full_attention", "sliding_attention")
    if types is not None and (len(types) != layers or any(t not in kinds for t in types)):
        raise _unsupported("layer_types", types, where, f"{layers} entries (num_hidden_layers), each one of {kinds}")
    if name.startswith("qwen"):
        enabled = bool(d.get("use_sliding_window", False))
        if types is None:
            start = _integer(d, "max_window_layers", where, 28, minimum=0)
            types = [kinds[i >= start] for i in range(layers)]
        elif not enabled and kinds[1] in types:
            raise _unsupported("layer_types", types, where, "use_sliding_window = true with sliding layers")
    else:
        enabled = name == "mistral"
        if enabled and types is not None:
            raise _unsupported("layer_types", types, where, "no such field: every mistral layer has sliding_window")
        types = [kinds[1]] * layers
    if not enabled or d.get("sliding_window", family.window) is None:
        return None
    window = _integer(d, "sliding_window", where, family.window)
    windows = tuple(window if t == kinds[1] else None for t in types)
    return windows if any(windows) else None


def _windows_to_hf(c: DecoderConfig) -> dict[str, Any]:
    window = next((w for w in c.windows or () if w is not None), None)
    if c.family == "mistral":
        return {"sliding_window": window}
    if not c.family.startswith("qwen"):
        return {}
    if window is None or c.windows is None:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": c.layers}
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": next(i for i, w in enumerate(c.windows) if w is not None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in c.windows],
    }


def _integer(
    d: dict[str, Any], key: str, where: str, default: int | None = None, *, null: int | None = None, minimum: int = 1
) -> int:
    """``default`` stands for an absent field, ``null`` for one that is null."""
    value = d.get(key, default)
    value = null if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InputError(f"{where}: {key} must be an integer ≥ {minimum}, found {value!r}")
    return value


def _number(d: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value = default if d.get(key) is None else d[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0 or math.isinf(value):
        raise InputError(f"{where}: {key} must be a positive number, found {value!r}")
    return float(value)
