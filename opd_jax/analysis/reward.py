"""``opd analyze reward``: does a teacher's reward of a whole response tell right ones from wrong ones (paper §6.2)?

The sequence mean reward of a response y of T tokens is r̄(y) = (1/T) Σ_t [log q(y_t) − log p(y_t)], in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from opd_jax.analysis import figures
from opd_jax.analysis.estimates import (
    Estimate,
    auroc,
    auroc_draws,
    cells,
    delong,
    estimate,
    prompt_weights,
    ratio,
    span,
    told,
    within_prompts,
)
from opd_jax.analysis.pair import (
    Sampling,
    by_depth,
    check_pair,
    depth_edges,
    described,
    draw_rollouts,
    load_panel,
    token_values,
)
from opd_jax.config import Data
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.tracking.labels import format_value
from opd_jax.tracking.sections import Plot, Section, Table
from opd_jax.tracking.writers import plain

Row = dict[str, Any]

KIND = "reward"
BARS = 30  # of a histogram
DECIMALS = 5  # of r̄ in nats; float32 rounds log-probabilities at about 1e-6
OUTSIDE = 0.5  # per cent of the rollouts at each end that its first and last bars take in


def analyse_reward(student: Path, teachers: Sequence[Path], data: Data, sampling: Sampling, **settings: Any) -> Row:
    """Samples rollouts of the student, grades them, and has every teacher score them.

    Args:
        settings: of ``check_pair``.

    Raises:
        InputError: a pair or prompts that are refused; rollouts that are all right, or all wrong.
    """
    pair = check_pair(student, teachers, **settings)
    panel, overlong = load_panel(pair, data, sampling)
    network = pair.load(student)
    with AnswerPool(fallback_number=sampling.fallback_number) as pool:
        drawn = draw_rollouts(pair, network, panel, pool, sampling, student.name)
    right = drawn.correct
    check_both_classes(right, student)
    weights = prompt_weights(len(right))
    lengths = drawn.lengths.reshape(right.shape).astype(np.float64)
    result: Row = {"kind": KIND} | described(pair, data, sampling, panel, overlong)
    result |= {name: drawn.summary[name] for name in ("accuracy", "accuracy_interval", "truncation_rate")}
    result |= {"right": int(right.sum()), "wrong": int((~right).sum())}
    result |= {"length": rank_separation(-lengths, right, weights)}  # shorter ones count as better
    result |= {"correct": right.astype(int), "lengths": lengths.astype(int), "teachers": []}
    first: tuple[float, np.ndarray] | None = None
    for name, path in zip(pair.names(), teachers, strict=True):
        values = token_values(pair, network, pair.load(path), drawn, title=f"scoring by {name}")
        scores = mean_rewards(values["reward"]).reshape(right.shape)
        of_teacher = {"name": name, "path": str(path)} | separation(scores, right, weights)
        own = auroc(scores, right), auroc_draws(scores, right, weights)
        if first is not None:
            gain = estimate(own[0] - first[0], own[1] - first[1], len(right))
            of_teacher["auroc_gain"] = gain.row()
        first = first or own
        edges = depth_edges(int(lengths.max()))
        of_teacher["by_depth"] = {
            kind: by_depth(np.where(mask.reshape(-1, 1), values["reward"], np.nan), edges, len(right))
            for kind, mask in (("right", right), ("wrong", ~right))
        }
        result["teachers"].append(of_teacher | {"rewards": scores})
    return plain(result)


def mean_rewards(rewards: Float[np.ndarray, "rows R"]) -> Float[np.ndarray, " rows"]:
    """r̄ of each rollout, without the digits that rounding makes: they would order the rollouts of a student that is its
    own teacher."""
    return np.round(np.nanmean(rewards, axis=1, dtype=np.float64), DECIMALS)


def check_both_classes(right: Bool[np.ndarray, "problems samples"], student: Path) -> None:
    """Raises InputError unless there are right and wrong rollouts."""
    if right.all() or not right.any():
        some = "harder problems" if right.all() else "easier problems, longer responses (--max-response)"
        raise InputError(
            f"{student}: of {right.size} rollouts {int(right.sum())} are right and {int((~right).sum())} wrong; an "
            f"AUROC compares right with wrong ones. Give {some}, or more of them (--problems, --samples)."
        )


def separation(
    scores: Float[np.ndarray, "problems samples"], right: Bool[np.ndarray, "problems samples"], weights: np.ndarray
) -> Row:
    """How a score of rollouts separates right from wrong ones: AUROC, means and histogram."""
    result = rank_separation(scores, right, weights)
    means = []
    for kind, mask in (("right", right), ("wrong", ~right)):
        value, draws = ratio(np.where(mask, scores, 0).sum(1), mask.sum(1).astype(np.float64), weights)
        means.append((value, draws))
        result[kind] = estimate(value, draws, len(right)).row()
    (of_right, draws_right), (of_wrong, draws_wrong) = means
    result["difference"] = estimate(of_right - of_wrong, draws_right - draws_wrong, len(right)).row()
    low, high = np.percentile(scores, [OUTSIDE, 100 - OUTSIDE])
    edges = np.linspace(low, high if high > low else low + 1, BARS + 1)
    inside = np.clip(scores, edges[0], edges[-1])
    counts = {kind: np.histogram(inside[mask], edges)[0] for kind, mask in (("right", right), ("wrong", ~right))}
    return result | {"histogram": {"edges": edges} | counts}


def rank_separation(scores: np.ndarray, right: np.ndarray, weights: np.ndarray) -> Row:
    value: Estimate = estimate(auroc(scores, right), auroc_draws(scores, right, weights), len(right))
    within, prompts = within_prompts(scores, right, weights)
    return {
        "auroc": value.row(),
        "auroc_delong": delong(scores, right).row(),
        "auroc_within": within.row() | {"problems": prompts},
    }


def section(result: Row) -> Section:
    """What people see of a result."""
    rows = []
    for t in result["teachers"]:
        bounds = span(t["auroc_delong"])
        rows.append([t["name"], *cells(t["auroc"]), bounds, *cells(t["auroc_within"]), *cells(t.get("auroc_gain"))])
    length = result["length"]
    delong_length = span(length["auroc_delong"])
    rows.append(
        ["(shorter is better)", *cells(length["auroc"]), delong_length, *cells(length["auroc_within"]), None, None]
    )
    heads = ["score", "AUROC", "95 %", "95 % (DeLong)", "within a problem", "95 %", "to the first", "95 %"]
    means = [
        [t["name"], *((t[kind]["value"], t[kind]["error"]) for kind in ("right", "wrong")), *cells(t["difference"])]
        for t in result["teachers"]
    ]
    tables = [
        Table("right against wrong rollouts", heads, rows),
        Table("mean reward, nats per token", ["teacher", "right", "wrong", "difference", "95 %"], means),
        *(Table(f"{t['name']}: reward by position, nats per token", *_position_rows(t)) for t in result["teachers"]),
    ]
    plots = [plot for t in result["teachers"] for plot in _plots(t)]
    return Section(KIND, f"Reward of {Path(result['student']).name}'s rollouts", _lead(result), tables, plots)


def _plots(teacher: Row) -> list[Plot]:
    name, bars = teacher["name"], teacher["histogram"]
    counts = {kind: bars[kind] for kind in ("right", "wrong")}
    return [
        Plot(
            f"{name}: histograms of the sequence mean reward of right and of wrong rollouts",
            lambda: figures.histogram(counts, bars["edges"], "sequence mean reward (nats/token)", name),
        ),
        Plot(
            f"{name}: reward of right and of wrong rollouts by output position, with standard errors",
            lambda: figures.by_depth(teacher["by_depth"], "reward (nats/token)", name),
        ),
    ]


def _position_rows(teacher: Row) -> tuple[list[str], list[list[Any]]]:
    right, wrong = (teacher["by_depth"][kind] for kind in ("right", "wrong"))
    rows = [
        [
            f"{a['start']:,} – {a['end'] - 1:,}",
            (a["mean"], a["error"]),
            a["tokens"],
            (b["mean"], b["error"]),
            b["tokens"],
        ]
        for a, b in zip(right, wrong, strict=True)
    ]
    return ["tokens", "right", "of tokens", "wrong", "of tokens"], rows


def _lead(result: Row) -> list[str]:
    lines = [
        f"{result['problems']:,} problems of {result['source']} × {result['samples']} rollouts of "
        f"{Path(result['student']).name}: {result['right']:,} right, {result['wrong']:,} wrong. The sequence mean "
        "reward is the mean of log q − log p over the tokens of a rollout."
    ]
    for t in result["teachers"]:
        lines.append(
            f"{t['name']}: AUROC {told(t['auroc'])}; between rollouts of the same problem {told(t['auroc_within'])}, "
            f"over the {t['auroc_within']['problems']:,} problems that have right and wrong ones. Right rollouts have "
            f"{format_value(t['difference']['value'])} nats per token more than wrong ones."
        )
    lines.append(
        "Intervals resample problems, because rollouts of one problem share its difficulty; DeLong's takes them for "
        "independent. In the paper a teacher that succeeds and one that fails have much the same AUROC (0.73 and 0.75, "
        "§6.2): it says that the reward is informative, not that distillation can use it."
    )
    return lines
