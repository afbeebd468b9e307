"""The training run, read from top to bottom: sample, score, update; log, evaluate, save."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from opd_jax import hosts
from opd_jax.checkpoints.export import export_best
from opd_jax.checkpoints.hub import check_push, push_model
from opd_jax.checkpoints.state import Checkpoints, abstract, refused_writes
from opd_jax.config import Config
from opd_jax.config_files import dump_config
from opd_jax.errors import Failed, InputError, Interrupted
from opd_jax.tracking.console import console
from opd_jax.tracking.report import write_report
from opd_jax.tracking.run_dir import RunDir, keep_rows, open_run, read_rows, write_summary
from opd_jax.tracking.trace import StepTrace
from opd_jax.tracking.writers import MetricWriter, check_wandb
from opd_jax.training.alarm import LEVEL, RECENT, collapse
from opd_jax.training.evaluate import Evaluator
from opd_jax.training.setup import Setup, prepare
from opd_jax.training.stages import Clock, rollout_step, sft_step
from opd_jax.training.state import TrainState
from opd_jax.types import Sequences

HISTORY = 2 * (LEVEL + RECENT)  # measured steps that the alarm looks back on

Row = dict[str, Any]


@hosts.together()
def train(
    config: Config,
    *,
    resume: bool = False,
    title: str = "",
    stop: threading.Event | None = None,
    each_step: Callable[[int, Row], None] | None = None,
    report: bool = True,
) -> list[Row]:
    """Runs (or resumes) a configuration to its last step; returns the rows of evaluations.jsonl.

    Of several processes (``hosts.start``) all call it with the same arguments; process 0 writes and prints.
    ``each_step`` is given every step's number and row of metrics.jsonl; what it raises ends the run. Without
    ``report`` no report.html is written at the end; ``opd report`` does it when it is wanted.

    Raises:
        InputError: the configuration, its files or the run directory cannot be used; nothing has been changed. Or a
            full disk; the run can be resumed.
        Interrupted: ``stop`` was set, on any process; the state was saved first.
    """
    console.terminal.quiet |= jax.process_index() > 0
    with hosts.refused_together():
        check_wandb(config.wandb)
        check_push(config.checkpoint.push, False, config.run_dir, "checkpoint.push")
        setup = prepare(config)
        evaluator = Evaluator(setup) if config.evaluation.data else None
    hosts.check_same("configuration", dump_config(config))
    hosts.check_same(f"data ({config.data.title})", repr(setup.records))
    with hosts.refused_together():
        run = open_run(config.run_dir, dump_config(config), resume)
    checkpoints = Checkpoints(
        run.checkpoints, config.checkpoint.keep, config.checkpoint.best, read_rows(run.evaluations)
    )
    hosts.on_loss(checkpoints.last_whole)
    state, position, done = setup.state, {}, 0
    restored = checkpoints.restore(abstract(state, setup.graphs.shardings)) if resume else None
    if restored:
        jax.tree.map(lambda x: x.delete(), setup.state)  # or two states would live as long as the run
        state, position = restored
        done = int(state.step) // config.updates
        setup.batches.set_state(position["data"])
    if resume:
        run.truncate_after(done if restored else -1)
    _announce(setup, done)

    step_fn = sft_step if config.kind == "sft" else rollout_step
    with (
        contextlib.closing(setup.judge) if setup.judge else contextlib.nullcontext(),
        refused_writes(run.root),
        MetricWriter(run, done if restored else None, config.wandb) as writer,
        StepTrace(run.profile, config.profile) as trace,
    ):
        _evaluate_start(setup, evaluator, writer, state, fresh=not restored)
        if restored:  # a kill may have come between this checkpoint and its export
            _export(setup, run, checkpoints, state, done)
        watch = _Watch(config, run, position.get("skipped_in_a_row", 0))
        between = Clock()  # evaluation and checkpoint, told in the row of the next step
        with console.progress(config.steps, title or config.kind, start=done) as bar:
            for step in range(done + 1, config.steps + 1):
                with trace.step(step):
                    state, row, skipped = step_fn(setup, state, step)
                checkpoints.check()
                row = watch(step, row | between.row(), skipped)
                writer.write(step, row)
                bar.update(step, row)
                if each_step:
                    each_step(step, row)
                if watch.failure:
                    checkpoints.close()
                    raise Failed(watch.failure)
                if config.pack and step == done + 1:
                    console.print(
                        f"padding: {row['padding']:.0%} of the tokens, {row['padding_unpacked']:.0%} unpacked"
                    )
                between = Clock()
                last, stopping = step == config.steps, hosts.agree(stop is not None and stop.is_set())
                scores = None
                if evaluator and (last or (config.evaluation.every and step % config.evaluation.every == 0)):
                    scores = _evaluate(evaluator, writer, state, step)
                    between("evaluation", None)
                # last of all: what was logged up to here belongs to this checkpoint
                due = step % config.checkpoint.every == 0 or (config.checkpoint.best and scores is not None)
                if last or stopping or due:
                    writer.flush()
                    position = {"data": setup.batches.get_state(), "skipped_in_a_row": watch.skipped_in_a_row}
                    checkpoints.save(step, state, position, scores)
                    between("checkpoint", None)
                    if scores is not None and _export(setup, run, checkpoints, state, step):
                        between("export", None)
                if stopping and not last:
                    checkpoints.close()
                    raise Interrupted(f"stopped after step {step} of {config.steps}; continue with --resume")
    checkpoints.close()
    between("checkpoint", None)
    if evaluator:
        evaluator.close()
    if jax.process_index() == 0:
        with refused_writes(run.root):
            if report:
                write_report(run, run.report)
            write_summary(run, config.steps, between.row())  # last of all: with it a run counts as done
    return read_rows(run.evaluations)


class _Watch:
    """Keeps the rows of skipped updates, tells of a collapse, and says when a run is to end (``failure``)."""

    def __init__(self, config: Config, run: RunDir, skipped_in_a_row: int):
        self._config, self._run = config, run
        self._kept = HISTORY * config.metrics_every
        self._history = read_rows(run.metrics)[-self._kept :]
        self._quiet_until = 0
        self.skipped_in_a_row = skipped_in_a_row
        self.failure: str | None = None

    def __call__(self, step: int, row: Row, skipped: list[Sequences]) -> Row:
        """The row of a step with what is to be said of it."""
        for i, rows in enumerate(skipped):
            keep_rows(self._run.skipped, f"step{step}-update{i}-process{jax.process_index()}", rows)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            console.warn(
                f"step {step}: loss or gradient not finite; update skipped, its rows are in {self._run.skipped}"
            )
        if self.skipped_in_a_row >= self._config.max_skipped:
            self.failure = (
                f"loss or gradient not finite in {self.skipped_in_a_row} steps in a row, up to step {step}. The "
                f"weights are as they were before; the rows are in {self._run.skipped}. Look at them; then start a new "
                "run with a lower optimizer.lr or dtype=float32."
            )
        self._history = [*self._history, row][-self._kept :]
        quiet = self._config.alarm == "off" or step < self._quiet_until
        found = None if quiet else collapse(self._history)
        if not found:
            return row
        self._quiet_until = step + LEVEL
        text = f"step {step}: the run may be collapsing: {found}"
        console.warn(text)
        if self._config.alarm == "stop":
            self.failure = f"{text}. No later checkpoint was written; shorten rollout.length or positions.horizon."
        return row | {"alarm": found}


def _evaluate_start(
    setup: Setup, evaluator: Evaluator | None, writer: MetricWriter, state: TrainState, fresh: bool
) -> None:
    """The teacher's rollouts are made again on resume (the same ones); its row and the student's only once."""
    if evaluator is None:
        return
    if setup.teacher:
        row, samples = evaluator.teacher(setup.teacher)
        if fresh:
            writer.write_evaluation(0, row)
            writer.write_samples(0, samples)
    if fresh:
        _evaluate(evaluator, writer, state, 0)


def _evaluate(evaluator: Evaluator, writer: MetricWriter, state: TrainState, step: int) -> Row:
    row, samples = evaluator.student(state.params)
    writer.write_evaluation(step, row)
    writer.write_samples(step, samples)
    names = ("accuracy", "reverse_kl", "overlap_ratio", "entropy_gap", "response_length", "eos_rate")
    shown = {name: row[name] for name in names if name in row and math.isfinite(row[name])}
    if shown:
        console.table(f"held-out, step {step}", list(shown), [list(shown.values())])
    return row


def _export(setup: Setup, run: RunDir, checkpoints: Checkpoints, state: TrainState, step: int) -> bool:
    """Exports the student if this step is the best so far, and uploads it; an upload that fails ends no run."""
    settings = setup.config.checkpoint
    if not (settings.export_best and checkpoints.best_is(step)):
        return False
    export_best(run, state.params, setup.student, setup.config.student.path, step)
    if settings.push is not None and jax.process_index() == 0:
        try:
            console.print(push_model(Path(run.best), settings.push, private=True))
        except InputError as e:
            console.warn(f"step {step}: checkpoint.push: {e}")
    return True


def _announce(setup: Setup, done: int) -> None:
    rows = f"{len(setup.records):,} rows{setup.overlong.note()}"
    mesh = " × ".join(f"{name} {size}" for name, size in setup.layout.mesh.shape.items())
    console.print(f"{setup.config.data.title}: {rows}; mesh {mesh}" + (f"; resumed at step {done}" if done else ""))
