"""The training run, read from top to bottom: sample, score, update; log, evaluate, save."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import jax
import numpy as np

from opd_jax import hosts
from opd_jax.checkpoints.state import Checkpoints, abstract, refused_writes
from opd_jax.config import Config, dump_config
from opd_jax.errors import Failed, Interrupted
from opd_jax.sampling.packing import split
from opd_jax.tracking.console import console
from opd_jax.tracking.report import write_report
from opd_jax.tracking.run_dir import RunDir, keep_rows, open_run, read_rows
from opd_jax.tracking.trace import StepTrace
from opd_jax.tracking.writers import MetricWriter, check_wandb
from opd_jax.training.alarm import LEVEL, RECENT, collapse
from opd_jax.training.evaluate import Evaluator
from opd_jax.training.setup import Setup, prepare, rollout_law
from opd_jax.training.state import TrainState
from opd_jax.training.throughput import throughput, update_flops
from opd_jax.types import Metrics, Sequences

HISTORY = 2 * (LEVEL + RECENT)  # measured steps that the alarm looks back on

Row = dict[str, Any]
StepResult = tuple[TrainState, Row, list[Sequences]]  # … and the rows of updates that were skipped


@hosts.together()
def train(config: Config, *, resume: bool = False, title: str = "", stop: threading.Event | None = None) -> list[Row]:
    """Runs (or resumes) a configuration to its last step; returns the rows of evaluations.jsonl.

    Of several processes (``hosts.start``) all call it with the same arguments; process 0 writes and prints.

    Raises:
        InputError: the configuration, its files or the run directory cannot be used; nothing has been changed. Or a
            full disk; the run can be resumed.
        Interrupted: ``stop`` was set, on any process; the state was saved first.
    """
    console.terminal.quiet |= jax.process_index() > 0
    with hosts.refused_together():
        check_wandb(config.wandb)
        setup = prepare(config)
        evaluator = Evaluator(setup) if config.evaluation.data else None
    hosts.check_same("configuration", dump_config(config))
    hosts.check_same(f"data.source={config.data.source}", repr(setup.records))
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

    step_fn = _opd_step if config.kind == "opd" else _sft_step
    with (
        refused_writes(run.root),
        MetricWriter(run, done if restored else None, config.wandb) as writer,
        StepTrace(run.profile, config.profile) as trace,
    ):
        _evaluate_start(setup, evaluator, writer, state, fresh=not restored)
        watch = _Watch(config, run, position.get("skipped_in_a_row", 0))
        between = _Clock()  # evaluation and checkpoint, told in the row of the next step
        with console.progress(config.steps, title or config.kind, start=done) as bar:
            for step in range(done + 1, config.steps + 1):
                with trace.step(step):
                    state, row, skipped = step_fn(setup, state, step)
                checkpoints.check()
                row = watch(step, row | between.row(), skipped)
                writer.write(step, row)
                bar.update(step, row)
                if watch.failure:
                    checkpoints.close()
                    raise Failed(watch.failure)
                if config.pack and step == done + 1:
                    console.print(
                        f"padding: {row['padding']:.0%} of the tokens, {row['padding_unpacked']:.0%} unpacked"
                    )
                between = _Clock()
                last, stopping = step == config.steps, hosts.agree(stop is not None and stop.is_set())
                scores = None
                if evaluator and (last or (config.evaluation.every and step % config.evaluation.every == 0)):
                    scores = _evaluate(evaluator, writer, state, step)
                    between("evaluation", None)
                # last of all: what was logged up to here belongs to this checkpoint
                due = step % config.checkpoint.every == 0 or (config.checkpoint.best and scores is not None)
                if last or stopping or due:
                    position = {"data": setup.batches.get_state(), "skipped_in_a_row": watch.skipped_in_a_row}
                    checkpoints.save(step, state, position, scores)
                    between("checkpoint", None)
                if stopping and not last:
                    checkpoints.close()
                    raise Interrupted(f"stopped after step {step} of {config.steps}; continue with --resume")
    checkpoints.close()
    if evaluator:
        evaluator.close()
    if jax.process_index() == 0:
        with refused_writes(run.root):
            write_report(run, run.report)
    return read_rows(run.evaluations)


def _opd_step(setup: Setup, state: TrainState, step: int) -> StepResult:
    graphs = setup.graphs
    assert setup.teacher
    assert graphs.score
    clock = _Clock()
    prompts = clock("data", next(setup.batches))
    weights = clock("reshard", graphs.engine(setup.student).cast(state.params))
    law, seed = rollout_law(setup.config), setup.config.seed
    limit = setup.config.rollout.length and setup.config.rollout.length.at(step, setup.config.rollout.max_response)
    host = clock("rollout", setup.rollout(weights, prompts, law, seed, step, limit))
    del weights
    measure = (step - 1) % setup.config.metrics_every == 0
    update = graphs.update if measure else graphs.update_unmeasured
    metrics, skipped = [], []
    for part in split(host, setup.config.updates, setup.layout):
        packed = weighted(graphs.pack(part), setup.config, step)
        rows = clock("pack", setup.layout.put_rows(packed))
        scores = clock("score", graphs.score(setup.teacher.params, rows))
        state, measured = clock("update", update(state, rows, scores.hidden, frozen=scores.head))
        metrics.append(hosts.fetch(measured))
        if not _finite(metrics[-1]):
            skipped.append(packed)
    row = means(jax.tree.map(lambda *x: sum(x), *metrics)) | {
        "padding_unpacked": 1 - float(np.mean(host.prompts.lengths + host.lengths - 1)) / packed.tokens.shape[1],
        "response_length": float(np.mean(host.lengths)),
        "truncation_rate": float(np.mean(~np.asarray(host.stopped))),
    }
    row |= _rates(setup, clock, host.prompts.lengths, host.lengths, measure)
    return state, row | _common(setup, state) | clock.row(), skipped


def _sft_step(setup: Setup, state: TrainState, step: int) -> StepResult:
    clock = _Clock()
    host = clock("data", next(setup.batches))
    packed = setup.graphs.pack_texts(host)
    rows = clock("pack", setup.layout.put_rows(packed))
    state, metrics = clock("update", setup.graphs.update(state, rows))
    metrics = hosts.fetch(metrics)
    prompts, responses = (np.array([len(text[i]) for text in host]) for i in (0, 1))
    row = means(metrics) | {"padding_unpacked": 1 - float(np.mean(prompts + responses - 1)) / packed.tokens.shape[1]}
    row |= _rates(setup, clock, prompts, responses, True)
    return state, row | _common(setup, state) | clock.row(), [] if _finite(metrics) else [packed]


def weighted(rows: Sequences, config: Config, step: int) -> Sequences:
    """Rows with the weights of ``config.positions`` at a step; as they are where all positions weigh the same."""
    p = config.positions
    if p == type(p)():
        return rows
    longest = config.rollout.max_response
    horizon = longest if p.horizon is None else p.horizon.at(step, longest)
    depth = np.asarray(rows.depth)
    weight = np.where((depth >= p.skip) & (depth < horizon), np.float32(p.discount) ** np.maximum(depth, 0), 0.0)
    return rows.replace(weight=weight.astype(np.float32))  # pyright: ignore[reportAttributeAccessIssue]


def means(metrics: Metrics) -> Row:
    """(sum, count) → mean, on the host; curves over position become lists, with null where a bin is empty."""

    def mean(total: Any, count: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.asarray(total, np.float64) / np.asarray(count, np.float64)
        return ratio.tolist()

    return {name: mean(*value) for name, value in metrics.items()}


def _finite(metrics: Metrics) -> bool:
    """Whether the update was made (``make_update`` skips those that are not finite)."""
    return all(bool(np.isfinite(metrics[name][0])) for name in ("loss", "gradient_norm"))


class _Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, result: Any) -> Any:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
        return result

    def row(self) -> Row:
        return {f"time/{stage}": seconds for stage, seconds in self.seconds.items()}


def _rates(setup: Setup, clock: _Clock, prompts: np.ndarray, responses: np.ndarray, measure: bool) -> Row:
    teacher = setup.teacher.config if setup.teacher else None
    flops = update_flops(setup.config, setup.student, teacher, prompts, responses, metrics=measure)
    return throughput(prompts, responses, clock.seconds, flops, list(setup.layout.mesh.devices.flat))


def _common(setup: Setup, state: TrainState) -> Row:
    updates, skipped = hosts.fetch((state.step, state.skipped))
    return {"learning_rate": float(hosts.fetch(setup.graphs.schedule(updates - 1))), "skipped": int(skipped)}


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


def _announce(setup: Setup, done: int) -> None:
    rows = f"{len(setup.records):,} rows{setup.overlong.note()}"
    mesh = " × ".join(f"{name} {size}" for name, size in setup.layout.mesh.shape.items())
    console.print(f"{setup.config.data.source}: {rows}; mesh {mesh}" + (f"; resumed at step {done}" if done else ""))
