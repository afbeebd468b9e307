"""Evaluation of a run on its held-out panel: the student at any step, the teacher once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from opd_jax import hosts
from opd_jax.data.pipeline import encode_prompts, stack_prompts
from opd_jax.data.sources import load_records
from opd_jax.errors import InputError
from opd_jax.evaluation import heldout
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.scores import avg_at_k
from opd_jax.models.decoder import DecoderConfig
from opd_jax.sampling.law import Law
from opd_jax.sampling.scheduler import make_rollout
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
                f"checkpoint.best=accuracy: {settings.data.source} has problems without an answer. Set "
                "evaluation.data.answer=COLUMN, or checkpoint.best=reverse_kl."
            )
        ways = setup.layout.mesh.shape["data"] * setup.layout.mesh.shape["fsdp"]
        rows = min(settings.batch, len(encoded) * settings.samples)
        self.panel = heldout.make_panel(prompts, problems, answers, -(-rows // ways) * ways)
        self._setup = setup
        self._law = Law(settings.temperature, settings.top_p)
        self._max_response = settings.max_response or setup.config.rollout.max_response
        self._reference: list[Rollouts] = []
        self._shown = min(setup.config.log_samples * self.panel.samples, self.panel.rows)
        self._pool = AnswerPool()

    def student(self, params: Params) -> tuple[Row, list[Row]]:
        """(evaluation row, sample rows) of the student with these weights."""
        batches, measured, shown = [], [], []
        with self._progress("evaluating the student") as bar:
            for rollouts in self._rollouts(self._setup.student, params):
                batches.append(rollouts)
                if self._setup.teacher:
                    sums, kl_BR = self._measured(params, rollouts)
                    measured.append(sums)
                    if len(shown) < self._shown:
                        shown += list(hosts.fetch(kl_BR))
                bar.advance()
        of_teacher = [self._measured(params, rollouts)[0] for rollouts in self._reference]
        row, samples = self._graded("student", batches, shown)
        if measured:
            row |= heldout.mean_metrics(heldout.collect(measured, self.panel), self.panel)
        if of_teacher:
            name = "forward_kl_teacher_rollouts"
            kl = heldout.mean_metrics(heldout.collect(of_teacher, self.panel), self.panel, ["forward_kl"])
            row |= {name: kl["forward_kl"], name + "_se": kl["forward_kl_se"]}
        return row, samples

    def teacher(self, teacher: Network) -> tuple[Row, list[Row]]:
        """(evaluation row, sample rows) of the teacher; keeps its rollouts for ``student``."""
        with self._progress("evaluating the teacher") as bar:
            for rollouts in self._rollouts(teacher.config, teacher.params):
                self._reference.append(rollouts)
                bar.advance()
        return self._graded("teacher", self._reference)

    def close(self) -> None:
        self._pool.__exit__()

    def _rollouts(self, network: DecoderConfig, params: Params) -> Iterator[Rollouts]:
        engine = self._setup.graphs.engine(network)
        sample = make_rollout(engine, max_response=self._max_response)
        return heldout.sample_panel(sample, engine.cast(params), self.panel, self._law, self._setup.config.seed)

    def _measured(self, params: Params, rollouts: Rollouts) -> tuple[Any, Array]:
        """Sums over each row of the metrics of student against teacher, and the reverse KL at every token."""
        setup = self._setup
        rows = setup.layout.put_rows(setup.graphs.pack(rollouts))
        assert setup.teacher
        assert setup.graphs.score
        scores = setup.graphs.score(setup.teacher.params, rows)
        sums, kl_BR = setup.graphs.measure(params, rows, scores.hidden, scores.head)
        return jax.tree.map(lambda x: x[: len(rollouts.lengths)], hosts.fetch(sums)), kl_BR

    def _progress(self, title: str) -> Any:
        return console.progress(total=len(self.panel.batches), title=title, unit="batch")

    def _graded(self, who: str, batches: list[Rollouts], kl: Sequence[np.ndarray] = ()) -> tuple[Row, list[Row]]:
        """``kl``: the reverse KL by token of the first rows."""
        layout = self._setup.layout
        whole = [dataclasses.replace(rows, tokens=hosts.fetch(layout.put_rows(rows.tokens))) for rows in batches]
        if jax.process_index():
            return {}, []  # process 0 grades and writes
        rollouts = heldout.collect(whole, self.panel)
        texts = heldout.responses(rollouts, self._setup.tokenizer)
        correct = heldout.grade_rows(self.panel, texts, self._pool.grade)
        row: Row = {"who": who} | heldout.summarise_lengths(rollouts.lengths, rollouts.stopped, self.panel)
        if correct is not None:
            score = avg_at_k(correct)
            row |= {"accuracy": score.mean, "accuracy_se": score.error}
        samples = [
            {
                "who": who,
                "problem": self.panel.problems[i // self.panel.samples],
                "answer": self.panel.answers[i // self.panel.samples],
                "response": texts[i],
                "correct": None if correct is None else bool(correct.reshape(-1)[i]),
            }
            | (self._by_token(rollouts, i, kl[i]) if kl else {})
            for i in range(self._shown)
        ]
        return row, samples

    def _by_token(self, rollouts: Rollouts, i: int, kl_R: np.ndarray) -> Row:
        tokens = np.asarray(rollouts.tokens[i, : rollouts.lengths[i]]).tolist()
        kl = [round(float(x), 5) for x in kl_R[: len(tokens)]]
        return {"tokens": heldout.token_texts(tokens, self._setup.tokenizer), "kl_by_token": kl}
