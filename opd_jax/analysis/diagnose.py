"""``opd diagnose``: does this teacher fit this student? Asked on a few hundred rollouts, before a run is paid for.

The paper names two conditions of success: student and teacher think in compatible patterns (§3.1, §5), and the teacher
knows what the student does not (§3.2). Both are measured here; neither is proved by it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.special import stdtrit

from opd_jax.analysis.estimates import estimate, prompt_weights, ratio
from opd_jax.analysis.first_update import first_update, step_cost
from opd_jax.analysis.pair import (
    Drawn,
    K,
    Network,
    Pair,
    Sampling,
    Values,
    by_depth,
    check_pair,
    depth_edges,
    described,
    draw_rollouts,
    load_panel,
    token_mean,
    token_values,
)
from opd_jax.analysis.reward import mean_rewards, rank_separation
from opd_jax.config import Data
from opd_jax.data.templates import encode_prompt
from opd_jax.data.tokenizers import load_tokenizer, stop_ids, valid_vocab_size
from opd_jax.errors import InputError
from opd_jax.evaluation.answers import AnswerPool
from opd_jax.evaluation.heldout import MEASURED, Panel
from opd_jax.models.hf import load_config
from opd_jax.tracking.console import console
from opd_jax.tracking.writers import plain

Row = dict[str, Any]

KIND = "diagnose"
HOLDS, DOUBT, FAILS, UNKNOWN = "holds", "in doubt", "does not hold", "not measured"


class Threshold(NamedTuple):
    """A condition holds from ``holds`` on, about where a run of the paper begins that succeeds; below ``fails``, the
    lowest value from which a student was seen to learn, it fails; between them it is in doubt."""

    holds: float
    fails: float
    source: str


THRESHOLDS = {
    # compatible patterns
    "overlap_ratio": Threshold(0.70, 0.60, "the run that succeeds in §4.1 begins at 0.72, docs/first-run.md at 0.60"),
    "overlap_mass_student": Threshold(
        0.95, 0.55, "0.97 – 0.99 in the run that succeeds in §4.1; opd demo begins at 0.94, docs/first-run.md at 0.56"
    ),
    # new knowledge: any gain counts, as every teacher of the paper that is no better takes the student back (§3.3)
    "accuracy_gain": Threshold(0.0, 0.0, "students of teachers that are not better regress (§3.3)"),
}
COMPATIBLE = ("overlap_ratio", "overlap_mass_student")
SAME_KL = 1e-4  # nats a token below which student and teacher are one
# largest difference of a log-probability between two layouts of the same rows, nats; in bfloat16 logits of 8 to 64 go
# by steps of 0.06 to 0.25
ROUNDING = {"float32": 2e-3, "bfloat16": 0.5}
FADES = 0.05  # fall of the overlap from the first to the last positions, with two standard errors beyond it (§6.1)
LONG = 0.2  # share of rollouts cut at the limit from which --max-response is said to be short
FEWEST = 30  # tokens that a range of positions needs to be compared


def diagnose(student: Path, teachers: Sequence[Path], data: Data, sampling: Sampling, **settings: Any) -> Row:
    """Measures a student against teachers on its own rollouts, judges both conditions, and ranks the teachers.

    Prompts may have no answers; what needs them is then left out.

    Args:
        settings: of ``check_pair``.

    Raises:
        InputError: models that cannot be compared token by token, prompts that are refused.
    """
    pair = check_pair(student, teachers, **settings)
    panel, overlong = load_panel(pair, data, sampling, graded=False)
    own = pair.load(student)
    result: Row = {"kind": KIND} | described(pair, data, sampling, panel, overlong)
    with AnswerPool(fallback_number=sampling.fallback_number) as pool:
        start = time.monotonic()
        drawn = draw_rollouts(pair, own, panel, pool, sampling, student.name)
        sampled = float(drawn.lengths.sum()) / (time.monotonic() - start)
        result["of_student"] = _of_rollouts(drawn)

        def of_teacher(name: str, path: Path) -> Row:
            other = pair.load(path)
            values = token_values(pair, own, other, drawn, title=f"scoring by {name}")
            answered = draw_rollouts(pair, other, panel, pool, sampling, f"{name} answers")
            row: Row = {"name": name, "path": str(path), "settings": compare_settings(pair, path, data, panel)}
            row |= {"scoring": check_scoring(pair, own, other, drawn, values), "of_teacher": _of_rollouts(answered)}
            row |= measured(values, len(panel.problems)) | knowledge(drawn, answered, values)
            row |= judged(row, len(panel.problems), pair.k)
            row["first_update"] = None if row["same"] else first_update_if_it_fits(pair, own, other, drawn)
            if update := row["first_update"]:
                rates = update.pop("rates") | {"rollout": sampled}
                row["step"] = step_cost(pair, own.config, other.config, drawn, rates)
            return row

        result["teachers"] = [of_teacher(*each) for each in zip(pair.names(), teachers, strict=True)]
    result["ranking"] = ranked(result["teachers"])
    return plain(result)


def first_update_if_it_fits(pair: Pair, student: Network, teacher: Network, drawn: Drawn) -> Row | None:
    """None, with a warning, where the device refuses it: what was measured until then is not lost to it."""
    try:
        return first_update(pair, student, teacher, drawn)
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        why = (str(e) or "out of memory").splitlines()[0]
        console.warn(
            f"{teacher.path}: the first update is not measured, as it did not run beside both models here ({why})."
        )
        return None


def compare_settings(pair: Pair, teacher: Path, data: Data, panel: Panel) -> Row:
    """What student and teacher say beside their weights: special ids, vocabulary width, how they render the prompts."""
    tokenizer = load_tokenizer(teacher)
    both = pair.tokenizer, tokenizer
    special = {name: [getattr(t, f"{name}_token_id") for t in both] for name in ("bos", "eos", "pad")}
    P, differing, failure = panel.prompts.tokens.shape[1], 0, None
    for i, problem in enumerate(panel.problems):
        row, n = i * panel.samples, int(panel.prompts.lengths[i * panel.samples])
        try:
            theirs = encode_prompt(tokenizer, problem, data.template, data.chat, data.chat_arguments)
        except InputError as e:
            differing, failure = len(panel.problems), str(e)
            break
        differing += theirs[-data.max_prompt :] != np.asarray(panel.prompts.tokens[row, P - n :]).tolist()
    return {
        "tokens": valid_vocab_size(pair.tokenizer),
        "outputs": [load_config(path).vocab_size for path in (pair.student, teacher)],
        "special": special,
        "stops": [list(pair.stops), list(stop_ids(teacher, tokenizer))],
        "prompts_differ": differing,
        "template_failure": failure,
    }


def check_scoring(pair: Pair, student: Network, teacher: Network, drawn: Drawn, values: Values) -> Row:
    """Scores the first batch once more as it is packed, and with one rollout a row: the former has to equal ``values``
    bit by bit, the latter within rounding."""
    rows = drawn.panel.batches[0]
    n, held = len(rows), rows < drawn.panel.rows
    rollouts = jax.tree.map(lambda x: np.asarray(x)[rows], drawn.rollouts)
    panel = Panel(rollouts.prompts, (np.arange(n),), 1, ("",) * n, (None,) * n)
    part = dataclasses.replace(drawn, rollouts=rollouts, panel=panel)
    again = token_values(pair, student, teacher, part, title="scoring once more")
    padded = token_values(pair, student, teacher, part, title="scoring, one a row", separate=True)
    first = {name: x[rows[held]] for name, x in values.items()}
    gap = max(float(np.nanmax(np.abs(padded[name][held] - first[name]))) for name in ("logp", "logq"))
    same = all(np.array_equal(x, again[name][held], equal_nan=True) for name, x in first.items())
    return {"repeats": same, "packing": gap, "rounding": ROUNDING[str(pair.dtype)]}


def _of_rollouts(drawn: Drawn) -> Row:
    names = ("accuracy", "accuracy_se", "accuracy_interval", "response_length", "truncation_rate", "no_answer_rate")
    return {name: drawn.summary.get(name) for name in names}


def measured(values: Values, prompts: int) -> Row:
    """The metrics of Eqs. 6–10 and both divergences on the student's rollouts: means with errors, and by depth."""
    longest = int(np.isfinite(values["logp"]).sum(axis=1).max())
    means = {name: token_mean(values[name], prompts) for name in MEASURED}
    return {
        "metrics": {name: {"mean": mean, "error": error} for name, (mean, error) in means.items()},
        "by_depth": {name: by_depth(values[name], depth_edges(longest), prompts) for name in MEASURED},
    }


