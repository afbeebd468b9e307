"""config.json of both spellings, what is refused, and rotary frequencies against transformers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import small_models

from opd_jax.errors import InputError
from opd_jax.models.families import config_from_hf, config_to_hf
from opd_jax.models.rope import RopeScaling, inverse_frequencies

LLAMA = small_models.CONFIGS["llama3_rope"]
QWEN3 = small_models.CONFIGS["qwen3"]
MISTRAL = small_models.CONFIGS["mistral_window"]


def parse(d: dict[str, Any], **fields: Any) -> Any:
    return config_from_hf({k: v for k, v in (d | fields).items() if v is not ...}, "config.json")


@pytest.mark.parametrize("name", list(small_models.CONFIGS))
def test_round_trip(name: str) -> None:
    c = parse(small_models.CONFIGS[name])
    d = config_to_hf(c, eos_token_id=[1, 2], pad_token_id=3)
    assert parse(d) == c
    assert (d["eos_token_id"], d["bos_token_id"], d["pad_token_id"]) == ([1, 2], None, 3)


@pytest.mark.parametrize("name", list(small_models.CONFIGS))
def test_both_spellings(name: str) -> None:
    old = small_models.CONFIGS[name]
    rope = dict(old.get("rope_scaling") or {"rope_type": "default"}, rope_theta=old["rope_theta"])
    new = {k: v for k, v in old.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert parse(new, rope_parameters=rope, dtype="float32") == parse(old)


def test_sizes_that_are_absent() -> None:
    c = parse(LLAMA, num_key_value_heads=..., head_dim=..., rope_theta=..., rope_scaling=None)
    assert (c.kv_heads, c.head_dim, c.rope_theta, c.rope_scaling) == (6, 8, 10_000.0, None)
    assert parse(QWEN3, head_dim=...).head_dim == 128
    assert parse(MISTRAL, head_dim=None).head_dim == 12


def test_windows() -> None:
    assert parse(MISTRAL).windows == (8, 8)
    assert parse(MISTRAL, sliding_window=None).windows is None
    assert parse(MISTRAL, sliding_window=...).windows == (4096, 4096)
    qwen = QWEN3 | {"use_sliding_window": True, "sliding_window": 16, "num_hidden_layers": 4}
    assert parse(qwen, max_window_layers=3).windows == (None, None, None, 16)
    assert parse(qwen).windows is None  # 28 layers come before the first window
    kinds = ["sliding_attention", "full_attention"] * 2
    c = parse(qwen, layer_types=kinds)
    assert c.windows == (16, None, 16, None)
    assert parse(config_to_hf(c)) == c
    assert parse(QWEN3, use_sliding_window=False, sliding_window=16, max_window_layers=0).windows is None
    with pytest.raises(InputError, match=r"layer_types .* use_sliding_window"):
        parse(qwen, layer_types=kinds, use_sliding_window=False)
    with pytest.raises(InputError, match="layer_types"):
        parse(qwen, layer_types=kinds[:3])


def test_export_refuses_what_a_family_cannot_say() -> None:
    with pytest.raises(InputError, match="no Hugging Face configuration of model_type llama"):
        config_to_hf(dataclasses.replace(parse(LLAMA), qkv_bias=True))


REFUSED = {
    "model_type": (LLAMA | {"model_type": "gemma2"}, r"model_type = 'gemma2'.*llama, mistral, qwen2, qwen3"),
    "moe": (QWEN3 | {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe'"),
    "no type": ({"hidden_size": 3}, "model_type = None"),
    "experts": (QWEN3 | {"num_experts": 8}, "num_experts = 8"),
    "class": (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, r"architectures.*LlamaForCausalLM"),
    "activation": (LLAMA | {"hidden_act": "gelu"}, r"hidden_act = 'gelu'.*'silu'"),
    "attention_bias": (LLAMA | {"attention_bias": True}, r"attention_bias = True.*False"),
    "qwen3 bias": (QWEN3 | {"attention_bias": True}, "attention_bias = True"),
    "mlp_bias": (LLAMA | {"mlp_bias": True}, "mlp_bias = True"),
    "partial": (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "partial 5": (
        QWEN3 | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor = 0.5",
    ),
    "quantised": (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
    "dynamic": (QWEN3 | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_scaling.rope_type = 'dynamic'"),
    "longrope": (QWEN3 | {"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters.rope_type = 'longrope'"),
    "per layer type": (QWEN3 | {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one flat mapping"),
    "multimodal": (QWEN3 | {"rope_scaling": {"type": "default", "mrope_section": [1, 2, 3]}}, "mrope_section"),
    "no factor": (QWEN3 | {"rope_scaling": {"type": "linear"}}, "rope_scaling: factor must be a positive number"),
    "bands": (LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {"high_freq_factor": 0.5}}, "high_freq_factor = 0.5"),
    "missing": (
        {k: v for k, v in LLAMA.items() if k != "hidden_size"},
        "hidden_size must be an integer ≥ 1, found None",
    ),
    "ill-typed": (LLAMA | {"vocab_size": "101"}, "vocab_size must be an integer ≥ 1, found '101'"),
    "groups": (LLAMA | {"num_key_value_heads": 4}, "num_key_value_heads = 4.*divisor of num_attention_heads = 6"),
    "odd head": (LLAMA | {"head_dim": 7}, "head_dim = 7"),
    "eps": (LLAMA | {"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
    "mistral layers": (MISTRAL | {"layer_types": ["full_attention"] * 2}, "layer_types"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_name(case: str) -> None:
    d, message = REFUSED[case]
    with pytest.raises(InputError, match=f"^config.json: .*{message}"):
        parse(d)


def test_linear_and_default_frequencies() -> None:
    expected = [1.0, 10_000**-0.25, 10_000**-0.5, 10_000**-0.75]
    np.testing.assert_allclose(inverse_frequencies(8, 10_000.0, None)[0], expected)
    scaled = inverse_frequencies(8, 10_000.0, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(scaled[0], np.array(expected) / 4)
    assert scaled[1] == 1.0


ROPES = {
    "Llama-3.1": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "rope_theta": 5e5,
    }
    | {"original_max_position_embeddings": 8192},
    "Qwen2.5": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "original absent": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    "factor below 1": {"rope_type": "yarn", "factor": 0.5, "rope_theta": 1e4},
    "factor null": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512, "rope_theta": 1e4},
    "attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.7, "beta_slow": 2, "rope_theta": 1e5},
    "mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0, "rope_theta": 1e4},
    "mscale alone": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "rope_theta": 1e4, "truncate": False},
}


@pytest.mark.torch
@pytest.mark.parametrize("case", list(ROPES))
def test_frequencies_match_transformers(case: str) -> None:
    pytest.importorskip("torch")
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    d = QWEN3 | {"head_dim": 128, "max_position_embeddings": 4096, "rope_parameters": dict(ROPES[case])}
    d = {k: v for k, v in d.items() if k != "rope_theta"}
    c = parse(d)
    freq, factor = inverse_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    oracle = Qwen3Config(**{k: v for k, v in d.items() if k != "model_type"})
    expected, expected_factor = ROPE_INIT_FUNCTIONS[ROPES[case]["rope_type"]](oracle, "cpu")
    np.testing.assert_allclose(freq, expected.numpy(), rtol=1e-5)  # the oracle computes in float32
    assert factor == pytest.approx(expected_factor, rel=1e-12)
