"""``opd eval``: accuracy of a model on problems with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from opd_jax.config import Data
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import check_vocabulary, load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.evaluation import heldout
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.scores import avg_at_k, pass_at_k
from opd_jax.mesh import Layout, make_mesh
from opd_jax.models.hf import load_model
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.tracking.console import console

Row = dict[str, Any]


def evaluate_model(
    model: Path,
    data: Data,
    *,
    samples: int,
    problems: int | None,
    max_response: int,
    temperature: float,
    top_p: float,
    batch: int,
    seed: int,
    fallback_number: bool,
) -> tuple[Row, list[Row]]:
    """avg@k and pass@k with intervals over problems, response length, truncation; and every graded response.

    Raises:
        InputError: the model, its tokenizer or the problems cannot be read, or problems lack answers.
    """
    tokenizer = load_tokenizer(model)
    vocab_size = valid_vocab_size(tokenizer)
    records = load_records(data, seed, require_answer=True)
    encoded, records, overlong = encode_prompts(records, tokenizer, data)
    encoded, records = encoded[:problems], records[:problems]
    layout = Layout(make_mesh())
    params, config = load_model(model, layout)
    check_vocabulary(model, config.vocab_size, vocab_size)
    width = max(map(len, encoded))
    prompts = stack_prompts(encoded, range(len(encoded)), width, samples)
    ways = layout.mesh.size
    rows = -(-min(batch, len(prompts.lengths)) // ways) * ways
    panel = heldout.make_panel(prompts, [r.problem for r in records], [r.answer for r in records], rows)
    rollout = make_rollout(
        config,
        max_response=max_response,
        stop_ids=stop_ids(model, tokenizer),
        vocab_size=vocab_size,
        support=1,
        dtype=jnp.bfloat16,
        layout=layout,
    )
    parts = []
    with console.progress(len(panel.batches), "generating", unit="batch", show=("tokens_per_second",)) as bar:
        for rollouts in heldout.sample_panel(rollout, params, panel, Law(temperature, top_p), seed):
            parts.append(jax.device_get(rollouts))
            bar.advance()
    sampled = heldout.collect(parts, panel)
    texts = heldout.responses(sampled, tokenizer)
    with AnswerPool(fallback_number=fallback_number) as pool:
        correct = heldout.grade_rows(panel, texts, pool.grade)
    assert correct is not None
    score, best = avg_at_k(correct, seed), pass_at_k(correct, samples, seed)
    result: Row = {
        "model": str(model),
        "source": data.source,
        "dropped_prompts": overlong.dropped,
        "truncated_prompts": overlong.truncated,
        "accuracy": score.mean,
        "accuracy_se": score.error,
        "accuracy_interval": [score.low, score.high],
        "pass_at_k": best.mean,
        "pass_at_k_se": best.error,
    } | heldout.summarise_lengths(sampled, panel)
    console.table(
        f"{model} on {data.source}: {len(records)} problems{overlong.note()}",
        [f"avg@{samples}", "95 % interval", f"pass@{samples}", "length", "truncated"],
        [
            [
                (score.mean, score.error),
                f"{score.low:.3f} – {score.high:.3f}",
                (best.mean, best.error),
                result["response_length"],
                result["truncation_rate"],
            ]
        ],
    )
    graded = zip(texts, correct.reshape(-1).tolist(), strict=True)
    rows_out = [
        {"id": records[i // samples].id, "sample": i % samples, "answer": records[i // samples].answer}
        | {"response": text, "correct": right}
        for i, (text, right) in enumerate(graded)
    ]
    return result, rows_out
