"""The paper's ten claims as predicates over seeds. What counts, by how much, was fixed before the seeds were run that
decide it.

An effect is a number per seed; its interval is Student's t at 95 %. A check of "more than b" holds if the whole
interval lies above b, fails if the whole of it lies below, else it is undecided; one of "alike" holds within ± MARGIN
and fails outside of it. Of two accuracies that are not alike, one is more by more than MARGIN. A claim holds if all of
its checks do, and does not if one fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from opd_jax.evaluation.scores import gap_recovery, student_t

Row = dict[str, Any]

MARGIN = 0.03  # of accuracies that are called alike
LEARNT = 0.5  # accuracy of a teacher that has learnt the facts; those that have not are at chance
ENTROPY = 0.01  # nats that count as kept
AUROC = 0.1  # of which a mean reward that tells as well may be lower
HOLDS, FAILS, UNDECIDED = "holds", "does not", "undecided"


@dataclasses.dataclass(frozen=True)
class Check:
    """One effect with its interval and what it says."""

    text: str
    values: tuple[float, ...]  # one a seed
    mean: float
    low: float
    high: float
    bound: float
    alike: bool

    @property
    def verdict(self) -> str:
        if not math.isfinite(self.low + self.high):
            return UNDECIDED
        low, high = (-self.bound, self.bound) if self.alike else (self.bound, math.inf)
        if low < self.low and self.high < high:
            return HOLDS
        return FAILS if self.high < low or self.low > high else UNDECIDED

    @property
    def expected(self) -> str:
        return f"within ± {self.bound:g}" if self.alike else f"> {self.bound:g}"


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (``student_t``) over seeds; nan bounds for a single seed, nan for none.

    Where all seeds agree, as where a gradient is zero, the interval is the mean: an effect of exactly 0 is alike.
    """
    if not len(values):
        return math.nan, math.nan, math.nan
    unknown = math.nan if len(values) < 2 else float(np.mean(values))
    mean, low, high = (unknown if (x := student_t(values)[name]) is None else x for name in ("mean", "low", "high"))
    return mean, low, high


def more(text: str, values: Sequence[float], than: float = 0.0) -> Check:
    return Check(text, tuple(values), *interval(values), than, False)


def alike(text: str, values: Sequence[float], margin: float = MARGIN) -> Check:
    return Check(text, tuple(values), *interval(values), margin, True)


@dataclasses.dataclass(frozen=True)
class Claim:
    number: str
    experiment: str  # and the paper's section
    text: str
    checks: Callable[[Sequence[Row]], list[Check]]  # of the rows of one experiment, one a seed
    since: int = 0  # the first seed that counts: earlier ones were seen when the claim was written


def verdict(checks: Sequence[Check]) -> str:
    found = {check.verdict for check in checks}
    return FAILS if FAILS in found else UNDECIDED if UNDECIDED in found else HOLDS


def _final(row: Row, run: str, name: str = "accuracy") -> float:
    return row["runs"][run]["evaluations"][name][-1]


def _first(row: Row, run: str, name: str) -> float:
    return row["runs"][run]["evaluations"][name][0]


def _model(row: Row, name: str) -> float:
    return row["models"][name]["accuracy"]


def _recovery(row: Row, run: str) -> float:
    return gap_recovery(_first(row, run, "accuracy"), _final(row, run), row["runs"][run]["teacher_accuracy"])


def _change(row: Row, run: str, name: str) -> float:
    return _final(row, run, name) - _first(row, run, name)


def _gain(row: Row, run: str) -> float:
    return _change(row, run, "accuracy")


