"""``opd eval`` samples by continuous batching: the responses are those of one static batch."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from opd_jax.config import parse_data
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.evaluation import avg_at_k, heldout
from opd_jax.generate import load_sampler
from opd_jax.models.hf import load_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import make_rollout


@pytest.mark.exhaustive
def test_responses_are_those_of_a_static_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_runs.write_models(tmp_path) / "teacher"
    data = parse_data(f"task:{tiny_runs.TASK}", ["chat=false", "limit=24"])
    # bf16 flips a token where its uniform lies near an edge of the CDF
    monkeypatch.setattr(avg_at_k, "load_sampler", lambda m, t, dtype: load_sampler(m, t, jnp.float32))
    result, rows = avg_at_k.evaluate_model(
        model, data, samples=4, problems=None, max_response=12, temperature=0.7, top_p=0.95, batch=16, seed=5,
        fallback_number=False,
    )  # fmt: skip

    tokenizer = load_tokenizer(model)
    records = load_records(data, 5)
    prompts = stack_prompts(encode_prompts(records, tokenizer, data)[0], range(24), 6, samples=4)
    params, network = load_model(model)
    engine = make_engine(network, stop_ids=(1,), vocab_size=tiny_runs.VOCAB, support=1)
    rollout = make_rollout(engine, max_response=12)
    static = jax.device_get(rollout(engine.cast(params), prompts, Law(0.7, 0.95), 5, heldout.EVALUATION_STEP))
    assert [row["response"] for row in rows] == heldout.responses(static, tokenizer)
    assert [(row["id"], row["sample"]) for row in rows] == [(r.id, s) for r in records for s in range(4)]
    assert (result["problems"], result["samples"]) == (24, 4)
    assert result["response_length"] == pytest.approx(np.mean(static.lengths))
    assert result["truncation_rate"] == pytest.approx(np.mean(~static.stopped))
    assert result["accuracy"] == pytest.approx(np.mean([row["correct"] for row in rows]))
