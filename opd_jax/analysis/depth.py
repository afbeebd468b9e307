"""``opd analyze depth``: does the teacher still know better where the student has gone far (paper §6.1, Fig. 11b)?

Rollouts of the student are cut at chosen depths; teacher and student go on from the same prefixes. Per rollout their
accuracies are means over ``continuations`` samples, within the tokens that the rollout itself had left.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from opd_jax.analysis import figures
from opd_jax.analysis.estimates import cells, estimate, prompt_weights, ratio, told
from opd_jax.analysis.pair import (
    Drawn,
    Network,
    Pair,
    Sampling,
    by_depth,
    check_pair,
    described,
    draw_rollouts,
    load_panel,
    token_values,
)
from opd_jax.config import Data
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.generate import SHOWN, Meter
from opd_jax.mesh import batch_shards
from opd_jax.sampling.scheduler import Request, generate
from opd_jax.tracking.console import console
from opd_jax.tracking.labels import axis_label, short_label
from opd_jax.tracking.sections import Plot, Section, Table
from opd_jax.tracking.writers import plain

Row = dict[str, Any]

KIND = "depth"
MODELS = ("student", "teacher")
MEASURED = ("reverse_kl", "forward_kl", "student_entropy", "teacher_entropy", "entropy_gap", "overlap_ratio")


class Continued(NamedTuple):
    """What became of the prefixes of rollouts; arrays [prefixes, continuations]."""

    rows: np.ndarray  # [prefixes] of the panel
    correct: Bool[np.ndarray, "prefixes n"]
    lengths: np.ndarray  # tokens after the cut
    stopped: np.ndarray  # False: cut at the limit


def analyse_depth(
    student: Path,
    teacher: Path,
    data: Data,
    sampling: Sampling,
    depths: Sequence[int],
    continuations: int,
    **settings: Any,
) -> Row:
    """Samples rollouts of the student, cuts them, and has student and teacher go on from the same prefixes.

    Args:
        depths: response tokens before the cut. A rollout that has no more than that is left out there.
        settings: of ``check_pair``.

    Raises:
        InputError: a pair, prompts or depths that are refused, among them a depth that no rollout goes beyond.
    """
    depths = sorted(set(depths))
    if depths[0] < 0 or depths[-1] >= sampling.max_response:
        raise InputError(
            f"--depths {', '.join(map(str, depths))}: expected numbers of tokens from 0 to below --max-response, "
            f"{sampling.max_response}."
        )
    pair = check_pair(student, [teacher], **settings)
    panel, overlong = load_panel(pair, data, sampling)
    own = pair.load(student)
    with AnswerPool(fallback_number=sampling.fallback_number) as pool:
        drawn = draw_rollouts(pair, own, panel, pool, sampling, student.name)
        longest = int(drawn.lengths.max())
        if beyond := [d for d in depths if d >= longest]:
            raise InputError(
                f"--depths {', '.join(map(str, beyond))}: no rollout of {student} goes beyond; the longest has "
                f"{longest} tokens. Give depths below {longest}, or a larger --max-response."
            )
        other = pair.load(teacher)
        of_student, of_teacher = (
            continue_rollouts(pair, each, drawn, depths, continuations, sampling, pool) for each in (own, other)
        )
    result: Row = {"kind": KIND} | described(pair, data, sampling, panel, overlong)
    result |= {"teacher": str(teacher), "continuations": continuations, "longest": longest}
    result |= {name: drawn.summary[name] for name in ("accuracy", "accuracy_interval", "truncation_rate")}
    result |= compared(drawn, depths, of_student, of_teacher)
    values = token_values(pair, own, other, drawn, title=f"scoring by {teacher.name}")
    edges = np.array(sorted({0, *depths, longest}))
    result["by_depth"] = {name: by_depth(values[name], edges, len(panel.problems)) for name in MEASURED}
    return plain(result)


def continue_rollouts(
    pair: Pair,
    network: Network,
    drawn: Drawn,
    depths: Sequence[int],
    continuations: int,
    sampling: Sampling,
    pool: AnswerPool,
) -> list[Continued]:
    """For each depth ``continuations`` graded ends of every rollout that goes beyond it, within its limit of tokens.

    Their random numbers depend on (seed, depth, rollout, sample, position) alone: equal models go on alike.
    """
    panel, engine, shards = drawn.panel, pair.engine(network), batch_shards(pair.layout)
    weights, P = engine.cast(network.params), panel.prompts.tokens.shape[1]
    texts = [np.asarray(t[P - n :]).tolist() for t, n in zip(panel.prompts.tokens, panel.prompts.lengths, strict=True)]
    slots = min(pair.batch, -(-panel.rows * continuations // shards) * shards)
    ends = []
    for depth in depths:
        kept = np.flatnonzero(drawn.lengths > depth).tolist()
        prefix = {i: np.asarray(drawn.rollouts.tokens[i, :depth]).tolist() for i in kept}
        requests = [Request(texts[i] + prefix[i], i, sample) for i in kept for sample in range(continuations)]
        title = f"{network.path.name} from {depth:,}"
        with console.progress(len(requests), title, unit="response", show=SHOWN) as bar:
            meter = Meter(bar)
            found = dict(generate(
                engine, weights, requests, sampling.law, sampling.seed, depth,
                slots=slots, max_response=sampling.max_response - depths[0], limit=sampling.max_response - depth,
                width=P + depths[-1], occupancy=meter,
            ))  # fmt: skip
            bar.update(meter.finished, meter.row())
        responses = [found[i] for i in range(len(requests))]
        whole = [prefix[q.id] + r.tokens.tolist() for q, r in zip(requests, responses, strict=True)]
        answers = [str(panel.answers[q.id // panel.samples]) for q in requests]
        ended = [pair.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in whole]
        verdicts = pool.judge(list(zip(ended, answers, strict=True)))
        arrays = [v.correct for v in verdicts], [r.length for r in responses], [r.stopped for r in responses]
        ends.append(Continued(np.array(kept), *(np.array(x).reshape(len(kept), continuations) for x in arrays)))
    return ends


def compared(
    drawn: Drawn, depths: Sequence[int], of_student: Sequence[Continued], of_teacher: Sequence[Continued]
) -> Row:
    """Accuracies at each depth and their paired difference; the same of the rollouts beyond the deepest cut alone, and
    how the difference changes on those from the first depth to the last."""
    prompts, deepest = len(drawn.panel.problems), drawn.lengths > depths[-1]
    weights = prompt_weights(prompts)

    def sums(rows: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
        return [np.bincount(rows // drawn.panel.samples, x, minlength=prompts) for x in values]

    found, gaps, deep_rows = [], [], np.zeros(prompts)
    for depth, student, teacher in zip(depths, of_student, of_teacher, strict=True):
        shares = np.ones(len(student.rows)), student.correct.mean(axis=1), teacher.correct.mean(axis=1)
        deep = deepest[student.rows]
        of_deep = sums(student.rows[deep], *(x[deep] for x in shares))
        row: Row = {"depth": depth, "left_out": drawn.panel.rows - len(student.rows)}
        row |= _accuracies(*sums(student.rows, *shares), weights=weights)
        row["beyond_deepest"] = _accuracies(*of_deep, weights=weights)
        for name, model in zip(MODELS, (student, teacher), strict=True):
            row |= {f"{name}_length": model.lengths.mean(), f"{name}_truncated": 1 - model.stopped.mean()}
        found.append(row)
        deep_rows, gap = of_deep[0], of_deep[2] - of_deep[1]
        gaps.append(gap)
    change = ratio(gaps[-1] - gaps[0], deep_rows, weights)
    return {"depths": found, "change": estimate(*change, int((deep_rows > 0).sum())).row()}


def _accuracies(counts: np.ndarray, student: np.ndarray, teacher: np.ndarray, weights: np.ndarray) -> Row:
    """From sums over the rollouts of each prompt."""
    prompts = int((counts > 0).sum())
    parts = {"student": student, "teacher": teacher, "difference": teacher - student}
    row = {name: estimate(*ratio(total, counts, weights), prompts).row() for name, total in parts.items()}
    return {"rollouts": int(counts.sum()), "problems": prompts} | row


def section(result: Row) -> Section:
    """What people see of a result."""
    rows, deepest = result["depths"], result["depths"][-1]["depth"]
    shrink = rows[0]["rollouts"] > rows[-1]["rollouts"]
    heads = ["depth", "rollouts", "left out", "student", "95 %", "teacher", "95 %", "difference", "95 %"]
    accuracies = [
        [
            f"{row['depth']:,}",
            row["rollouts"],
            row["left_out"],
            *(cell for name in ("student", "teacher", "difference") for cell in cells(row[name])),
        ]
        for row in rows
    ]
    same = [
        [
            f"{row['depth']:,}",
            *(cell for name in ("student", "teacher", "difference") for cell in cells(row["beyond_deepest"][name])),
        ]
        for row in rows
    ]
    ends = [
        [f"{row['depth']:,}", *(row[f"{who}_{what}"] for what in ("length", "truncated") for who in MODELS)]
        for row in rows
    ]
    bins = next(iter(result["by_depth"].values()))
    tokens = [
        [f"{b['start']:,} – {b['end'] - 1:,}", b["tokens"]]
        + [(of[i]["mean"], of[i]["error"]) for of in result["by_depth"].values()]
        for i, b in enumerate(bins)
    ]
    of_ends = ["depth", "tokens, student", "tokens, teacher", "truncated, student", "truncated, teacher"]
    tables = [
        Table("accuracy of continuations", heads, accuracies),
        *([Table(f"the same of the rollouts beyond {deepest:,} tokens alone", [heads[0], *heads[3:]], same)] * shrink),
        Table("continuations", of_ends, ends),
        Table("student against teacher on the rollouts", ["tokens", "of tokens", *map(short_label, MEASURED)], tokens),
    ]
    return Section(
        KIND, f"{_name(result, 'teacher')} after {_name(result, 'student')}", _lead(result), tables, _plots(result)
    )


def _plots(result: Row) -> list[Plot]:
    rows, deepest = result["depths"], result["depths"][-1]["depth"]

    def series(name: str, deep: bool = False) -> list[Row]:
        return [{"depth": row["depth"]} | (row["beyond_deepest"] if deep else row)[name] for row in rows]

    gap = {"all rollouts": series("difference")}
    if rows[0]["rollouts"] > rows[-1]["rollouts"]:
        gap[f"those beyond {deepest:,} tokens"] = series("difference", deep=True)
    accuracy = {name: series(name) for name in MODELS}
    of = result["by_depth"]
    kl, overlap, entropies = of["reverse_kl"], of["overlap_ratio"], {name: of[f"{name}_entropy"] for name in MODELS}
    return [
        Plot(
            "Accuracy of student's and teacher's continuations by depth of the cut",
            lambda: figures.at_depths(accuracy, "accuracy of continuations"),
        ),
        Plot("Their difference", lambda: figures.at_depths(gap, "teacher − student", zero=True)),
        Plot("Reverse KL by position", lambda: figures.by_depth({"": kl}, axis_label("reverse_kl"))),
        Plot("Entropies by position", lambda: figures.by_depth(entropies, "entropy (nats)")),
        Plot("Overlap by position", lambda: figures.by_depth({"": overlap}, axis_label("overlap_ratio", result["k"]))),
    ]


def _name(result: Row, who: str) -> str:
    return Path(result[who]).name


def _lead(result: Row) -> list[str]:
    student, teacher, rows = _name(result, "student"), _name(result, "teacher"), result["depths"]
    lines = [
        f"{result['problems']:,} problems of {result['source']} × {result['samples']} rollouts of {student}, cut at "
        f"{len(rows)} depths; {result['continuations']} continuations of each by {student} and by {teacher}, up to "
        f"{result['max_response']:,} tokens with the prefix. Intervals resample problems."
    ]
    for row in rows if len(rows) == 1 else (rows[0], rows[-1]):
        lines.append(
            f"From {row['depth']:,} tokens on: {student} {told(row['student'])}, {teacher} {told(row['teacher'])}; "
            f"difference {told(row['difference'])}."
        )
    if len(rows) > 1:
        change, last = result["change"], rows[-1]
        known = change["low"] is not None
        word = "falls" if known and change["high"] < 0 else "grows" if known and change["low"] > 0 else None
        says = f"the teacher's advantage {word}" if word else "no change of the teacher's advantage is certain"
        lines.append(
            f"On the {last['rollouts']:,} rollouts beyond {last['depth']:,} tokens {says}: {told(change)} from the "
            "first depth to the last. In the paper it falls from 0.37 at 1,024 tokens to 0.02 at 16,384 (§6.1)."
        )
    return lines