def _gradient_norm(row: Row, run: str) -> float:
    """Of the first fifth of the steps."""
    norms = row["runs"][run]["steps"]["gradient_norm"]
    return float(np.mean(norms[: max(1, len(norms) // 5)]))


def _between(rows: Sequence[Row], a: str, b: str, name: str = "accuracy") -> list[float]:
    return [_final(r, a, name) - _final(r, b, name) for r in rows]


def _worst_dip(row: Row, run: str) -> float:
    """Largest fall of the held-out accuracy below what it was at an earlier evaluation."""
    accuracy = np.asarray(row["runs"][run]["evaluations"]["accuracy"])
    return float(np.max(np.maximum.accumulate(accuracy) - accuracy))


def _compatible(rows: Sequence[Row]) -> list[Check]:
    def apart(row: Row, at: int) -> float:
        overlap = [row["runs"][r]["evaluations"]["overlap_ratio"][at] for r in ("compatible", "mismatched")]
        return overlap[0] - overlap[1]

    return [
        more("score of the mismatched teacher − the compatible one's",
             [_model(r, "mismatched") - _model(r, "compatible") for r in rows], -0.01),
        more("initial overlap, compatible − mismatched", [apart(r, 0) for r in rows]),
        more("final accuracy, compatible − mismatched", _between(rows, "compatible", "mismatched"), MARGIN),
        more("difference of the overlaps, first − last", [apart(r, 0) - apart(r, -1) for r in rows]),
    ]  # fmt: skip


def _compatible_learnt(rows: Sequence[Row]) -> list[Check]:
    """Of the seeds in which both teachers have learnt the facts, as the claim presupposes."""
    return _compatible([r for r in rows if min(_model(r, name) for name in ("compatible", "mismatched")) > LEARNT])


def _knowledge(rows: Sequence[Row]) -> list[Check]:
    return [
        more(f"accuracy gained, teacher after {kind} − larger teacher",
             [_gain(r, name) - _gain(r, "large") for r in rows], MARGIN)
        for name, kind in (("rewarded", "GRPO"), ("taught", "SFT"))
    ]  # fmt: skip


def _above(row: Row, run: str) -> float:
    """Final accuracy − that of the teacher from before GRPO (§3.3)."""
    return _final(row, run) - row["runs"]["base"]["teacher_accuracy"]


def _reverse(rows: Sequence[Row]) -> list[Check]:
    return [
        more("accuracy lost with the teacher from before GRPO", [-_gain(r, "base") for r in rows], 0.1),
        alike("final accuracy − score before GRPO, teacher from before", [_above(r, "base") for r in rows]),
        alike("final accuracy − score before GRPO, larger teacher", [_above(r, "large") for r in rows]),
        alike("final accuracy, larger teacher − teacher from before", _between(rows, "large", "base")),
    ]


def _kept(rows: Sequence[Row]) -> list[Check]:
    return [
        more(f"final accuracy − score before GRPO, {told}", [_above(r, run) for r in rows], MARGIN)
        for run, told in (("base", "teacher from before"), ("large", "larger teacher"))
    ]


def _signs(rows: Sequence[Row]) -> list[Check]:
    def advantage(row: Row) -> float:
        first, last = (abs(at(row, "rewarded", "overlap_advantage")) for at in (_first, _final))
        return first - last

    def beyond(name: str, sign: float) -> list[float]:
        return [sign * (_change(r, "rewarded", name) / 3 - _change(r, "large", name)) for r in rows]

    return [
        more("success: gap recovery", [_recovery(r, "rewarded") for r in rows], 0.8),
        more("success: overlap, last − first", [_change(r, "rewarded", "overlap_ratio") for r in rows]),
        more("success: entropy gap, first − last", [-_change(r, "rewarded", "entropy_gap") for r in rows]),
        more("success: |overlap-token advantage|, first − last", [advantage(r) for r in rows]),
        more("success: overlap mass at the end", [_final(r, "rewarded", "overlap_mass_student") for r in rows], 0.97),
        more("rise of the overlap, a third of success − failure", beyond("overlap_ratio", 1.0)),
        more("narrowing of the entropy gap, a third of success − failure", beyond("entropy_gap", -1.0)),
        more("gradient norm of the first steps, success − failure",
             [_gradient_norm(r, "rewarded") - _gradient_norm(r, "large") for r in rows]),
    ]  # fmt: skip


def _supports(rows: Sequence[Row]) -> list[Check]:
    forms = {"": "renormalised", " raw": "not renormalised", " clipped": "equal gradient norms"}
    return [
        check
        for form, told in forms.items()
        for check in (
            alike(f"overlap − student top-k, {told}", _between(rows, f"overlap{form}", f"student{form}")),
            more(f"student top-k − non-overlap, {told}",
                 _between(rows, f"student{form}", f"non_overlap{form}"), MARGIN),
        )
    ]  # fmt: skip


def _supports_learnt(rows: Sequence[Row]) -> list[Check]:
    """Of the seeds whose teacher has learnt the facts, as the claim presupposes."""
    return _supports([r for r in rows if _model(r, "rewarded") > LEARNT])


def _closed(rows: Sequence[Row]) -> list[Check]:
    return [
        alike("overlap − student top-k, with an outcome for the rest", _between(rows, "overlap", "student")),
        more("overlap, with an outcome for the rest − without", _between(rows, "overlap", "overlap alone"), MARGIN),
    ]  # fmt: skip


def _cold_start(rows: Sequence[Row]) -> list[Check]:
    def gain(name: str, at: Callable[[Row, str, str], float] = _final) -> list[float]:
        return [at(r, "cold start", name) - at(r, "direct", name) for r in rows]

    return [
        more("initial overlap, cold start − direct", gain("overlap_ratio", _first)),
        more("final accuracy, cold start − direct", gain("accuracy"), MARGIN),
        more("worst dip of the accuracy, direct − cold start",
             [_worst_dip(r, "direct") - _worst_dip(r, "cold start") for r in rows]),
    ]  # fmt: skip


def _prompts(rows: Sequence[Row]) -> list[Check]:
    return [
        more("final accuracy, teacher's template − without", _between(rows, "aligned", "without template"), MARGIN),
        more("final accuracy, teacher's content − other", _between(rows, "aligned", "other content"), MARGIN),
        more("final student entropy, other content − teacher's (nats)",
             _between(rows, "other content", "aligned", "student_entropy")),
        more("final student entropy, mixed content − teacher's (nats)",
             _between(rows, "mixed content", "aligned", "student_entropy")),
    ]  # fmt: skip


def _mixture(rows: Sequence[Row]) -> list[Check]:
    return [
        more("final student entropy, mixed content − teacher's (nats)",
             _between(rows, "mixed content", "aligned", "student_entropy"), ENTROPY)
    ]  # fmt: skip


def _tenth(rows: Sequence[Row]) -> list[Check]:
    return [
        more("final student entropy, a tenth of the teacher's content − all (nats)",
             _between(rows, "a tenth", "aligned", "student_entropy"), ENTROPY),
        more("final accuracy, a tenth of the teacher's content − none", _between(rows, "a tenth", "other content"),
             MARGIN),
    ]  # fmt: skip


def _rise(row: Row, run: str, quarter: int) -> float:
    """Of the entropy in a quarter of the positions, from the first steps to the last."""
    first, last = (np.array_split(of, 4)[quarter] for of in row["runs"][run]["student_entropy_by_position"])
    return float(np.mean(last) - np.mean(first))


def _horizon(rows: Sequence[Row]) -> list[Check]:
    shortest, *_, long, longest = sorted(rows[0]["runs"], key=int)

    def fall(row: Row) -> float:
        gains = [at["difference"]["value"] for at in row["depth"]["depths"]]
        return gains[0] - gains[-1]

    return [
        more("final accuracy, three quarters of the longest response − an eighth",
             _between(rows, long, shortest), MARGIN),
        more("final accuracy, three quarters − all", _between(rows, long, longest), -MARGIN),
        more("gain of the teacher's continuation, first cut − last", [fall(r) for r in rows], MARGIN),
        more("rise of the entropy at the end of responses (nats)", [_rise(r, longest, -1) for r in rows]),
    ]  # fmt: skip


def _collapsed(rows: Sequence[Row]) -> list[Check]:
    early, late = ([_rise(r, "collapsed", quarter) for r in rows] for quarter in (0, -1))
    return [
        more("accuracy lost", [-_gain(r, "collapsed") for r in rows], 0.1),
        more("rise of the entropy at the end of responses (nats)", late),
        more("rise of the entropy, end − beginning of responses (nats)", np.subtract(late, early).tolist()),
    ]


def _auroc(row: Row, teacher: str) -> float:
    return row["reward"][teacher]["auroc"]["value"]


def _rewards(rows: Sequence[Row]) -> list[Check]:
    teachers = {"rewarded": "teacher that succeeds", "large": "teacher that fails and knows no more"}
    return [
        more(f"AUROC of the mean reward, {told}", [_auroc(r, name) for r in rows], 0.5)
        for name, told in teachers.items()
    ]


def _rewards_mismatched(rows: Sequence[Row]) -> list[Check]:
    told = "AUROC of the mean reward, teacher that fails and knows more"
    return [more(told, [_auroc(r, "mismatched") for r in rows], 0.5)]


FAILING = {"large": "failure that knows no more", "mismatched": "failure that knows more"}


def _aurocs_apart(rows: Sequence[Row]) -> list[Check]:
    return [
        more(f"AUROC of the mean reward, {told} − success",
             [_auroc(r, name) - _auroc(r, "rewarded") for r in rows], -AUROC)
        for name, told in FAILING.items()
    ]  # fmt: skip


def _coherence(rows: Sequence[Row]) -> list[Check]:
    return [
        more(f"coherence of token gradients over that of orthogonal ones, success − {told}",
             [r["ratio"]["rewarded"] - r["ratio"][name] for r in rows])
        for name, told in FAILING.items()
    ]  # fmt: skip


def list_size(run: str) -> int:
    """k of a run of 6.3."""
    return int(run.split("k = ")[1])


def _top_k(rows: Sequence[Row]) -> list[Check]:
    def sizes(kind: str) -> list[str]:
        return sorted((run for run in rows[0]["runs"] if run.startswith(kind)), key=list_size)

    eq5, published = sizes("Eq. 5"), sizes("published")
    return [
        *(alike(f"sampled − {name}", _between(rows, "sampled", name)) for name in published[1:]),
        more(f"{published[-1]} − {published[0]}", _between(rows, published[-1], published[0]), MARGIN),
        alike(f"{eq5[0]}: accuracy gained", [_gain(r, eq5[0]) for r in rows], 0.01),
    ]


def _top_k_closed(rows: Sequence[Row]) -> list[Check]:
    return [
        alike("sampled − published, k = 8", _between(rows, "sampled", "eight")),
        alike("sampled − Eq. 5, k = 4, with an outcome for the rest", _between(rows, "sampled", "four and the rest")),
        more("Eq. 5, k = 4, with an outcome for the rest − without",
             _between(rows, "four and the rest", "four"), MARGIN),
    ]  # fmt: skip


def _remedy(rows: Sequence[Row]) -> list[Check]:
    return [
        more("final accuracy, with reward − teacher alone", _between(rows, "with reward", "teacher alone"), MARGIN),
        more("final accuracy with reward − the failing teacher's own score",
             [_final(r, "with reward") - _model(r, "large") for r in rows], MARGIN),
        more("final accuracy, with reward − reward alone", _between(rows, "with reward", "reward alone"), -MARGIN),
    ]  # fmt: skip


CLAIMS = (
    Claim("1", "3.1", "A teacher of compatible patterns and no higher score beats one of other patterns.", _compatible),
    Claim("1+", "3.1", "Further: where both teachers did learn.", _compatible_learnt, 17),
    Claim("2", "3.2", "New knowledge in a teacher counts for more than its size.", _knowledge),
    Claim("3", "3.3", "Reverse distillation takes a student back to before RL, with either teacher.", _reverse),
    Claim("3+", "3.3+", "Further: by the forward KL it does so whatever the student is certain of.", _reverse),
    Claim("3b", "3.3b", "Further: by the reverse KL of the whole vocabulary it does not either.", _kept),
    Claim("4", "4.1", "Success and failure show in overlap, entropy gap, advantage, mass and gradient norm.", _signs),
    Claim("5", "4.2", "The overlap carries the gradient: alone it does as well, without it one does worse.", _supports),
    Claim("5b", "4.2", "Further: where the teacher did learn.", _supports_learnt, 17),
    Claim("5+", "4.2+", "Further: it is the mass outside of the overlap that renormalising over it loses.", _closed),
    Claim("6", "5.1", "A cold start on the teacher's responses overlaps more, ends higher, is steadier.", _cold_start),
    Claim("7", "5.2", "Prompts in the teacher's template and of its content: better, at lower entropy.", _prompts),
    Claim("7b", "5.2", "Further: half of the prompts of other content keep a hundredth of a nat.", _mixture, 17),
    Claim("7+", "5.2+", "Further: nine tenths of them do, and a tenth still teaches.", _tenth),
    Claim("8", "6.1", "Longer is not better: supervision fades with depth, and entropy rises from the end.", _horizon),
    Claim("8+", "6.1+", "Further: where a run does collapse, entropy rises from the end.", _collapsed),
    Claim("9", "6.2", "The mean reward tells right from wrong whether a teacher succeeds or not.", _rewards),
    Claim("9+", "6.2", "Further: it does for a teacher that fails though it knows more.", _rewards_mismatched),
    Claim("9b", "6.2", "Its untested guess: gradients of a teacher that fails cancel more.", _coherence),
    Claim("9c", "6.2", "Further: it tells as well where a teacher fails as where one succeeds.", _aurocs_apart, 17),
    Claim("10", "6.3", "Sampled tokens do about as well as top-k; top-1 is worse, by Eq. 5 it learns nothing.", _top_k),
    Claim("10+", "6.3+", "Further: lists of 4 lack the mass outside of them; twice as many do not.", _top_k_closed),
    Claim("+", "remedy", "Beyond the paper: a reward beside a failing teacher leads beyond it.", _remedy),
)  # fmt: skip
