"""GGUF in: dequantised weights, configuration and tokenizer of llama and qwen files (library ``gguf``)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from opd_jax.errors import InputError
from opd_jax.models.decoder import DecoderConfig, layer_specs, parameter_specs
from opd_jax.models.families import config_from_hf
from opd_jax.types import Params

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TOP_NAMES = {"embed": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
LAYER_NAMES = {
    "attention_norm": "attn_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "o": "attn_output.weight",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    **{n: f"attn_{n}.weight" for n in "qkv"},
    **{f"{n}_bias": f"attn_{n}.bias" for n in "qkv"},
}
ROPE_FACTORS = "rope_freqs.weight"
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # GGUF token types

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each vocabulary splits text before merging, as in the tokenizer.json of the models that the name stands for.
SPLITS: dict[str, Callable[[], list[Any]]] = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": lambda: _split(r"\p{N}"),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
}


def _split(digits: str) -> list[Any]:
    pattern = Regex(_CONTRACTIONS + _WORDS + digits + _REST)
    return [
        pre_tokenizers.Split(pattern, behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


class Imported(NamedTuple):
    """What a GGUF file holds: float32 NumPy weights, the decoder, and a function that writes the tokenizer's files."""

    params: Params
    config: DecoderConfig
    write_tokenizer: Callable[[Path], None]


def import_gguf(path: str | Path) -> Imported:
    """Reads a GGUF file; quantised weights are expanded to float32.

    Raises:
        InputError: library ``gguf`` absent, damaged file, another architecture, a tensor missing, unexpected, ill-
            shaped or of a quantisation that cannot be expanded, a tokenizer of another kind.
    """
    file = Path(path)
    metadata, tensors = _open(file)
    config = _config(metadata, tensors)
    tokenizer = _tokenizer(metadata)
    return Imported(_weights(file, tensors, config), config, lambda target: _write(target, metadata, tokenizer))


def _open(file: Path) -> tuple[_Metadata, dict[str, Any]]:
    try:
        import gguf
    except ImportError as e:
        raise InputError("reading .gguf files needs the library 'gguf': pip install 'opd-jax[gguf]'") from e
    try:
        reader = gguf.GGUFReader(file)
        fields = {k: field.contents() for k, field in reader.fields.items()}
    except FileNotFoundError as e:
        raise InputError(f"{file}: no such file") from e
    except Exception as e:  # the library raises whatever its parsing trips over
        raise InputError(f"{file}: not a whole GGUF file ({e}). Fetch it again.") from e
    return _Metadata(file, fields), {t.name: t for t in reader.tensors}


