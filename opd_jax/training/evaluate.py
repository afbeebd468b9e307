"""Evaluation of a run on its held-out panel: the student at any step, the teacher once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax import hosts
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.errors import InputError
from opd_jax.evaluation import heldout
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.mesh import batch_shards
from opd_jax.models.decoder import DecoderConfig
from opd_jax.sampling.law import Law
from opd_jax.tracking.console import console
from opd_jax.training.setup import Network, Setup
from opd_jax.types import Params, Rollouts

Row = dict[str, Any]


class Evaluator:
    """Built once per run. The teacher's own rollouts are made on first use and kept: a fixed yardstick, on which the
    forward KL shows what a collapse of the student onto few tokens would hide in the reverse KL."""

    def __init__(self, setup: Setup):
        settings = setup.config.evaluation
        assert settings.data is not None
        records = load_records(settings.data, seed=setup.config.seed)
        encoded, records, _ = encode_prompts(records, setup.tokenizer, settings.data)
        if len(records) < settings.problems:
            console.warn(
                f"evaluation: {len(records)} prompts fit, evaluation.problems={settings.problems} were asked for"
            )
        encoded, records = encoded[: settings.problems], records[: settings.problems]
        prompts = stack_prompts(encoded, range(len(encoded)), settings.data.max_prompt, settings.samples)
        problems, answers = [r.problem for r in records], [r.answer for r in records]
        if setup.config.checkpoint.best == "accuracy" and None in answers:
            raise InputError(
                f"checkpoint.best=accuracy: {settings.data.title} has problems without an answer. Set "
                "evaluation.data.answer=COLUMN, or checkpoint.best=reverse_kl."
            )
        self.panel = heldout.make_panel(prompts, problems, answers, settings.batch, batch_shards(setup.layout))
        self._setup = setup
        self._law = Law(settings.temperature, settings.top_p)
        self._max_response = settings.max_response or setup.config.rollout.max_response
        self._reference: Rollouts | None = None
        self._shown = min(setup.config.log_samples * self.panel.samples, self.panel.rows)
        self._pool = AnswerPool(fallback_number=settings.fallback_number)

    def student(self, params: Params) -> tuple[Row, list[Row]]:
        """(evaluation row, sample rows) of the student with these weights."""
        rollouts = self._rollouts("evaluating the student", self._setup.student, params)
        measured, by_token = self._measured(params, rollouts) if self._setup.teacher else ({}, ())
        of_teacher = self._measured(params, self._reference)[0] if self._reference else {}
        row, samples = self._graded("student", rollouts, by_token)
        if measured:
            row |= heldout.mean_metrics(measured, self.panel)
        if of_teacher:
            name = "forward_kl_teacher_rollouts"
            means = heldout.mean_metrics(of_teacher, self.panel, ["forward_kl"])
            row |= {name: means["forward_kl"], name + "_se": means["forward_kl_se"]}
        return row, samples

    def teacher(self, teacher: Network) -> tuple[Row, list[Row]]:
        """(evaluation row, sample rows) of the teacher; keeps its rollouts for ``student``."""
        self._reference = self._rollouts("evaluating the teacher", teacher.config, teacher.params)
        return self._graded("teacher", self._reference)

    def close(self) -> None:
        self._pool.__exit__()

    def _rollouts(self, title: str, network: DecoderConfig, params: Params) -> Rollouts:
        engine = self._setup.graphs.engine(network)
        return heldout.sample_panel(
            engine, engine.cast(params), self.panel, self._law, self._setup.config.seed, self._max_response, title
        )

    def _measured(self, params: Params, rollouts: Rollouts) -> tuple[Any, list[Row]]:
        """Sums over each row of the metrics of student against teacher; what is known of tokens of the first rows."""
        setup = self._setup
        assert setup.teacher
        assert setup.graphs.score
        found, first, n = [], {}, len(self.panel.batches[0])
        for part, of_panel in zip(heldout.batches_of(rollouts, self.panel), self.panel.batches, strict=True):
            rows = setup.layout.put_rows(setup.graphs.pack(part))
            scores = setup.graphs.score(setup.teacher.params, rows)
            sums, tokens = setup.graphs.measure(params, rows, scores.hidden, scores.head)
            found.append(jax.tree.map(lambda x: x[:n], hosts.fetch(sums)))
            # the rows of a batch ascend: those to be shown come first
            if shown := np.flatnonzero(of_panel < self._shown).tolist():
                tokens = hosts.fetch(tokens)
                first |= {int(of_panel[i]): {name: x[i] for name, x in tokens.items()} for i in shown}
        return heldout.collect(found, self.panel), [first[i] for i in range(self._shown)]

    def _graded(self, who: str, rollouts: Rollouts, by_token: Sequence[Row] = ()) -> tuple[Row, list[Row]]:
        """``by_token``: of the first rows, what ``heldout.BY_TOKEN`` lists."""
        whole = dataclasses.replace(rollouts, tokens=hosts.fetch(self._setup.layout.put_rows(rollouts.tokens)))
        if jax.process_index():
            return {}, []  # process 0 grades and writes
        panel, tokenizer = self.panel, self._setup.tokenizer
        row, texts, verdicts = heldout.grade_panel(whole, panel, tokenizer, self._pool)
        samples = [
            {
                "who": who,
                "problem": panel.problems[i // panel.samples],
                "answer": panel.answers[i // panel.samples],
                "response": texts[i],
                "correct": verdicts and verdicts[i].correct,
            }
            | (heldout.token_row(whole.tokens[i, : whole.lengths[i]], by_token[i], tokenizer) if by_token else {})
            for i in range(self._shown)
        ]
        return {"who": who} | row, samples
