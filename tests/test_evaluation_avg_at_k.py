"""``opd eval``: the numbers of a static batch and of a run's own evaluation; killed, stopped, and then resumed."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from opd_jax.config import Data
from opd_jax.config_files import parse_data
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError, Interrupted
from opd_jax.evaluation.answers import find_answer
from opd_jax.evaluation.avg_at_k import evaluate_model
from opd_jax.evaluation.benchmarks import parse_benchmarks
from opd_jax.evaluation.heldout import EVALUATION_STEP
from opd_jax.models.hf import load_model
from opd_jax.sampling.decode import make_engine
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import make_rollout
from opd_jax.tracking.writers import plain
from opd_jax.training.evaluate import Evaluator
from opd_jax.training.setup import prepare

TASK = f"task:{tiny_runs.TASK}"
SETTINGS = ("chat=false", "limit=24")
LIMIT, SAMPLES, LAW, SEED = 12, 4, Law(0.7, 0.95), 5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    """The task, and a file of other problems, as two benchmarks."""
    file = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"id": f"s{i}", "problem": f"{i} * 2 mod 5 ?", "answer": str(2 * i % 5)} for i in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_benchmarks([TASK, str(file), "template=plain", *SETTINGS])


def evaluate(models: Path, benchmarks: dict[str, Data], out: Path | None = None, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"samples": SAMPLES, "max_response": LIMIT, "law": LAW, "slots": 16, "seed": SEED}
    common |= {"dtype": "float32", "fallback_number": True, "out": out}  # in bf16 a token may flip with the slots
    return evaluate_model(models / "teacher", benchmarks, **common | changes)


@pytest.fixture(scope="module")
def whole(models: Path, two: dict[str, Data], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    assert evaluate(models, two, out) == json.loads((out / "result.json").read_text())
    return out


def rows(out: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    found = {(row["benchmark"], row["index"], row["sample"]): row for row in lines}
    assert len(found) == len(lines)
    return found


def test_responses_are_those_of_a_static_batch(models: Path, whole: Path) -> None:
    tokenizer = load_tokenizer(models / "teacher")
    data = parse_data(TASK, SETTINGS)
    records = load_records(data, SEED)
    prompts = stack_prompts(encode_prompts(records, tokenizer, data)[0], range(24), 6, samples=SAMPLES)
    params, network = load_model(models / "teacher")
    engine = make_engine(network, stop_ids=(1,), vocab_size=tiny_runs.VOCAB, support=1)
    rollout = make_rollout(engine, max_response=LIMIT)
    static = jax.device_get(rollout(engine.cast(params), prompts, LAW, SEED, EVALUATION_STEP))
    found = rows(whole)
    for i, (tokens, length, stopped) in enumerate(zip(static.tokens, static.lengths, static.stopped, strict=True)):
        record, row = records[i // SAMPLES], found[TASK, i // SAMPLES, i % SAMPLES]
        assert row["response"] == tokenizer.decode(tokens[:length].tolist(), skip_special_tokens=True)
        assert (row["tokens"], row["finish_reason"]) == (length, "stop" if stopped else "length")
        assert (row["id"], row["gold"]) == (record.id, record.answer)
        assert (row["answer"], row["found"]) == find_answer(row["response"], fallback_number=True)
        if row["answer"] is None or row["answer"].isdigit():
            assert row["correct"] == (row["answer"] == record.answer)

    result = json.loads((whole / "result.json").read_text())
    numbers = result["benchmarks"][TASK]
    mine = [row for key, row in found.items() if key[0] == TASK]
    assert (numbers["problems"], numbers["samples"]) == (24, SAMPLES)
    assert numbers["response_length"] == pytest.approx(np.mean(static.lengths))
    assert numbers["response_length_median"] == np.median(static.lengths)
    assert numbers["truncation_rate"] == pytest.approx(np.mean(~static.stopped))
    assert 0 < numbers["accuracy"] < 1
    assert numbers["accuracy"] == pytest.approx(np.mean([row["correct"] for row in mine]))
    assert numbers["no_answer_rate"] == pytest.approx(np.mean([row["answer"] is None for row in mine]))
    assert [p["correct"] for p in numbers["per_problem"]] == [
        sum(found[TASK, i, s]["correct"] for s in range(SAMPLES)) for i in range(24)
    ]
    assert set(numbers["pass_at_k"]) == set(numbers["maj_at_k"]) == {"1", "2", "4"}
    assert numbers["pass_at_k"]["1"]["mean"] == pytest.approx(numbers["accuracy"])
    page = (whole / "result.md").read_text()
    assert f"| {TASK} | 24 |" in page
    assert "| s4 | 3 |" in page


@pytest.mark.exhaustive
def test_a_benchmark_does_not_depend_on_the_others(models: Path, two: dict[str, Data], whole: Path) -> None:
    alone = evaluate(models, {"sums": two["sums"]}, slots=8)
    assert alone["benchmarks"]["sums"] == json.loads((whole / "result.json").read_text())["benchmarks"]["sums"]


def test_the_same_numbers_as_in_a_run(models: Path, whole: Path, tmp_path: Path) -> None:
    evaluation: dict[str, Any] = {"data": {"source": TASK, "chat": False, "limit": 24, "max_prompt": 8}}
    evaluation |= {"problems": 24, "samples": SAMPLES, "batch": 40, "max_response": LIMIT, "temperature": 0.7}
    evaluation |= {"top_p": 0.95, "fallback_number": True}
    config = tiny_runs.run_config(models, tmp_path / "run", seed=SEED, evaluation=evaluation, dtype="float32")
    setup = prepare(config)
    assert setup.teacher
    evaluator = Evaluator(setup)
    row, _ = evaluator.teacher(setup.teacher)
    evaluator.close()
    stored = json.loads((whole / "result.json").read_text())["benchmarks"][TASK]
    assert row.pop("who") == "teacher"
    assert set(stored) - set(row) == {"source", "sha256", "data", "dropped_prompts", "truncated_prompts", "per_problem"}
    assert plain(row) == {name: stored[name] for name in row}


@pytest.mark.exhaustive
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99, 1.0])
def test_killed_anywhere_it_is_completed(
    models: Path, two: dict[str, Data], whole: Path, tmp_path: Path, share: float
) -> None:
    lines = (whole / "responses.jsonl").read_bytes()
    (tmp_path / "responses.jsonl").write_bytes(lines[: int(share * len(lines))])
    (tmp_path / "settings.json").write_bytes((whole / "settings.json").read_bytes())
    evaluate(models, two, tmp_path, resume=True)
    assert rows(tmp_path) == rows(whole)
    for name in ("result.json", "result.md"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_the_same_seed_writes_the_same_files(models: Path, two: dict[str, Data], whole: Path, tmp_path: Path) -> None:
    evaluate(models, two, tmp_path)
    for file in whole.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.exhaustive
def test_greedy_responses_do_not_depend_on_the_seed(models: Path, two: dict[str, Data]) -> None:
    first, second = (
        evaluate(models, {"sums": two["sums"]}, samples=1, law=Law(0.0), seed=seed, slots=8) for seed in (1, 2)
    )
    assert first["benchmarks"] == second["benchmarks"]
    assert "pass_at_k" not in first["benchmarks"]["sums"]


def test_stop_keeps_what_is_graded(models: Path, two: dict[str, Data], whole: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted, match=r"stopped with \d+ responses finished; continue with --resume"):
        evaluate(models, two, tmp_path, stop=stop)
    assert 0 < len(rows(tmp_path)) < 112
    assert not (tmp_path / "result.json").exists()
    with pytest.raises(InputError, match=r"responses\.jsonl: exists\. Continue it with --resume"):
        evaluate(models, two, tmp_path)
    with pytest.raises(InputError, match=r"settings differ(.|\n)*  temperature: it was begun with 0\.7, now 0\.8"):
        evaluate(models, two, tmp_path, law=Law(0.8, 0.95), resume=True)
    with pytest.raises(InputError, match=r"settings differ(.|\n)*  sums: it was begun with"):
        evaluate(models, two, tmp_path, problems=2, resume=True)
    evaluate(models, two, tmp_path, resume=True)
    assert rows(tmp_path) == rows(whole)


@pytest.mark.exhaustive
def test_responses_no_longer_than_the_positions(models: Path, two: dict[str, Data]) -> None:
    """The tiny models have 64 positions, the prompts 6 tokens or more."""
    assert evaluate(models, two, samples=1, problems=1, slots=8, max_response=None)["settings"]["max_response"] == 58
