"""A real model, SmolLM2-135M-Instruct: its GGUF, imported, against transformers reading the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
from transformers import AutoTokenizer

from opd_jax.checkpoints.importing import import_model
from opd_jax.models.decoder import forward, head, unembed
from opd_jax.models.hf import checkpoint_tensors, load_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Request, generate

pytestmark = pytest.mark.smollm2
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("smollm2") / "model"
    import_model(str(smollm2.gguf_file()), out)
    return out


@pytest.fixture(scope="module")
def logits(imported: Path) -> list[np.ndarray]:
    """Logits of the real tokens of each prompt; prompts are padded on the left into one batch."""
    params, config = load_model(imported)
    with np.load(smollm2.GOLDEN / "smollm2.npz") as golden:
        rows = [golden[f"tokens_{i}"] for i in range(len(smollm2.PROMPTS))]
    width = max(len(r) for r in rows)
    tokens, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for i, r in enumerate(rows):
        at = slice(width - len(r), width)
        tokens[i, at], positions[i, at], segments[i, at] = r, np.arange(len(r)), 1
    run = jax.jit(lambda p, *batch: unembed(forward(p, config, *batch), head(p)))
    out = np.asarray(run(params, tokens, positions, segments))
    return [x[width - len(r) :] for x, r in zip(out, rows, strict=True)]


def test_logits_match_golden(logits: list[np.ndarray]) -> None:
    with np.load(smollm2.GOLDEN / "smollm2.npz") as golden:
        for i, x in enumerate(logits):
            np.testing.assert_allclose(x[-1, golden[f"ids_{i}"]], golden[f"logits_{i}"], rtol=0, atol=TOLERANCE)
            assert x[-1].argmax() == golden[f"ids_{i}"][0]


def test_tokenizer_matches_golden(imported: Path) -> None:
    golden = json.loads((smollm2.GOLDEN / "smollm2_tokenizer.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(imported)
    for text, ids in zip(smollm2.TEXTS, golden["tokens"], strict=True):
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text
    for messages, chat in zip(smollm2.MESSAGES, golden["chats"], strict=True):
        assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    config = json.loads((imported / "config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (2, 2, 1)


@pytest.mark.torch
def test_live_oracle(imported: Path, logits: list[np.ndarray]) -> None:
    """Weights equal bit by bit; logits at every position; the exported directory in transformers gives the same."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    file = smollm2.gguf_file()
    oracle = smollm2.oracle_model(file)
    again = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32).eval()
    state = again.state_dict()
    for name, expected in oracle.state_dict().items():
        assert torch.equal(state[name], expected), name
    params, config = load_model(imported)
    for t in checkpoint_tensors(config):
        np.testing.assert_array_equal(np.asarray(t.take(params)), state[t.name].numpy(), err_msg=t.name)
    tokenizer: Any = smollm2.oracle_tokenizer(file)
    ours = AutoTokenizer.from_pretrained(imported)
    for text in smollm2.TEXTS:
        assert ours(text)["input_ids"] == tokenizer(text)["input_ids"], text
    worst = 0.0
    for text, got in zip(smollm2.PROMPTS, logits, strict=True):
        with torch.no_grad():
            expected = oracle(torch.tensor([tokenizer(text)["input_ids"]])).logits[0].numpy()
        worst = max(worst, float(np.abs(got - expected).max()))
    print(f"largest difference of a logit: {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.torch
def test_greedy_equals_transformers(imported: Path) -> None:
    """Ten prompts, 64 tokens, fp32; a row may part from transformers where its two best logits are within 1e-3."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    oracle: Any = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(imported)
    texts = [*smollm2.PROMPTS, *(f"Write the number {n} in words:" for n in (7, 21, 300, 4096, 50_000))]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    params, config = load_model(imported)
    engine = make_engine(config, stop_ids=(2,), vocab_size=49_152, support=2, dtype=jnp.float32, layout=None)
    asked = [Request(ids, i, 0) for i, ids in enumerate(prompts)]
    ties = 0
    for i, response in generate(engine, engine.cast(params), asked, Law(0.0), 0, 0, slots=4, max_response=64):
        with torch.no_grad():
            out = oracle.generate(torch.tensor([prompts[i]]), do_sample=False, max_new_tokens=64, eos_token_id=2)
        want = out[0, len(prompts[i]) :].numpy()
        n = min(len(want), len(response.tokens))
        differ = np.flatnonzero(response.tokens[:n] != want[:n])
        if differ.size:
            best = response.topk_logp[differ[0]]
            assert best[0] - best[1] < 1e-3, texts[i]
            ties += 1
        else:
            assert len(want) == len(response.tokens)
    print(f"rows that part at a tie: {ties} of {len(texts)}")
