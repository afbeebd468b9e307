"""``opd eval``: avg@k and its kin of a model on benchmarks, every response in a file as soon as it is graded.

All problems × k of all benchmarks go through one queue of continuous batching. A token's random number depends on
(seed, index of the problem in its benchmark, sample, position) alone: not on other benchmarks, slots, or a kill.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from opd_jax import __version__
from opd_jax.config import Data
from opd_jax.data.tokenizers import load_tokenizer
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool, Verdict
from opd_jax.evaluation.benchmarks import Problems, load_problems
from opd_jax.evaluation.heldout import EVALUATION_STEP
from opd_jax.evaluation.summary import columns, markdown, summarise_lengths, summarise_verdicts, table_rows
from opd_jax.generate import (
    SHOWN,
    Lines,
    Meter,
    all_requests,
    check_finite,
    check_target,
    fingerprint,
    load_sampler,
    read_finished,
    refused_writes,
)
from opd_jax.models.hf import load_config
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import Request, Response, generate
from opd_jax.tracking.console import console
from opd_jax.tracking.run_dir import write_atomically
from opd_jax.tracking.writers import plain

PAPER_LAW = Law(0.7, 0.95)  # paper.md, default set-up, as all of these
PAPER_SAMPLES = 16
PAPER_RESPONSE = 31_744  # tokens

Row = dict[str, Any]
Key = tuple[str, int, int]  # benchmark, index of the problem, sample


class Graded(NamedTuple):
    """A response that is done with."""

    verdict: Verdict
    tokens: int
    stopped: bool


def evaluate_model(
    model: Path,
    benchmarks: Mapping[str, Data],
    *,
    samples: int = PAPER_SAMPLES,
    problems: int | None = None,
    max_response: int | None = None,
    law: Law = PAPER_LAW,
    slots: int = 64,
    seed: int = 0,
    dtype: str = "bfloat16",
    fallback_number: bool = False,
    out: Path | None = None,
    resume: bool = False,
    stop: threading.Event | None = None,
) -> Row:
    """The numbers of a model on benchmarks (name → data section), with those of every problem.

    Args:
        problems: the first so many of each; None: all.
        max_response: tokens; None: 31,744, or what the model's positions leave beside the longest prompt.
        out: a directory for settings.json, responses.jsonl, result.json and result.md; None: no files.
        resume: make only the responses that ``out`` lacks.

    Raises:
        InputError: the model, its tokenizer or the problems cannot be read, problems lack answers, ``out`` holds
            another evaluation, or a full disk: ``out`` keeps all responses that were graded.
        Interrupted: ``stop`` was set; ``resume`` then makes the responses that are missing.
    """
    files = _Files(out) if out else None
    if files:
        check_target(files.lines, files.settings, resume)
    tokenizer = load_tokenizer(model)
    sets = load_problems(benchmarks, tokenizer, seed, problems)
    max_response = max_response or _default_length(model, max(len(t) for each in sets for t in each.encoded))
    settings = _settings(model, sets, samples, max_response, law, seed, dtype, fallback_number)
    done: dict[Key, Graded] = {}
    size = 0
    if resume and files:
        done, size = read_finished(files.lines, files.settings, settings, _read_line)
    asked = [(each, request) for each in sets for request in all_requests(each.encoded, samples)]
    missing = [(each, r) for each, r in asked if (each.name, r.id, r.sample) not in done]
    sampler = load_sampler(model, tokenizer, jnp.dtype(dtype))
    slots = sampler.slots(slots, len(missing))
    _announce(sets, samples, max_response, law, slots, len(done) if resume else None)
    with contextlib.ExitStack() as stack:
        lines = None
        if files:
            stack.enter_context(refused_writes(files.lines, files.settings, done))
            files.settings.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                _write_json(files.settings, settings)
            lines = stack.enter_context(Lines(files.lines, size))
        bar = stack.enter_context(console.progress(len(asked), "evaluating", len(done), unit="response", show=SHOWN))
        grading = _Grading(stack.enter_context(AnswerPool(fallback_number=fallback_number)), lines, done)
        meter = Meter(bar, len(done), stop)
        made = generate(
            sampler.engine, sampler.weights, [r for _, r in missing], law, seed, EVALUATION_STEP,
            slots=slots, max_response=max_response, occupancy=meter,
        )  # fmt: skip
        try:
            for index, response in made:
                grading.add(*missing[index], response, tokenizer)
        finally:
            grading.finish()
        bar.update(len(done), meter.row())
        result = _result(settings, sets, samples, done)
        if files:
            _write_json(files.result, result)
            write_atomically(epath.Path(files.tables), markdown(result))
    console.table(str(model), columns(samples), table_rows(result["benchmarks"]))
    return result


class _Files:
    """What stands in the directory of an evaluation."""

    def __init__(self, out: Path):
        self.settings, self.lines = out / "settings.json", out / "responses.jsonl"
        self.result, self.tables = out / "result.json", out / "result.md"


class _Grading:
    """Verdicts are reached beside the sampling; lines are written in the order in which responses ended."""

    def __init__(self, pool: AnswerPool, lines: Lines | None, done: dict[Key, Graded]):
        self._pool, self._lines, self._done = pool, lines, done
        self._pending: deque[tuple[Key, Row, Future[Verdict]]] = deque()

    def add(self, each: Problems, request: Request, response: Response, tokenizer: Any) -> None:
        record = each.records[request.id]
        check_finite(record, response)
        text = tokenizer.decode(response.tokens.tolist(), skip_special_tokens=True)
        row: Row = {"benchmark": each.name, "index": request.id, "id": record.id, "sample": request.sample}
        row |= {"response": text, "tokens": response.length, "finish_reason": "stop" if response.stopped else "length"}
        key = each.name, request.id, request.sample
        self._pending.append((key, row | {"gold": record.answer}, self._pool.submit(text, str(record.answer))))
        while self._pending and self._pending[0][2].done():
            self._write()

    def finish(self) -> None:
        while self._pending:
            self._write()

    def _write(self) -> None:
        key, row, future = self._pending.popleft()
        verdict = future.result()
        if self._lines:
            self._lines.write(row | verdict._asdict())
        self._done[key] = Graded(verdict, row["tokens"], row["finish_reason"] == "stop")


def _read_line(row: Row) -> tuple[Key, Graded]:
    verdict = Verdict(row["correct"], row["answer"], row["found"])
    return (row["benchmark"], row["index"], row["sample"]), Graded(
        verdict, row["tokens"], row["finish_reason"] == "stop"
    )


def _default_length(model: Path, longest_prompt: int) -> int:
    left = load_config(model).max_positions - longest_prompt
    if left < 1:
        raise InputError(
            f"{model}: has positions for {left + longest_prompt:,} tokens; a prompt has {longest_prompt:,}."
        )
    return min(PAPER_RESPONSE, left)


def _settings(
    model: Path,
    sets: Sequence[Problems],
    samples: int,
    max_response: int,
    law: Law,
    seed: int,
    dtype: str,
    fallback_number: bool,
) -> Row:
    settings: Row = {"model": str(model), "model_fingerprint": fingerprint(model), "samples": samples}
    settings |= {"max_response": max_response, **law._asdict(), "seed": seed, "dtype": dtype}
    settings |= {"fallback_number": fallback_number}
    for each in sets:
        data = each.data.model_dump(mode="json", exclude_defaults=True)
        settings[each.name] = {
            "source": each.source,
            "problems": len(each.records),
            "sha256": each.sha256,
            "data": data,
        }
    return settings


def _result(settings: Row, sets: Sequence[Problems], samples: int, done: Mapping[Key, Graded]) -> Row:
    names = [each.name for each in sets]
    return {
        "settings": {name: value for name, value in settings.items() if name not in names},
        "versions": {"opd_jax": __version__, "jax": jax.__version__},
        "benchmarks": {
            each.name: settings[each.name]
            | {"dropped_prompts": each.overlong.dropped, "truncated_prompts": each.overlong.truncated}
            | _numbers(each, samples, done)
            for each in sets
        },
    }


def _numbers(each: Problems, samples: int, done: Mapping[Key, Graded]) -> Row:
    rows = [done[each.name, i, s] for i in range(len(each.records)) for s in range(samples)]
    numbers = summarise_lengths([r.tokens for r in rows], [r.stopped for r in rows], samples)
    numbers |= summarise_verdicts([r.verdict for r in rows], samples)
    of_problem = [rows[i * samples : (i + 1) * samples] for i in range(len(each.records))]
    numbers["per_problem"] = [
        {
            "id": record.id,
            "gold": record.answer,
            "correct": sum(r.verdict.correct for r in mine),
            "response_length": sum(r.tokens for r in mine) / samples,
            "truncated": sum(not r.stopped for r in mine),
            "no_answer": sum(r.verdict.answer is None for r in mine),
        }
        for record, mine in zip(each.records, of_problem, strict=True)
    ]
    return numbers


def _announce(
    sets: Sequence[Problems], samples: int, max_response: int, law: Law, slots: int, resumed: int | None
) -> None:
    for each in sets:
        notes = each.overlong.note()
        console.print(
            f"{each.name}: {len(each.records):,} problems{notes} of {each.source}, sha256 {each.sha256[:16]}…"
        )
    law_text = "greedy" if law.temperature == 0 else f"temperature {law.temperature:g}, top-p {law.top_p:g}"
    again = "" if resumed is None else f"; resumed with {resumed:,} done"
    console.print(f"{samples} responses each, {law_text}, at most {max_response:,} tokens, {slots} slots{again}")


def _write_json(path: Path, value: Row) -> None:
    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(epath.Path(path), text)