def knowledge(drawn: Drawn, answered: Drawn, values: Values) -> Row:
    """What the teacher knows: accuracy beyond the student's, and problems that only one of them ever solves."""
    if drawn.verdicts is None:
        return {"knowledge": None, "reward": None}
    mine, theirs = drawn.correct, answered.correct
    ones, weights = np.ones(len(mine)), prompt_weights(len(mine))
    solves, solved = mine.any(axis=1), theirs.any(axis=1)
    shares = {
        "accuracy_gain": theirs.mean(axis=1) - mine.mean(axis=1),
        "new": (solved & ~solves).astype(float),
        "lost": (solves & ~solved).astype(float),
    }
    shares["net"] = shares["new"] - shares["lost"]
    row: Row = {n: estimate(*ratio(x, ones, weights), len(mine)).row() for n, x in shares.items()}
    # problems that nobody or everybody solves do not tell two models apart
    row["told_apart"] = bool(0 < mine.sum() + theirs.sum() < mine.size + theirs.size)
    both = 0 < mine.sum() < mine.size
    scores = mean_rewards(values["reward"]).reshape(mine.shape)
    return {"knowledge": row, "reward": rank_separation(scores, mine, weights) if both else None}


def judged(row: Row, prompts: int, k: int) -> Row:
    """Which of the two conditions hold, by ``THRESHOLDS``, and what the depths say; ``verdicts`` puts it in words.

    The overlap counts with lists of 16 alone: most of a smaller vocabulary's lists are ids that hardly ever occur.
    """
    same = row["metrics"]["reverse_kl"]["mean"] < SAME_KL and row["metrics"]["forward_kl"]["mean"] < SAME_KL
    t = float(stdtrit(max(prompts - 1, 1), 0.975))
    found = {}
    for name in COMPATIBLE if k == K else COMPATIBLE[1:]:
        mean, error = row["metrics"][name]["mean"], row["metrics"][name]["error"]
        found[name] = verdict(mean, mean - t * error, mean + t * error, THRESHOLDS[name])
    new = UNKNOWN
    if row["knowledge"] and row["knowledge"]["told_apart"]:
        gain = row["knowledge"]["accuracy_gain"]
        new = verdict(gain["value"], gain["low"], gain["high"], THRESHOLDS["accuracy_gain"])
    order = (FAILS, DOUBT, HOLDS)
    return {
        "same": bool(same),
        "compatible": {"verdict": min(found.values(), key=order.index)} | found,
        "new_knowledge": FAILS if same else new,
        "fades": fading(row["by_depth"]),
    }


