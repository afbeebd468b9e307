"""What a run did to its student, step by step, and which of the paper's signs of success or failure it shows (§4.1)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml
from scipy.special import stdtrit

from opd_jax.errors import InputError
from opd_jax.tracking import plots
from opd_jax.tracking.labels import axis_label, format_interval, format_value
from opd_jax.tracking.run_dir import Row, RunDir, existing_run, names_of, read_rows
from opd_jax.tracking.sections import Plot, Section, Table

METRICS = (
    "overlap_ratio",
    "entropy_gap",
    "overlap_advantage",
    "overlap_mass_student",
    "overlap_mass_teacher",
    "reverse_kl",
    "student_entropy",
    "teacher_entropy",
    "gradient_norm",
    "loss",
)
MAPPED = ("student_entropy", "reverse_kl")  # by output position and step, as in Fig. 13
FEWEST = 6  # measured steps: two windows of three
WINDOW = 5, 20  # least and most steps at each end (of fewer than ten steps half); between them a twentieth of the run
COLUMNS = 64  # of a heat map: groups of steps
COLLAPSE = 4.0  # standard errors that the overlap has to end below the best of its windows, which is one of many


class Sign(NamedTuple):
    """A sign of success of §4.1: a metric that moves one way. Everything is of ``gain``, the change in that way."""

    metric: str
    way: int  # +1: success is upwards
    least: float  # a smaller gain does not matter; of the first value if ``relative``
    relative: bool
    words: tuple[str, str, str]  # success, its opposite, neither


# Least gains are a tenth of what the successful run of §4.1 shows: overlap 0.72 → 0.91; gap and advantage close to 0.
SIGNS = (
    Sign("overlap_ratio", +1, 0.02, False, ("rises", "falls", "stays flat")),
    Sign("entropy_gap", -1, 0.1, True, ("narrows", "widens", "stays flat")),
    Sign("overlap_advantage", +1, 0.1, True, ("moves towards 0", "moves away from 0", "stays flat")),
)
SUCCESS, OPPOSITE, FLAT, UNCLEAR = "success", "opposite", "flat", "unclear"
END_OF_SUCCESS = 0.91  # overlap at which the successful run of §4.1 ends


def dynamics(runs: Sequence[RunDir]) -> Row:
    """First and last steps, change and trend of every metric of runs; their signs; entropy and KL by position and step.

    Raises:
        InputError: a directory holds no run; a run measured no overlap with a teacher, or at fewer than 6 steps.
    """
    runs = [existing_run(run.root) for run in runs]
    return {"kind": "dynamics", "runs": [_of_run(r, n) for r, n in zip(runs, names_of(runs), strict=True)]}


def window_change(first: np.ndarray, last: np.ndarray) -> Row:
    """Difference of two means with its 95 % interval by Welch's t."""
    variances = np.array([x.var(ddof=1) / len(x) for x in (first, last)])
    mean, error = float(last.mean() - first.mean()), math.sqrt(variances.sum())
    if error == 0:
        return {"mean": mean, "low": mean, "high": mean}
    freedom = variances.sum() ** 2 / (variances**2 / np.array([len(first) - 1, len(last) - 1])).sum()
    half = -float(stdtrit(freedom, 0.025)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half}


def trend(steps: np.ndarray, values: np.ndarray) -> Row:
    """Least-squares slope per 100 steps with a 95 % interval that neighbouring steps may correlate in.

    Newey and West's variance n/(n−2) · Σ_{|l| ≤ L} (1 − |l|/(L+1)) Σ_t u_t u_{t+l} / (Σ_t x_t²)², x the centred steps,
    u = x · residual, L = ⌊0.75 n^⅓⌋ (Stock and Watson's rule); Student's law with n − 2 degrees.
    """
    n, x = len(steps), steps - steps.mean()
    slope = (x @ values) / (x @ x)
    u = x * (values - values.mean() - slope * x)
    lags = int(0.75 * n ** (1 / 3))
    total = u @ u + 2 * sum((1 - lag / (lags + 1)) * (u[lag:] @ u[:-lag]) for lag in range(1, lags + 1))
    half = -float(stdtrit(n - 2, 0.025)) * math.sqrt(n / (n - 2) * max(total, 0.0)) / (x @ x)
    return {"mean": 100 * float(slope), "low": 100 * float(slope - half), "high": 100 * float(slope + half)}


