"""GGUF in: small files written by the library ``gguf``, against the safetensors of the same weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_models
from test_models_hf import assert_equal
from transformers import AutoTokenizer

from opd_jax.errors import InputError
from opd_jax.models.gguf import LAYER_NAMES, import_gguf
from opd_jax.models.hf import LAYER_NAMES as HF_LAYER_NAMES
from opd_jax.models.hf import load_model

gguf = pytest.importorskip("gguf")

TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ASCII = [chr(i) for i in range(33, 127)]
TOKENS = [*ASCII, "Ġ", "th", "12", "Ġ1", "<|end|>", "<tool>", "[PAD100]"]
TYPES = [1] * 98 + [3, 4, 5]


def gguf_name(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, rest = name.split(".", 3)
    key = next(k for k, v in HF_LAYER_NAMES.items() if v == rest)
    return f"blk.{layer}.{LAYER_NAMES[key]}"


def permuted(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's storage of rotary pairs: neighbours instead of halves."""
    out = np.empty_like(w)
    size = w.shape[0] // heads
    for h in range(heads):
        for i in range(size // 2):
            out[h * size + 2 * i] = w[h * size + i]
            out[h * size + 2 * i + 1] = w[h * size + size // 2 + i]
    return out


def write_gguf(path: Path, name: str, pre: str = "smollm", **changes: Any) -> Path:
    """A GGUF of a small model; ``changes`` override metadata, given without the architecture's prefix."""
    c = small_models.CONFIGS[name]
    arch = c["model_type"]
    scaling = c.get("rope_scaling") or {}
    metadata: dict[str, Any] = {
        "block_count": c["num_hidden_layers"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "feed_forward_length": c["intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": c["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "rope.freq_base": c["rope_theta"],
    }
    if "head_dim" in c:
        metadata["attention.key_length"] = c["head_dim"]
    if scaling:
        metadata |= {"rope.scaling.type": scaling["type"], "rope.scaling.factor": scaling["factor"]}
    if "original_max_position_embeddings" in scaling:
        metadata["rope.scaling.original_context_length"] = scaling["original_max_position_embeddings"]
    writer = gguf.GGUFWriter(path, changes.pop("arch", arch))
    for key, value in (metadata | changes).items():
        (writer.add_float32 if isinstance(value, float) else add_other(writer, value))(f"{arch}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    pads = c["vocab_size"] - len(TOKENS)
    writer.add_token_list(TOKENS + [f"[PAD{101 + i}]" for i in range(pads)])
    writer.add_token_types(TYPES + [5] * pads)
    writer.add_token_merges(["t h", "1 2", "Ġ 1"])
    writer.add_eos_token_id(TOKENS.index("<|end|>"))
    writer.add_bos_token_id(TOKENS.index("<|end|>"))
    writer.add_chat_template("{{ messages[0].content }}<|end|>")
    for tensor, w in small_models.tensors(name).items():
        if arch == "llama" and (".q_proj." in tensor or ".k_proj." in tensor):
            w = permuted(w, c["num_attention_heads" if ".q_proj." in tensor else "num_key_value_heads"])
        writer.add_tensor(gguf_name(tensor), w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_other(writer: Any, value: Any) -> Any:
    return writer.add_string if isinstance(value, str) else writer.add_uint32


def tokenizer_of(tmp_path: Path, pre: str) -> Any:
    name = "qwen2_tied" if pre == "qwen2" else "llama_linear"
    import_gguf(write_gguf(tmp_path / f"{pre}.gguf", name, pre)).write_tokenizer(tmp_path / pre)
    (tmp_path / pre / "config.json").write_text(json.dumps(small_models.CONFIGS[name]))
    return AutoTokenizer.from_pretrained(tmp_path / pre)


@pytest.mark.parametrize("name", ["llama_linear", "qwen2_tied", "qwen2_yarn", "qwen3"])
def test_weights_and_config(name: str, tmp_path: Path) -> None:
    got = import_gguf(write_gguf(tmp_path / "m.gguf", name))
    params, config = load_model(small_models.write(name, tmp_path / "m"))
    assert got.config == config
    assert_equal(got.params, params)


@pytest.mark.parametrize(
    ("pre", "digits", "first"),
    [("smollm", ["1", "2"], "a"), ("qwen2", ["1", "2"], "a"), ("llama-bpe", ["12"], "<|end|>")],
)
def test_tokenizer(pre: str, digits: list[str], first: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, pre)

    def encode(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])

    assert encode("a12") == ["a", *digits]
    assert encode("the<tool>th<|end|>th") == ["th", "e", "<tool>", "th", "<|end|>", "th"]
    assert encode("[PAD100]") == list("[PAD100]")
    assert "[PAD100]" not in tokenizer.get_vocab()
    assert tokenizer.convert_ids_to_tokens(tokenizer("a")["input_ids"])[0] == first
    assert tokenizer.decode(tokenizer("th 1 <tool>", add_special_tokens=False)["input_ids"]) == "th 1 <tool>"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end|>", 98)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "hi<|end|>"


def test_generation_config_lists_the_end_of_turn(tmp_path: Path) -> None:
    tokenizer_of(tmp_path, "smollm")
    d = json.loads((tmp_path / "smollm" / "generation_config.json").read_text())
    assert d == {"bos_token_id": 98, "eos_token_id": 98}


REFUSED = {
    "architecture": ({"arch": "gemma"}, "architecture 'gemma' is not supported; expected llama, qwen2, qwen3"),
    "experts": ({"expert_count": 8}, "expert_count = 8; only dense"),
    "partial": ({"rope.dimension_count": 6}, "rope.dimension_count = 6, expected the head size 12"),
    "scaling": ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "rope_type = 'longrope'"),
    "layers": ({"block_count": 3}, r"tensor 'blk.2.attn_norm.weight' is missing"),
    "more layers": ({"block_count": 1}, r"unexpected tensor 'blk.1.attn_k.bias'"),
    "shape": ({"feed_forward_length": 40}, r"'blk.0.ffn_gate.weight' has shape \[80, 48\].*\[40, 48\]"),
    "pre-tokenizer": ({"pre": "tekken"}, r"pre-tokenizer 'tekken' is not supported.*smollm, qwen2, llama-bpe"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_refused_by_name(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(InputError, match=rf"m.gguf: .*{message}"):
        import_gguf(write_gguf(tmp_path / "m.gguf", "qwen2_tied", **changes))


def test_damaged(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m.gguf", "qwen2_tied").read_bytes()
    for cut in (whole[:-400], whole[:3000], whole[:10], b"", b"PK\3\4" + whole):
        (tmp_path / "m.gguf").write_bytes(cut)
        with pytest.raises(InputError, match=r"m.gguf: not a whole GGUF file"):
            import_gguf(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"none.gguf: no such file"):
        import_gguf(tmp_path / "none.gguf")


def test_library_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"pip install 'opd-jax\[gguf\]'"):
        import_gguf(tmp_path / "m.gguf")
