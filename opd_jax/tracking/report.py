"""One self-contained HTML file about one or several runs: numbers, curves, sampled texts, settings. No network, no
script; whatever a model wrote is shown as text."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from etils import epath

from opd_jax.errors import InputError
from opd_jax.tracking import page, plots, rollouts
from opd_jax.tracking.labels import axis_label, format_value, in_order
from opd_jax.tracking.run_dir import Row, RunDir, existing_run, names_of, read_rows, write_atomically
from opd_jax.tracking.sections import Sections, body, stored

_NOT_METRICS = {"step", "problems", "samples"}
_STAGES = ("data", "reshard", "rollout", "pack", "score", "update", "evaluation", "checkpoint")
_OF_STAGES = ("time/", "tokens_per_second/", "update_flops", "metrics_flops")  # in their own table
_HEADLINES = ("accuracy", "reverse_kl", "overlap_ratio", "entropy_gap")


def write_report(runs: RunDir | Sequence[RunDir], path: epath.PathLike, analyses: Sections | None = None) -> None:
    """Writes the report of one run, or of several with their curves in the same axes.

    Whatever the logs lack is left out; a run that has only a configuration gives a report that says so.

    Args:
        analyses: how to show the results in the runs' ``analysis`` directories; those of other kinds are left out.

    Raises:
        InputError: no run is given, a directory holds no run, or a result of an analysis cannot be read.
    """
    runs = [runs] if isinstance(runs, RunDir) else list(runs)
    if not runs:
        raise InputError("report: no run given. Name at least one run directory.")
    runs = [existing_run(run.root) for run in runs]
    loaded = [_load(run, name) for run, name in zip(runs, names_of(runs), strict=True)]
    title = " · ".join(run.name for run in loaded)
    parts = [f"<h1>{page.escape(title)}</h1>", _comparison(loaded) if len(loaded) > 1 else ""]
    parts += [_summary(run, several=len(loaded) > 1) for run in loaded]
    parts += [_training_curves(loaded)]
    of_analyses = functools.partial(_analyses, known=analyses or {})
    of_samples = functools.partial(_samples, runs=len(loaded))
    for section in (_alarms, _position_curves, of_analyses, _time, of_samples, _settings):
        parts += [section(run, several=len(loaded) > 1) for run in loaded]
    write_atomically(epath.Path(path), page.document(title, "\n".join(filter(None, parts))))


def gap_recovery(before: Row, after: Row, teacher: Row) -> tuple[float, float | None] | None:
    """Gap recovery rate (after − before) / (teacher − before) of three evaluations, with its standard error.

    The error is propagated from ``accuracy_se`` to first order, the three accuracies taken as independent; None where
    one lacks it. None in place of the pair where an accuracy is missing or the teacher is not above the student.
    Source: paper, default set-up.
    """
    a, b, t = (row.get("accuracy") for row in (after, before, teacher))
    if a is None or b is None or t is None or t <= b:
        return None
    rate = (a - b) / (t - b)
    errors = [row["accuracy_se"] for row in (after, before, teacher) if row.get("accuracy_se") is not None]
    if len(errors) < 3:
        return rate, None
    weights = (1.0, rate - 1.0, -rate)
    return rate, math.hypot(*(w * e for w, e in zip(weights, errors, strict=True))) / (t - b)


@dataclasses.dataclass
class _Run:
    name: str
    place: RunDir
    config_text: str
    environment: list[Row]
    metrics: list[Row]
    samples: list[Row]
    evaluations: list[Row]

    @functools.cached_property
    def config(self) -> Row:
        tree = yaml.safe_load(self.config_text)
        return tree if isinstance(tree, dict) else {}

    def setting(self, path: str) -> Any:
        node: Any = self.config
        for name in path.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    @property
    def overlap_k(self) -> int | None:
        return self.setting("metrics_k") or self.setting("objective.k")

    @property
    def student(self) -> list[Row]:
        return [row for row in self.evaluations if row.get("who") != "teacher"]

    @property
    def teacher(self) -> Row:
        return next((row for row in reversed(self.evaluations) if row.get("who") == "teacher"), {})

    @property
    def recovery(self) -> tuple[float, float | None] | None:
        return gap_recovery(self.student[0], self.student[-1], self.teacher) if len(self.student) > 1 else None


def _load(run: RunDir, name: str) -> _Run:
    rows = (read_rows(path) for path in (run.metrics, run.samples, run.evaluations))
    environment = json.loads(run.environment.read_text()) if run.environment.exists() else []
    return _Run(name, run, run.config.read_text(), environment, *rows)


def _comparison(runs: list[_Run]) -> str:
    names = [n for n in _HEADLINES if any(row.get(n) is not None for run in runs for row in run.student)]
    rows = []
    for run in runs:
        last = run.student[-1] if run.student else {}
        rows.append([run.name, last.get("step"), run.recovery, *(_with_error(last, n) for n in names)])
    heads = ["run", "step", "gap recovery rate", *(axis_label(n, runs[0].overlap_k) for n in names)]
    return "<h2>Comparison</h2>" + page.table(heads, rows)


def _summary(run: _Run, several: bool) -> str:
    """Headline numbers, then before / after / teacher."""
    objective = run.setting("objective.name") if run.setting("kind") != "sft" else "imitation (SFT)"
    models = [m for m in (run.setting("student.path"), run.setting("teacher.path")) if m]
    steps = run.metrics[-1]["step"] if run.metrics else 0
    facts = [" ← ".join(map(str, models)), objective and f"objective {objective}", f"{steps:,} steps"]
    if run.environment:
        last = run.environment[-1]
        devices = ", ".join(f"{n} × {kind}" for kind, n in last.get("devices", {}).items())
        facts += [devices, str(last.get("start_time", ""))[:10]]
    lead = f'<p class="soft">{page.escape(" · ".join(str(f) for f in facts if f))}</p>'
    heading = f"<h2>{page.escape(run.name)}</h2>" if several else ""
    if not run.student:
        return f"{heading}{lead}<p>No evaluation was logged yet.</p>"
    return f"{heading}{lead}{_tiles(run)}{_before_after(run)}"


def _tiles(run: _Run) -> str:
    first, last, tiles = run.student[0], run.student[-1], []
    if run.recovery is not None:
        tiles.append((page.escape(format_value(run.recovery[0])), "gap recovery rate"))
    for name in _HEADLINES:
        old, new = first.get(name), last.get(name)
        if old is None or new is None or first is last:
            continue
        caption = axis_label(name, run.overlap_k)
        if run.teacher.get(name) is not None:
            caption += f"; teacher {format_value(run.teacher[name])}"
        tiles.append((f"{format_value(old)} <i>→</i> {format_value(new)}", caption))
    cards = "".join(f'<div class="card tile"><b>{value}</b><span>{page.escape(c)}</span></div>' for value, c in tiles)
    return f'<div class="tiles">{cards}</div>' if cards else ""


def _before_after(run: _Run) -> str:
    first, last, teacher = run.student[0], run.student[-1], run.teacher
    trained = first is not last
    heads = ["", f"before (step {first['step']})"] if trained else ["", f"step {first['step']}"]
    heads += [f"after (step {last['step']})", "change"] if trained else []
    heads += ["teacher"] if teacher else []
    rows = []
    for name in _numeric_names([first, last, teacher]):
        cells = [_with_error(first, name)]
        cells += [_with_error(last, name), _change(first, last, name)] if trained else []
        cells += [_with_error(teacher, name)] if teacher else []
        rows.append([axis_label(name, run.overlap_k), *cells])
    if run.recovery is not None:
        # accuracy, which the rate needs, leads the listed metrics
        rows.insert(1, ["gap recovery rate", None, run.recovery, *([None] * (len(heads) - 3))])
    counts = [
        f"{last[n]:,} {text}" for n, text in (("problems", "problems"), ("samples", "samples each")) if last.get(n)
    ]
    note = f"Held-out prompts: {' × '.join(counts)}. " if counts else ""
    note += "± is one standard error; that of a change or a rate takes the evaluations as independent."
    return f'{page.table(heads, rows)}<p class="soft note">{note}</p>'


def _training_curves(runs: list[_Run]) -> str:
    several = len(runs) > 1
    labels = [run.name if several else "training" for run in runs]
    rows = dict(zip(labels, (run.metrics for run in runs), strict=True))
    evaluations = dict(zip(labels, (run.evaluations for run in runs), strict=True))
    names = [n for n in _numeric_names([r for run in runs for r in run.metrics]) if not n.startswith(_OF_STAGES)]
    evaluated = _numeric_names([r for run in runs for r in run.student if len(run.student) > 1])
    k = runs[0].overlap_k
    figures = [
        page.figure(plots.curves(rows, [name], evaluations, k), f"{axis_label(name, k)} over training steps")
        for name in in_order([*names, *evaluated])
    ]
    return page.plots("Training", figures)


def _position_curves(run: _Run, several: bool) -> str:
    k, length = run.overlap_k, run.setting("rollout.max_response")
    figures = [
        page.figure(plots.position_curves(run.metrics, [name], k, length), f"{axis_label(name, k)} by output position")
        for name in plots.position_names(run.metrics)
    ]
    return page.plots("By output position" + _of(run, several), figures)


def _alarms(run: _Run, several: bool) -> str:
    """Where the run may have collapsed (``training/alarm.py``)."""
    rows = [[row["step"], row["alarm"]] for row in run.metrics if row.get("alarm")]
    if not rows:
        return ""
    table = page.table(["step", "what left its level"], rows)
    return f"<h2>Signs of a collapse{page.escape(_of(run, several))}</h2>{table}"


def _analyses(run: _Run, several: bool, known: Sections) -> str:
    found = stored(run.place.analysis, known)
    return "".join(f"<h2>{page.escape(s.title + _of(run, several))}</h2>{body(s, in_report=True)}" for s in found)


def _time(run: _Run, several: bool) -> str:
    """Evaluations and checkpoints are not of every step: their share is that of as many as there were."""
    timed = run.metrics[1:] or run.metrics  # the first step holds the compilation
    names = {key: None for row in timed for key in row if key.startswith("time/")}
    held = {name: [row[name] for row in timed if row.get(name) is not None] for name in names}
    medians = {name: statistics.median(v) for name, v in held.items() if v}
    total = sum(medians[name] * len(held[name]) for name in medians)
    if not total:
        return ""
    rows = []
    for name in sorted(medians, key=lambda n: _STAGES.index(n[5:]) if n[5:] in _STAGES else len(_STAGES)):
        rates = [r for row in timed if (r := row.get(name.replace("time/", "tokens_per_second/"))) is not None]
        share = f"{medians[name] * len(held[name]) / total:.0%}"
        rows.append([name[5:], medians[name], len(held[name]), share, statistics.median(rates) if rates else None])
    rows.append(["all, a step", total / len(timed), len(timed), None, None])
    table = page.table(["stage", "seconds (median)", "times", "share", "tokens/s"], rows)
    used = [row["mfu"] for row in timed if row.get("mfu") is not None]
    mfu = f"The update reaches {statistics.median(used):.0%} of the chips' bfloat16 peak. " if used else ""
    note = f'<p class="soft note">{mfu}Without the first step. A checkpoint is written while the run goes on.</p>'
    return f"<h2>Where the time goes{page.escape(_of(run, several))}</h2>{table}{note}"


def _samples(run: _Run, several: bool, runs: int) -> str:
    return rollouts.section(run.samples, _of(run, several), runs)


def _settings(run: _Run, several: bool) -> str:
    parts = [f"<details><summary>Configuration</summary><pre>{page.escape(run.config_text)}</pre></details>"]
    if run.environment:
        facts = [*_flat(run.environment[-1]), ["starts of this run", len(run.environment)]]
        table = page.table([], facts, css="facts")
        parts.append(f"<details><summary>Environment</summary>{table}</details>")
    return f"<h2>Settings{page.escape(_of(run, several))}</h2>{''.join(parts)}"


def _flat(row: Row) -> list[list[Any]]:
    flat = []
    for name, value in row.items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        flat.append([name.replace("_", " "), text])
    return flat


def _numeric_names(rows: Iterable[Row]) -> list[str]:
    numeric = {k for row in rows for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return in_order(name for name in numeric - _NOT_METRICS if not name.endswith("_se"))


def _with_error(row: Row, name: str) -> Any:
    error = row.get(f"{name}_se")
    return row.get(name) if error is None else (row.get(name), error)


def _change(first: Row, last: Row, name: str) -> str | None:
    old, new = first.get(name), last.get(name)
    if old is None or new is None:
        return None
    errors = [row[f"{name}_se"] for row in (first, last) if row.get(f"{name}_se") is not None]
    sign = "+" if new > old else "−" if new < old else ""
    error = math.hypot(*errors) if len(errors) == 2 else None
    return sign + format_value((abs(new - old), error))


def _of(run: _Run, several: bool) -> str:
    return f": {run.name}" if several else ""
