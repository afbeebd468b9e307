"""The training run, read from top to bottom: sample, score, update; log, evaluate, save."""

from __future__ import annotations

import math
import threading
import time
from typing import Any

import jax
import numpy as np

from opd_jax import hosts
from opd_jax.checkpoints.state import Checkpoints, abstract
from opd_jax.config import Config, dump_config
from opd_jax.errors import Interrupted
from opd_jax.tracking.console import console
from opd_jax.tracking.report import write_report
from opd_jax.tracking.run_dir import open_run, read_rows
from opd_jax.tracking.writers import MetricWriter
from opd_jax.training.evaluate import Evaluator
from opd_jax.training.setup import Setup, prepare, rollout_law
from opd_jax.training.state import TrainState
from opd_jax.types import Metrics

Row = dict[str, Any]


@hosts.together()
def train(config: Config, *, resume: bool = False, title: str = "", stop: threading.Event | None = None) -> list[Row]:
    """Runs (or resumes) a configuration to its last step; returns the rows of evaluations.jsonl.

    Of several processes (``hosts.start``) all call it with the same arguments; process 0 writes and prints.

    Raises:
        InputError: the configuration, its files or the run directory cannot be used; nothing has been changed.
        Interrupted: ``stop`` was set, on any process; the state was saved first.
    """
    console.terminal.quiet |= jax.process_index() > 0
    with hosts.refused_together():
        setup = prepare(config)
        evaluator = Evaluator(setup) if config.evaluation.data else None
    hosts.check_same("configuration", dump_config(config))
    hosts.check_same(f"data.source={config.data.source}", repr(setup.records))
    with hosts.refused_together():
        run = open_run(config.run_dir, dump_config(config), resume)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep)
    hosts.on_loss(checkpoints.last_whole)
    state, done = setup.state, 0
    restored = checkpoints.restore(abstract(state, setup.graphs.shardings)) if resume else None
    if restored:
        jax.tree.map(lambda x: x.delete(), setup.state)  # or two states would live as long as the run
        state, position = restored
        done = int(state.step)
        setup.batches.set_state(position["data"])
    if resume:
        run.truncate_after(done if restored else -1)
    _announce(setup, done)

    step_fn = _opd_step if config.kind == "opd" else _sft_step
    with MetricWriter(run, done if restored else None) as writer:
        _evaluate_start(setup, evaluator, writer, state, fresh=not restored)
        with console.progress(config.steps, title or config.kind, start=done) as bar:
            for step in range(done + 1, config.steps + 1):
                state, row = step_fn(setup, state, step)
                writer.write(step, row)
                bar.update(step, row)
                if config.pack and step == done + 1:
                    saved = (
                        f"padding: {row['padding']:.0%} of the tokens computed, {row['padding_unpacked']:.0%} unpacked"
                    )
                    console.print(saved)
                last, stopping = step == config.steps, hosts.agree(stop is not None and stop.is_set())
                if evaluator and (last or (config.evaluation.every and step % config.evaluation.every == 0)):
                    _evaluate(evaluator, writer, state, step)
                # last of all: what was logged up to here belongs to this checkpoint
                if last or stopping or step % config.checkpoint.every == 0:
                    checkpoints.save(step, state, {"data": setup.batches.get_state()})
                if stopping and not last:
                    checkpoints.close()
                    raise Interrupted(f"stopped after step {step} of {config.steps}; continue with --resume")
    checkpoints.close()
    if evaluator:
        evaluator.close()
    if jax.process_index() == 0:
        write_report(run, run.report)
    return read_rows(run.evaluations)


def _opd_step(setup: Setup, state: TrainState, step: int) -> tuple[TrainState, Row]:
    graphs = setup.graphs
    assert setup.teacher
    assert graphs.score
    clock = _Clock()
    prompts = next(setup.batches)
    weights = clock("reshard", graphs.engine(setup.student).cast(state.params))
    law, seed = rollout_law(setup.config), setup.config.seed
    host = clock("rollout", setup.rollout(weights, prompts, law, seed, step))
    del weights
    rows = setup.layout.put_rows(clock("pack", graphs.pack(host)))
    scores = clock("score", graphs.score(setup.teacher.params, rows))
    update = graphs.update if (step - 1) % setup.config.metrics_every == 0 else graphs.update_unmeasured
    state, metrics = clock("update", update(state, rows, scores.hidden, frozen=scores.head))
    row = means(hosts.fetch(metrics)) | {
        "padding_unpacked": 1 - float(np.mean(host.prompts.lengths + host.lengths - 1)) / rows.tokens.shape[1],
        "response_length": float(np.mean(host.lengths)),
        "truncation_rate": float(np.mean(~np.asarray(host.stopped))),
        "tokens_per_second": float(np.sum(host.lengths)) / clock.total(),
    }
    return state, row | _common(setup, state, step) | clock.row()


def _sft_step(setup: Setup, state: TrainState, step: int) -> tuple[TrainState, Row]:
    clock = _Clock()
    host = next(setup.batches)
    rows = setup.layout.put_rows(setup.graphs.pack_texts(host))
    state, metrics = clock("update", setup.graphs.update(state, rows))
    trained = float(sum(len(response) for _, response in host))
    used = float(np.mean([len(prompt) + len(response) - 1 for prompt, response in host]))
    row = means(hosts.fetch(metrics)) | {
        "padding_unpacked": 1 - used / rows.tokens.shape[1],
        "tokens_per_second": trained / clock.total(),
    }
    return state, row | _common(setup, state, step) | clock.row()


def means(metrics: Metrics) -> Row:
    """(sum, count) → mean, on the host; curves over position become lists, with null where a bin is empty."""

    def mean(total: Any, count: Any) -> Any:
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = np.asarray(total, np.float64) / np.asarray(count, np.float64)
        return ratio.tolist()

    return {name: mean(*value) for name, value in metrics.items()}


class _Clock:
    """Seconds of each stage, the device's work included."""

    def __init__(self) -> None:
        self._stages: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, stage: str, result: Any) -> Any:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._stages[stage], self._since = now - self._since, now
        return result

    def total(self) -> float:
        return sum(self._stages.values())

    def row(self) -> Row:
        return {f"time/{stage}": seconds for stage, seconds in self._stages.items()}


def _common(setup: Setup, state: TrainState, step: int) -> Row:
    return {"learning_rate": float(np.asarray(setup.graphs.schedule(step - 1))), "skipped": int(state.skipped)}


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


def _evaluate(evaluator: Evaluator, writer: MetricWriter, state: TrainState, step: int) -> None:
    row, samples = evaluator.student(state.params)
    writer.write_evaluation(step, row)
    writer.write_samples(step, samples)
    names = ("accuracy", "reverse_kl", "overlap_ratio", "entropy_gap", "response_length", "eos_rate")
    shown = {name: row[name] for name in names if name in row and math.isfinite(row[name])}
    if shown:
        console.table(f"held-out, step {step}", list(shown), [list(shown.values())])


def _announce(setup: Setup, done: int) -> None:
    rows = f"{len(setup.records):,} rows{setup.overlong.note()}"
    mesh = " × ".join(f"{name} {size}" for name, size in setup.layout.mesh.shape.items())
    console.print(f"{setup.config.data.source}: {rows}; mesh {mesh}" + (f"; resumed at step {done}" if done else ""))