def _of_run(run: RunDir, name: str) -> Row:
    kind, settings = _settings(run)
    rows = read_rows(run.metrics)
    measured = [row for row in rows if row.get("overlap_ratio") is not None]
    if not measured:
        raise InputError(
            f"{run.root}: metrics.jsonl has {len(rows)} steps, none with an overlap ratio (kind={kind}). "
            "Dynamics are those of a student against its teacher: give a run of kind=opd."
        )
    if len(measured) < FEWEST:
        raise InputError(
            f"{run.root}: {len(measured)} measured steps; first and last steps need {FEWEST}. Let the run go on, or "
            "set a lower metrics_every."
        )
    window = min(int(np.clip(len(measured) // 20, *WINDOW)), len(measured) // 2)
    metrics = {n: found for n in METRICS if (found := _of_metric(measured, n, window))}
    kept = ["step", "who", "problems", *(name + end for name in ("accuracy", *METRICS) for end in ("", "_se"))]
    evaluations = [{name: row[name] for name in kept if name in row} for row in read_rows(run.evaluations)]
    result: Row = {
        "name": name,
        "path": str(run.root),
        **{name: settings[name] for name in ("k", "student", "objective")},
        "steps": [measured[0]["step"], measured[-1]["step"]],
        "measured_steps": len(measured),
        "window": window,
        "metrics": metrics,
        "maps": {n: m for n in MAPPED if (m := _map(measured, n, settings["max_response"]))},
        "evaluations": evaluations,
        "alarms": [{"step": row["step"], "text": row["alarm"]} for row in rows if row.get("alarm")],
    }
    signs = {sign.metric: found for sign in SIGNS if (found := _sign(sign, metrics, evaluations))}
    return result | {"signs": signs, "fell_back": _fell_back(metrics, window)}


def _settings(run: RunDir) -> tuple[str, Row]:
    try:
        config = yaml.safe_load(run.config.read_text())
        objective, response = config["objective"], config["rollout"]["max_response"]
        k = config.get("metrics_k") or objective["k"]
        settings = {"k": k, "student": config["student"]["path"], "objective": objective}
        return config["kind"], settings | {"max_response": response}
    except (yaml.YAMLError, KeyError, TypeError) as e:
        raise InputError(f"{run.config}: not the configuration of a run ({e!r}). Give the run_dir of a run.") from e


def _of_metric(rows: Sequence[Row], name: str, window: int) -> Row | None:
    held = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if len(held) < 2 * window:
        return None
    steps, values = np.array(held, np.float64).T
    ends = {
        end: {
            "steps": [int(steps[part][0]), int(steps[part][-1])],
            "mean": float(values[part].mean()),
            "error": float(values[part].std(ddof=1)) / math.sqrt(window),
        }
        for end, part in (("first", slice(window)), ("last", slice(-window, None)))
    }
    found = {"change": window_change(values[:window], values[-window:]), "trend": trend(steps, values)}
    return ends | found | {"steps": steps.astype(int).tolist(), "values": values.tolist()}


def _sign(sign: Sign, metrics: Row, evaluations: Sequence[Row]) -> Row | None:
    """The change that a sign is read from: on held-out prompts if it was measured there, else between the windows."""
    found = _held_out(evaluations, sign.metric)
    if found is None and (metric := metrics.get(sign.metric)):
        found = {"of": "in training"} | {part: metric[part] for part in ("first", "last", "change")}
    return None if found is None else found | {"outcome": _outcome(sign, found)}


def _held_out(evaluations: Sequence[Row], name: str) -> Row | None:
    """First and last evaluation of the student. They are of the same prompts and random numbers, so that errors of a
    change that take them for independent are too large rather than too small."""
    held = [r for r in evaluations if r.get("who") != "teacher" and r.get(name) is not None and r.get(name + "_se")]
    if len(held) < 2:
        return None
    first, last = ({"steps": [r["step"]] * 2, "mean": r[name], "error": r[name + "_se"]} for r in (held[0], held[-1]))
    mean, error = last["mean"] - first["mean"], math.hypot(first["error"], last["error"])
    half = -float(stdtrit(max(held[-1].get("problems", 2) - 1, 1), 0.025)) * error
    change = {"mean": mean, "low": mean - half, "high": mean + half}
    return {"of": "on held-out prompts", "first": first, "last": last, "change": change}


def _outcome(sign: Sign, found: Row) -> str:
    """A gain that is certain and matters, a loss that is, certainly neither, or too little data to tell."""
    least = sign.least * (abs(found["first"]["mean"]) if sign.relative else 1)
    gain, *ends = (sign.way * found["change"][part] for part in ("mean", "low", "high"))
    low, high = sorted(ends)
    if low > 0 and gain >= least:
        return SUCCESS
    if high < 0 and gain <= -least:
        return OPPOSITE
    return FLAT if -least < low and high < least else UNCLEAR


def _fell_back(metrics: Row, window: int) -> Row | None:
    """The window of steps of the best overlap, if at the end the overlap is clearly lower and the reverse KL higher, as
    when long responses collapse (§6.1). An overlap that overshoots while the KL goes on falling is no collapse."""
    overlap = metrics["overlap_ratio"]
    parts = np.lib.stride_tricks.sliding_window_view(np.array(overlap["values"]), window)
    best = int(parts.mean(axis=1).argmax())
    fall = -window_change(parts[best], parts[-1])["mean"]
    error = math.sqrt((parts[best].var(ddof=1) + parts[-1].var(ddof=1)) / window)
    kl = metrics.get("reverse_kl")
    diverged = True
    if kl and kl["steps"] == overlap["steps"]:
        values = np.array(kl["values"])
        diverged = window_change(values[best : best + window], values[-window:])["low"] > 0
    if fall < max(SIGNS[0].least, COLLAPSE * error) or not diverged:
        return None
    return {"steps": [overlap["steps"][i] for i in (best, best + window - 1)], "mean": float(parts[best].mean())}


def _map(rows: Sequence[Row], name: str, max_response: int) -> Row | None:
    """Means over at most ``COLUMNS`` groups of steps; None where no response reached a position."""
    held = [row for row in rows if row.get(name + "_by_position")]
    if not held:
        return None
    size = math.ceil(len(held) / COLUMNS)
    groups = [held[i : i + size] for i in range(0, len(held), size)]
    means = [plots.bin_means([row[name + "_by_position"] for row in group]) for group in groups]
    bins = len(means[0])
    return {
        "steps": [*(group[0]["step"] for group in groups), held[-1]["step"] + 1],
        "positions": [i * max_response / bins for i in range(bins + 1)],
        "values": [[float(x) if math.isfinite(x) else None for x in column] for column in means],
    }


def section(result: Row) -> Section:
    """What people see of the result of ``dynamics``."""
    runs = result["runs"]
    several = len(runs) > 1
    ks = {run["k"] for run in runs}
    k = ks.pop() if len(ks) == 1 else None
    lead = [sentence for run in runs for sentence in _in_words(run, several)]
    lead += _of_gradients(runs) if several else []
    if several and k is None:
        lead.append("The runs' overlap ratios are of lists of different lengths k, and do not compare.")
    tables = [table for run in runs for table in _tables(run, several)]
    names = [name for name in METRICS if any(name in run["metrics"] for run in runs)]
    curves = [
        Plot(f"{axis_label(n, k)} over steps", functools.partial(_curves, runs, n, k), not several) for n in names
    ]
    return Section("dynamics", "Dynamics", lead, tables, [*curves, *_maps(runs, several)])


def _in_words(run: Row, several: bool) -> list[str]:
    sentences = [f"{run['name']}: {_verdict(run)}" if several else _verdict(run)]
    for sign in SIGNS:
        if found := run["signs"].get(sign.metric):
            success, opposite, flat = sign.words
            verbs = {SUCCESS: success, OPPOSITE: opposite, FLAT: flat, UNCLEAR: "changes too little to tell"}
            first, last, change = (found[part] for part in ("first", "last", "change"))
            steps = [
                f"step{'s' * (a < b)} {'–'.join(map(str, sorted({a, b})))}" for a, b in (first["steps"], last["steps"])
            ]
            name = axis_label(sign.metric, run["k"]).partition(" (")[0]
            sentences.append(
                f"{name[0].upper()}{name[1:]} {verbs[found['outcome']]}, {found['of']}: "
                f"{format_value((first['mean'], first['error']))} ({steps[0]}) → "
                f"{format_value((last['mean'], last['error']))} ({steps[1]}), change {format_value(change['mean'])} "
                f"(95 % {format_interval(change['low'], change['high'])})."
            )
    if fell := run["fell_back"]:
        steps, last = "–".join(map(str, fell["steps"])), run["metrics"]["overlap_ratio"]["last"]
        sentences.append(
            f"The overlap fell back from {format_value(fell['mean'])} (steps {steps}) to {format_value(last['mean'])}: "
            "a sign of a late collapse. If responses are long, shorten rollout.length or positions.horizon (paper "
            "§6.1)."
        )
    if alarms := run["alarms"]:
        sentences.append(f"Training warned at step {alarms[0]['step']}: {alarms[0]['text']} ({len(alarms)} in all).")
    if norm := run["metrics"].get("gradient_norm"):
        ends = f"{format_value(norm['first']['mean'])} → {format_value(norm['last']['mean'])}"
        sentences.append(f"Gradient norm {ends}; mean {format_value(float(np.mean(norm['values'])))}.")
    return sentences


def _verdict(run: Row) -> str:
    outcomes = [found["outcome"] for found in run["signs"].values()]
    good, n = outcomes.count(SUCCESS), len(outcomes)
    if good == n:
        return f"It shows all {n} signs of a successful distillation (paper §4.1)."
    if outcomes.count(FLAT) == n:
        start = run["signs"]["overlap_ratio"]["first"]["mean"]
        near = start >= END_OF_SUCCESS
        but = (
            f" But the overlap began at {start:.2f}, where the paper's successful run ended: there was little to gain."
        )
        return f"All {n} signs stay flat, as in the failing runs of the paper's §4.1.{but if near else ''}"
    counts = [f"{outcomes.count(what)} {text}" for what, text in _NOT_GOOD.items() if what in outcomes]
    return f"It shows {good} of the {n} signs of a successful distillation (paper §4.1); {', '.join(counts)}."


_NOT_GOOD = {OPPOSITE: "the other way round", FLAT: "flat", UNCLEAR: "not certain"}


def _of_gradients(runs: Sequence[Row]) -> list[str]:
    """Failing runs have the smaller gradient (§4.1); norms compare between runs of one student and objective alone."""
    means = {
        r["name"]: float(np.mean(r["metrics"]["gradient_norm"]["values"]))
        for r in runs
        if "gradient_norm" in r["metrics"]
    }
    if len(means) < 2:
        return []
    if any((run["student"], run["objective"]) != (runs[0]["student"], runs[0]["objective"]) for run in runs):
        return ["Gradient norms are not ranked: the runs differ in student or objective."]
    ranked = ", ".join(f"{name} {format_value(value)}" for name, value in sorted(means.items(), key=lambda x: x[1]))
    return [f"Mean gradient norms, smallest first: {ranked}. In the paper's §4.1 the failing run has the smaller one."]


def _tables(run: Row, several: bool) -> list[Table]:
    of_run = f"{run['name']}: " if several else ""
    first, last = (run["metrics"]["overlap_ratio"][end]["steps"] for end in ("first", "last"))
    heads = [
        "metric",
        "steps {}–{}".format(*first),
        "steps {}–{}".format(*last),
        "change",
        "95 %",
        "per 100 steps",
        "95 %",
    ]
    rows = [
        [
            axis_label(name, run["k"]),
            *((m[end]["mean"], m[end]["error"]) for end in ("first", "last")),
            m["change"]["mean"],
            format_interval(m["change"]["low"], m["change"]["high"]),
            m["trend"]["mean"],
            format_interval(m["trend"]["low"], m["trend"]["high"]),
        ]
        for name, m in run["metrics"].items()
    ]  # fmt: skip
    tables = [Table(f"{of_run}training, {run['measured_steps']} measured steps", heads, rows)]
    student = [row for row in run["evaluations"] if row.get("who") != "teacher"]
    teacher = next((row for row in run["evaluations"] if row.get("who") == "teacher"), {})
    if len(student) > 1:
        ends = [student[0], student[-1], teacher]
        heads = ["metric", *(f"step {row['step']}" for row in ends[:2]), "teacher"]
        names = [n for n in ("accuracy", *METRICS) if all(row.get(n) is not None for row in ends[:2])]
        cells = [[(row[n], row.get(n + "_se")) if n in row else None for row in ends] for n in names]
        rows = [[axis_label(n, run["k"]), *of_metric] for n, of_metric in zip(names, cells, strict=True)]
        tables.append(Table(f"{of_run}held-out prompts", heads, rows, standalone=not several))
    return tables


def _curves(runs: Sequence[Row], name: str, k: int | None) -> Any:
    held = [run for run in runs if name in run["metrics"]]
    rows = {}
    for run in held:
        points = zip(run["metrics"][name]["steps"], run["metrics"][name]["values"], strict=True)
        rows[run["name"] if len(runs) > 1 else "training"] = [{"step": step, name: value} for step, value in points]
    return plots.curves(rows, [name], dict(zip(rows, (run["evaluations"] for run in held), strict=True)), k)


def _maps(runs: Sequence[Row], several: bool) -> list[Plot]:
    """One scale of colours for all runs."""
    found = []
    for name in MAPPED:
        held = [run for run in runs if name in run["maps"]]
        values = [x for run in held for column in run["maps"][name]["values"] for x in column if x is not None]
        limits = tuple(np.percentile(values, [1, 99])) if values else (0.0, 1.0)
        for run in held:
            title = run["name"] if several else ""
            draw = functools.partial(
                plots.heat_map, **run["maps"][name], label=axis_label(name), limits=limits, title=title
            )
            found.append(Plot(f"{axis_label(name)} by output position and step {title}".strip(), draw))
    return found
