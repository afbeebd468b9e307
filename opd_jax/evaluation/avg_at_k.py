"""``opd eval``: accuracy of a model on problems with answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from opd_jax.config import Data
from opd_jax.data.pipeline import encode_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.evaluation import heldout
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.scores import avg_at_k, pass_at_k
from opd_jax.generate import SHOWN, Meter, all_requests, load_sampler
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import generate
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
    records = load_records(data, seed, require_answer=True)
    encoded, records, overlong = encode_prompts(records, tokenizer, data)
    encoded, records = encoded[:problems], records[:problems]
    sampler = load_sampler(model, tokenizer, jnp.bfloat16)
    requests = all_requests(encoded, samples)
    rows = len(requests)
    lengths, stopped, texts = np.zeros(rows, int), np.zeros(rows, bool), [""] * rows
    with console.progress(rows, "generating", unit="response", show=SHOWN) as bar:
        meter = Meter(bar)
        made = generate(
            sampler.engine, sampler.weights, requests, Law(temperature, top_p), seed, heldout.EVALUATION_STEP,
            slots=sampler.slots(batch, rows), max_response=max_response, occupancy=meter,
        )  # fmt: skip
        for row, response in made:
            lengths[row], stopped[row] = len(response.tokens), response.stopped
            texts[row] = tokenizer.decode(response.tokens.tolist(), skip_special_tokens=True)
            meter.finished += 1
        bar.update(rows, meter.row())
    panel = heldout.Panel((), rows, samples, tuple(r.problem for r in records), tuple(r.answer for r in records))
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
    } | heldout.summarise_lengths(lengths, stopped, panel)
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