def verdict(value: float, low: float, high: float, threshold: Threshold) -> str:
    """Holds or fails only where the whole 95 % interval says so; without one nothing does but no gain at all."""
    if not math.isfinite(low + high):
        return FAILS if value == threshold.fails else DOUBT
    if low >= threshold.holds and low > threshold.fails:
        return HOLDS
    return FAILS if high <= threshold.fails else DOUBT


def fading(of: Row) -> Row | None:
    """From where on the overlap is below that of the first positions by more than ``FADES``, and the reverse KL above
    theirs, both by two standard errors; or None. (Where both are certain of a token, lists overlap as chance has it.)
    """
    overlap, kl = of["overlap_ratio"], of["reverse_kl"]
    held = [i for i, r in enumerate(overlap) if r["tokens"] >= FEWEST and math.isfinite(r["error"])]
    found = None
    for i in reversed(held[1:]):
        drop, error = _difference(overlap[held[0]], overlap[i])
        growth, of_growth = _difference(kl[i], kl[held[0]])
        if drop - 2 * error <= FADES or growth <= 2 * of_growth:
            break
        found = {"from": overlap[i]["start"], "drop": drop, "error": error}
    return found


def _difference(a: Row, b: Row) -> tuple[float, float]:
    return a["mean"] - b["mean"], math.hypot(a["error"], b["error"])


def ranked(rows: Sequence[Row]) -> list[str]:
    """Names, the best first: by the conditions that hold, then by accuracy gained × overlap, then by overlap."""
    worth = {HOLDS: 2, DOUBT: 1, UNKNOWN: 1, FAILS: 0}

    def key(row: Row) -> tuple[float, ...]:
        overlap = row["metrics"]["overlap_ratio"]["mean"]
        gain = max(row["knowledge"]["accuracy_gain"]["value"], 0.0) if row["knowledge"] else 0.0
        return worth[row["compatible"]["verdict"]] + worth[row["new_knowledge"]], gain * overlap, overlap

    return [row["name"] for row in sorted(rows, key=key, reverse=True)]