class _Metadata(NamedTuple):
    file: Path
    fields: dict[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.fields.get(key, default)
        return float(str(np.float32(value))) if isinstance(value, float) else value  # 1e-05, not 9.99999975e-06

    def need(self, key: str) -> Any:
        if key not in self.fields:
            raise InputError(f"{self.file}: metadata '{key}' is missing")
        return self.get(key)


def _config(m: _Metadata, tensors: dict[str, Any]) -> DecoderConfig:
    arch = m.need("general.architecture")
    if arch not in ARCHITECTURES:
        raise InputError(f"{m.file}: architecture '{arch}' is not supported; expected {', '.join(ARCHITECTURES)}")
    if m.get(f"{arch}.expert_count"):
        raise InputError(f"{m.file}: {arch}.expert_count = {m.get(f'{arch}.expert_count')}; only dense models are read")
    heads, width = m.need(f"{arch}.attention.head_count"), m.need(f"{arch}.embedding_length")
    head_dim = m.get(f"{arch}.attention.key_length", width // heads)
    rotary = m.get(f"{arch}.rope.dimension_count", head_dim)
    if rotary != head_dim:
        raise InputError(f"{m.file}: {arch}.rope.dimension_count = {rotary}, expected the head size {head_dim}")
    d = {
        "model_type": arch,
        "vocab_size": len(m.need("tokenizer.ggml.tokens")),
        "hidden_size": width,
        "intermediate_size": m.need(f"{arch}.feed_forward_length"),
        "num_hidden_layers": m.need(f"{arch}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": m.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": m.need(f"{arch}.context_length"),
        "rms_norm_eps": m.need(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": m.get(f"{arch}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(m, arch, tensors),
        "tie_word_embeddings": TOP_NAMES["head"] not in tensors,
    }
    return config_from_hf(d, str(m.file))


def _rope_scaling(m: _Metadata, arch: str, tensors: dict[str, Any]) -> dict[str, Any] | None:
    if ROPE_FACTORS in tensors:
        raise InputError(
            f"{m.file}: tensor '{ROPE_FACTORS}' (llama3 RoPE scaling, whose parameters a GGUF file does not hold) is "
            "not supported; import the model's safetensors instead"
        )
    kind = m.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": m.need(f"{arch}.rope.scaling.factor")}
    original = m.get(f"{arch}.rope.scaling.original_context_length")
    return scaling if original is None else scaling | {"original_max_position_embeddings": original}


def _weights(file: Path, tensors: dict[str, Any], c: DecoderConfig) -> Params:
    import gguf

    left = dict(tensors)

    def read(name: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise InputError(f"{file}: tensor '{name}' is missing for a {c.family} model of {c.layers} layers")
        tensor = left.pop(name)
        try:
            w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        except NotImplementedError as e:
            raise InputError(f"{file}: tensor '{name}' has type {tensor.tensor_type.name}, which is not read") from e
        if w.size != np.prod(shape):
            raise InputError(f"{file}: tensor '{name}' has shape {list(w.shape)}; the metadata implies {list(shape)}")
        if c.family == "llama" and key in ("q", "k"):
            # llama.cpp pairs neighbouring dimensions where Hugging Face pairs halves
            heads, size, width = shape
            w = w.reshape(heads, size // 2, 2, width).swapaxes(1, 2)
        return w.reshape(shape)

    layers = {}
    for key, spec in layer_specs(c).items():
        stacked = layers[key] = np.empty((c.layers, *spec.shape), np.float32)
        for i in range(c.layers):
            stacked[i] = read(f"blk.{i}.{LAYER_NAMES[key]}", key, spec.shape)
    specs = parameter_specs(c)
    params = {key: read(name, key, specs[key].shape) for key, name in TOP_NAMES.items() if key in specs}
    if left:
        raise InputError(f"{file}: unexpected tensor '{min(left)}' for a {c.family} model")
    return params | {"layers": layers}


def _tokenizer(m: _Metadata) -> Tokenizer:
    kind, split = m.need("tokenizer.ggml.model"), m.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or split not in SPLITS:
        raise InputError(
            f"{m.file}: tokenizer '{kind}' with pre-tokenizer '{split}' is not supported; expected 'gpt2' with one of "
            f"{', '.join(SPLITS)}"
        )
    tokens, types = m.need("tokenizer.ggml.tokens"), m.need("tokenizer.ggml.token_type")
    # unused ids pad the embedding table; as tokens they could be encoded
    vocab = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != UNUSED}
    merges = [tuple(pair.split(" ", 1)) for pair in m.need("tokenizer.ggml.merges")]
    try:
        tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=split == "llama-bpe"))
    except Exception as e:  # the library raises a plain Exception for merges outside the vocabulary
        raise InputError(f"{m.file}: the tokenizer's vocabulary and merges do not fit each other ({e})") from e
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split]())
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    plain = [t for t, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if m.get("tokenizer.ggml.add_bos_token", split == "llama-bpe"):
        bos = m.need("tokenizer.ggml.bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _write(target: Path, m: _Metadata, tokenizer: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json, as transformers reads them."""
    tokens = m.need("tokenizer.ggml.tokens")
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {short: m.get(f"tokenizer.ggml.{long}_token_id") for short, long in names.items()}
    ids = {short: i for short, i in ids.items() if i is not None and i < len(tokens)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": m.need(f"{m.need('general.architecture')}.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{short}_token": tokens[i] for short, i in ids.items()},
    }
    if template := m.get("tokenizer.chat_template"):
        config["chat_template"] = template
    generation: dict[str, Any] = {f"{short}_token_id": i for short, i in ids.items() if short != "unk"}
    end_of_turn = m.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and end_of_turn != ids.get("eos"):
        generation["eos_token_id"] = [i for i in (ids.get("eos"), end_of_turn) if i is not None]
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    for name, content in {"tokenizer_config.json": config, "generation_config.json": generation}.items():
        (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
